"""The C++ kernels against `den_kernels.reference`: every instruction set of this machine, poisoned inputs and outputs,
batch mates that must not matter. N samples, C channels, L levels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from den_kernels import reference
from den_kernels.backends import cpu

if os.environ.get("DEN_REQUIRE_EXT") != "1" and cpu.unavailable() is not None:
    pytest.skip(f"cpu backend: {cpu.unavailable()}", allow_module_level=True)

ISAS = cpu.supported_isas()
isas = pytest.mark.parametrize("isa", ISAS)
NAN = float("nan")


@pytest.fixture(autouse=True)
def _restore_isa_and_threads():
    threads = torch.get_num_threads()
    yield
    cpu.set_isa(ISAS[0])
    torch.set_num_threads(threads)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# The primitive


@st.composite
def conv_cases(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    group_in = draw(st.sampled_from([1, 3, 4, 8, 11, 16, 24, 40]))
    group_out = draw(st.sampled_from([1, 2, 5, 8, 12, 16, 20, 32, 48, 64, 72]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (2, 3), (5, 1), (7, 7)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 1), (1, 2)]))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    least = [max(1, dilation[d] * (kernel[d] - 1) + 1 - 2 * padding[d]) for d in (0, 1)]
    size = [least[d] + draw(st.integers(0, 17)) for d in (0, 1)]
    samples = draw(st.integers(1, 7))
    widths = []
    for channels, step in ((groups * group_in, group_in), (groups * group_out, group_out)):
        step = step if groups > 1 else 1
        some = st.lists(st.integers(0, channels // step), min_size=samples, max_size=samples)
        widths.append(draw(st.one_of(st.none(), some.map(lambda ws, s=step: [s * w for w in ws]))))
    return {
        "shape": (samples, groups * group_in, *size),
        "weight": (groups * group_out, group_in, *kernel),
        "in_width": widths[0],
        "out_width": widths[1],
        "geometry": (stride, padding, dilation, groups),
        "bias": draw(st.booleans()),
        "channels_last": draw(st.booleans()),
        "index": draw(st.sampled_from([torch.int32, torch.int64])),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 1000)),
    }


@isas
@settings(max_examples=80, deadline=None)
@given(case=conv_cases())
def test_conv2d_equals_the_reference(isa, case) -> None:
    cpu.set_isa(isa)
    torch.set_num_threads(case["threads"])
    torch.manual_seed(case["seed"])
    x, weight = torch.randn(case["shape"]), torch.randn(case["weight"]) * 0.1
    bias = torch.randn(weight.shape[0]) if case["bias"] else None
    if case["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    in_width, out_width = (
        None if case[name] is None else torch.tensor(case[name], dtype=case["index"])
        for name in ("in_width", "out_width")
    )
    stride, padding, dilation, groups = case["geometry"]
    # In float64: torch 2.13 convolves one float32 channel in channels_last wrongly when a strided row has one output.
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    expected = reference.den_conv2d(
        *wide, in_width, out_width, stride=stride, padding=padding, dilation=dilation, groups=groups
    ).float()
    for n, width in enumerate(case["in_width"] or []):
        x[n, width:] = NAN
    empty = torch.empty
    cpu.torch.empty = lambda *a, **k: empty(*a, **k).fill_(NAN)
    try:
        y = cpu.conv2d(x, weight, bias, in_width, out_width, *case["geometry"])
    finally:
        cpu.torch.empty = empty
    close(y, expected)
    for n, width in enumerate(case["out_width"] or []):
        assert torch.equal(y[n, width:], torch.zeros_like(y[n, width:]))
    if case["channels_last"]:
        assert y.is_contiguous(memory_format=torch.channels_last)


@isas
def test_conv2d_sample_does_not_depend_on_batch_mates_or_threads(isa) -> None:
    cpu.set_isa(isa)
    x = torch.randn(5, 40, 13, 13).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(72, 40, 3, 3), torch.randn(72)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for others in (0, 7, 40):
            in_width = torch.tensor([others, 19, others, 40, others])
            out_width = torch.tensor([72, 53, others, 72, 1])
            results.append(cpu.conv2d(x, weight, bias, in_width, out_width, *geometry)[[1, 3]])
            permuted = torch.tensor([4, 3, 0, 1, 2])
            y = cpu.conv2d(x[permuted], weight, bias, in_width[permuted], out_width[permuted], *geometry)
            results.append(y[[3, 1]])
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize(
    ("in_width", "out_width", "groups", "message"),
    [
        ([1, 9], None, 1, r"in_width\[1\] is 9; it must be between 0 and the 8 channels"),
        ([-1, 2], None, 1, r"in_width\[0\] is -1;"),
        (None, [0, 13], 1, r"out_width\[1\] is 13; it must be between 0 and the 12 channels"),
        ([8, 2], None, 2, r"in_width\[1\] is 2; with groups=2 it must be a multiple of 4 channels"),
        (None, [7, 6], 2, r"out_width\[0\] is 7; with groups=2 it must be a multiple of 6 channels"),
    ],
)
def test_conv2d_names_a_width_out_of_range(in_width, out_width, groups, message) -> None:
    x, weight = torch.zeros(2, 8, 5, 5), torch.zeros(12, 8 // groups, 3, 3)
    widths = (None if w is None else torch.tensor(w) for w in (in_width, out_width))
    with pytest.raises(ValueError, match=message):
        cpu.conv2d(x, weight, None, *widths, (1, 1), (1, 1), (1, 1), groups)


# The fused residual block


def plan(level: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    order = torch.sort(level, descending=True, stable=True).indices
    count = torch.tensor([int((level >= l).sum()) for l in range(levels)])
    return level.int(), order.int(), count.int()


class Block:
    """A random residual block: what `cpu.residual_block` and `reference.residual_block` take."""

    def __init__(self, channels, hidden, out, widths, kernels, strides, groups, preact, relu) -> None:
        self.widths, self.kernels, self.strides, self.groups, self.relu = widths, kernels, strides, groups, relu
        sizes = [channels, *[hidden] * (len(kernels) - 1), out]
        pairs = list(pairwise(sizes))
        self.weight = [
            torch.randn(o, i // g, k, k) / (i // g * k * k) ** 0.5
            for (i, o), k, g in zip(pairs, kernels, groups, strict=True)
        ]
        self.scale = [torch.randn(len(widths), o) for _, o in pairs]
        self.shift = [torch.randn(len(widths), o) for _, o in pairs]
        self.pre = (torch.randn(channels), torch.randn(channels)) if preact else (None, None)
        self.out, self.step = out, int(torch.tensor(strides).prod())

    def reference(self, x, level):
        return reference.residual_block(
            x,
            level,
            self.widths,
            self.weight,
            self.scale,
            self.shift,
            pre_scale=self.pre[0],
            pre_shift=self.pre[1],
            stride=self.strides,
            groups=self.groups,
            relu=self.relu,
        )

    def __call__(self, x, level, out=None):
        if out is None:
            size = [-(-s // self.step) for s in x.shape[2:]]
            out = torch.full((x.shape[0], self.out, *size), NAN).contiguous(memory_format=torch.channels_last)
        # A nested width never reaches the weights beyond it.
        packed = [cpu.pack_weight(w, g) for w, g in zip(self.weight, self.groups, strict=True)]
        cpu.residual_block(
            x,
            out,
            *plan(level, len(self.widths)),
            torch.tensor(self.widths, dtype=torch.int32),
            packed,
            self.scale,
            self.shift,
            *self.pre,
            self.kernels,
            self.strides,
            self.groups,
            self.relu,
        )
        return out


@st.composite
def blocks(draw):
    bottleneck = draw(st.booleans())
    kernels = [1, 3, 1] if bottleneck else draw(st.sampled_from([[3, 3], [3, 3], [5, 3]]))
    at = draw(st.integers(0, len(kernels) - 1))
    strides = [1] * len(kernels)
    strides[at] = draw(st.sampled_from([1, 1, 2, 3]))
    groups = [1] * len(kernels)
    step = 1
    if bottleneck and draw(st.booleans()):
        groups[1] = draw(st.sampled_from([2, 4]))
    step = draw(st.sampled_from([1, 4, 8, 10, 16])) if groups[-2] > 1 else 1
    count = groups[-2] if groups[-2] > 1 else draw(st.sampled_from([4, 8, 20, 32, 48, 56, 64, 80]))
    hidden = step * count
    middle = sorted(draw(st.lists(st.integers(0, count), max_size=3)))
    widths = [step * w for w in (*middle, count)]
    channels = draw(st.sampled_from([3, 8, 16, 20, 32, 64]))
    return {
        "args": (
            channels,
            hidden,
            channels + draw(st.sampled_from([0, 0, 5, 16])),
            widths,
            kernels,
            strides,
            groups,
            draw(st.booleans()),
            draw(st.booleans()),
        ),
        "size": (draw(st.integers(1, 18)), draw(st.integers(1, 18))),
        "level": draw(st.lists(st.integers(0, len(widths) - 1), min_size=0, max_size=7)),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 1000)),
    }


@isas
@settings(max_examples=80, deadline=None)
@given(case=blocks())
def test_residual_block_equals_the_reference(isa, case) -> None:
    cpu.set_isa(isa)
    torch.set_num_threads(case["threads"])
    torch.manual_seed(case["seed"])
    block = Block(*case["args"])
    level = torch.tensor(case["level"], dtype=torch.int64)
    x = torch.randn(len(level), case["args"][0], *case["size"]).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    expected = block.reference(x, level)
    y = block(x, level)
    assert torch.equal(x, before)
    close(y, expected)
    for n, l in enumerate(level):
        if block.widths[l] == 0:
            assert torch.equal(y[n], expected[n]), "a sample of width 0 is its shortcut, bit for bit"
    if y.shape == x.shape:
        assert torch.equal(block(x, level, out=x), y), "in place gives the same bits"


@isas
def test_inactive_weights_are_not_read(isa) -> None:
    cpu.set_isa(isa)
    block = Block(16, 48, 16, [0, 16, 27, 48], [3, 3], [1, 1], [1, 1], False, True)
    x = torch.randn(3, 16, 9, 9).contiguous(memory_format=torch.channels_last)
    level = torch.tensor([2, 1, 0])
    expected = block.reference(x, level)
    block.weight[0][27:] = NAN
    block.weight[1][:, 27:] = NAN
    for table in (*block.scale, *block.shift):
        table[3] = NAN
    close(block(x, level), expected)


@isas
@pytest.mark.parametrize("bottleneck", [False, True])
def test_residual_block_sample_does_not_depend_on_batch_mates_or_threads(isa, bottleneck) -> None:
    cpu.set_isa(isa)
    shape = ([1, 3, 1], [1, 1, 1], [1, 4, 1]) if bottleneck else ([3, 3], [1, 1], [1, 1])
    block = Block(64, 64, 64, [0, 16, 32, 64], *shape, True, False)
    x = torch.randn(6, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for mates in ([0, 0, 0, 0], [3, 3, 3, 3], [0, 2, 1, 3]):
            level = torch.tensor([2, mates[0], mates[1], 3, *mates[2:]])
            results.append(block(x, level)[[0, 3]])
            permuted = torch.tensor([5, 3, 1, 4, 0, 2])
            shuffled = x[permuted].contiguous(memory_format=torch.channels_last)
            results.append(block(shuffled, level[permuted])[[4, 1]])
    assert all(torch.equal(r, results[0]) for r in results)


@isas
def test_level_0_is_untouched_in_place(isa) -> None:
    cpu.set_isa(isa)
    block = Block(16, 16, 16, [0, 16], [3, 3], [1, 1], [1, 1], True, True)
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    x[1] = NAN  # even what no arithmetic preserves
    before = x.clone()
    block(x, torch.tensor([0, 0, 1, 0]), out=x)
    for n in (0, 1, 3):
        assert torch.equal(x[n].view(torch.int32), before[n].view(torch.int32))
    assert not torch.equal(x[2], before[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": [0, 2]}, r"level\[1\] is 2; it must be between 0 and 1"),
        ({"level": [-1, 0]}, r"level\[0\] is -1;"),
        ({"order": [0, 0]}, r"order\[1\] is 0; order must hold each of the 2 samples once"),
        ({"order": [2, 0]}, r"order\[0\] is 2;"),
        ({"order": [0]}, r"order is torch.int32 of shape \(1,\)"),
        ({"widths": [8, 4]}, r"widths\[1\] is 4; it must be at least widths\[0\], which is 8"),
        ({"widths": [0, 9]}, r"widths\[1\] is 9; it must be between 0 and the 8 channels"),
        (
            {"x": torch.zeros(2, 4, 5, 5)},
            r"weight\[0\] must be packed by .* for 4 -> 8 channels",
        ),
    ],
)
def test_residual_block_names_what_is_wrong(change, message) -> None:
    args = {"x": torch.zeros(2, 8, 5, 5), "level": [1, 0], "order": [0, 1], "widths": [0, 8], **change}
    level, order, widths = (torch.tensor(args[name], dtype=torch.int32) for name in ("level", "order", "widths"))
    weight = [cpu.pack_weight(torch.zeros(8, 8, 3, 3), 1)] * 2
    table = [torch.zeros(2, 8)] * 2
    x = args["x"]
    with pytest.raises(ValueError, match=message):
        cpu.residual_block(
            x, torch.empty_like(x), level, order, torch.zeros(2, dtype=torch.int32), widths, weight, table, table,
            None, None, [3, 3], [1, 1], [1, 1], False,
        )  # fmt: skip


def test_packed_floats_of_a_nested_width_are_a_prefix() -> None:
    weight = torch.randn(64, 32, 3, 3)
    whole = cpu.pack_weight(weight, 1).view(4, 32 * 9 * 16)
    part = cpu.pack_weight(weight[:32, :16], 1).view(2, 16 * 9 * 16)
    assert torch.equal(whole[:2, : part.shape[1]], part)


# The machine


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"isa must be one that this machine runs \(.*portable\), got 'mmx'"):
        cpu.set_isa("mmx")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_one_openmp_library_in_the_process() -> None:
    # In a process of its own: other tests import packages that bring OpenMP libraries for themselves.
    script = """
from pathlib import Path
import torch
import den_kernels as dk
x, weight = torch.randn(4, 16, 8, 8), torch.randn(16, 16, 3, 3)
dk.den_conv2d(x, weight, out_width=torch.full((4,), 8), backend="cpu")
torch.nn.functional.conv2d(x, weight)
print(Path("/proc/self/maps").read_text())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    libraries = set(re.findall(r"/\S*lib(?:gomp|omp|iomp5)[\w.-]*\.so\S*", done.stdout))
    assert len(libraries) <= 1, libraries
    assert "_cpu." in done.stdout


def test_rejects_what_it_does_not_take() -> None:
    assert cpu.rejects(torch.device("cpu"), torch.float32) is None
    assert "takes float32, got torch.bfloat16" in (cpu.rejects(torch.device("cpu"), torch.bfloat16) or "")
    assert "takes CPU tensors" in (cpu.rejects(torch.device("cuda", 0), torch.float32) or "")

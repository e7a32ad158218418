"""The fused residual block of the C++ kernels against `den_kernels.reference`: every instruction set of this machine,
poisoned inputs and outputs, batch mates that must not matter. N samples, C channels, L levels."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cpu_cases import NAN, dtypes, isas
from hypothesis import given, settings
from hypothesis import strategies as st

import den_kernels as dk
from den_kernels import reference
from den_kernels.backends import cpu

# Largest error over the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def close(actual, expected) -> None:
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= TOLERANCE[actual.dtype], f"error {error:.3g} of the largest value"


# The fused residual block


def plan(level: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    order = torch.sort(level, descending=True, stable=True).indices
    count = torch.tensor([int((level >= l).sum()) for l in range(levels)])
    return level.int(), order.int(), count.int()


class Block:
    """A random residual block: what `cpu.residual_block` and `reference.residual_block` take.

    winograd: outputs a side of the tiles of each convolution that can have tiles; the others are computed directly.
    """

    def __init__(
        self,
        channels,
        hidden,
        out,
        widths,
        kernels,
        strides,
        groups,
        preact,
        relu,
        winograd=(0, 0, 0),
        projected=False,
        dtype=torch.float32,
    ) -> None:
        self.widths, self.kernels, self.strides, self.groups, self.relu = widths, kernels, strides, groups, relu
        sizes = [channels, *[hidden] * (len(kernels) - 1), out]
        pairs = list(pairwise(sizes))
        self.weight = [
            (torch.randn(o, i // g, k, k) / (i // g * k * k) ** 0.5).to(dtype)
            for (i, o), k, g in zip(pairs, kernels, groups, strict=True)
        ]
        self.scale = [torch.randn(len(widths), o) for _, o in pairs]
        self.shift = [torch.randn(len(widths), o) for _, o in pairs]
        self.pre = (torch.randn(channels), torch.randn(channels)) if preact else (None, None)
        self.out, self.step = out, int(torch.tensor(strides).prod())
        self.projection = []
        if projected:
            weight = (torch.randn(out, channels, 1, 1) / channels**0.5).to(dtype)
            self.projection = [weight, torch.randn(len(widths), out), torch.randn(len(widths), out)]
        can = [
            k == 3 and s == 1 and (g == 1 or hidden // g % 32 == 0)
            for k, s, g in zip(kernels, strides, groups, strict=True)
        ]
        self.winograd = [tile if tiled else 0 for tile, tiled in zip(winograd, can, strict=False)]

    def reference(self, x, level):
        """In float64."""
        return reference.residual_block(
            x.double(),
            level,
            self.widths,
            [w.double() for w in self.weight],
            [s.double() for s in self.scale],
            [s.double() for s in self.shift],
            pre_scale=None if self.pre[0] is None else self.pre[0].double(),
            pre_shift=None if self.pre[1] is None else self.pre[1].double(),
            stride=self.strides,
            groups=self.groups,
            projection=[p.double() for p in self.projection],
            relu=self.relu,
        )

    def __call__(self, x, level, out=None):
        if out is None:
            size = [-(-s // self.step) for s in x.shape[2:]]
            out = torch.full((x.shape[0], self.out, *size), NAN, dtype=x.dtype)
            out = out.contiguous(memory_format=torch.channels_last)
        packed_projection = [cpu.pack_weight(p, 1) if p.dim() == 4 else p for p in self.projection]
        packed = [cpu.pack_weight(*form) for form in zip(self.weight, self.groups, self.winograd, strict=True)]
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
            packed_projection,
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
    step = draw(st.sampled_from([2, 4, 10, 16, 32, 64])) if groups[-2] > 1 else 1
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
            draw(st.lists(st.sampled_from([0, 2, 4]), min_size=len(kernels), max_size=len(kernels))),
            draw(st.booleans()),
        ),
        "size": (draw(st.integers(1, 18)), draw(st.integers(1, 18))),
        "level": draw(st.lists(st.integers(0, len(widths) - 1), min_size=0, max_size=7)),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 1000)),
    }


@isas
@dtypes
@settings(max_examples=80, deadline=None)
@given(case=blocks())
def test_residual_block_equals_the_reference(isa, dtype, case) -> None:
    cpu.set_isa(isa)
    torch.set_num_threads(case["threads"])
    torch.manual_seed(case["seed"])
    block = Block(*case["args"], dtype=dtype)
    level = torch.tensor(case["level"], dtype=torch.int64)
    x = torch.randn(len(level), case["args"][0], *case["size"]).to(dtype).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    expected = block.reference(x, level)
    y = block(x, level)
    assert torch.equal(x, before)
    close(y, expected)
    for n, l in enumerate(level):
        if block.widths[l] == 0 and block.step == 1 and not block.projection:
            assert torch.equal(y[n], expected[n].to(dtype)), "a sample of width 0 is its shortcut, bit for bit"
    if y.shape == x.shape:
        assert torch.equal(block(x, level, out=x), y), "in place gives the same bits"


tiles = pytest.mark.parametrize("tile", [0, 2, 4], ids=["direct", "winograd2", "winograd4"])


@isas
@dtypes
@tiles
def test_inactive_weights_are_not_read(isa, dtype, tile) -> None:
    cpu.set_isa(isa)
    tiled = [tile, tile]
    block = Block(16, 48, 16, [0, 16, 27, 48], [3, 3], [1, 1], [1, 1], False, True, tiled, dtype=dtype)
    x = torch.randn(3, 16, 9, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    level = torch.tensor([2, 1, 0])
    expected = block.reference(x, level)
    block.weight[0][27:] = NAN
    block.weight[1][:, 27:] = NAN
    for table in (*block.scale, *block.shift):
        table[3] = NAN
    close(block(x, level), expected)


KINDS = {
    "direct": ([3, 3], [1, 1], [1, 1], True, False),
    "bottleneck": ([1, 3, 1], [1, 1, 1], [1, 4, 1], True, False),
    "winograd": ([3, 3], [1, 1], [1, 1], True, False, [4, 2]),
    "paths": ([1, 3, 1], [1, 1, 1], [1, 2, 1], True, False, [0, 4, 0]),
    "mixed": ([1, 3, 1], [1, 1, 1], [1, 1, 1], True, False, [0, 4, 0]),
    "projected": ([1, 3, 1], [1, 2, 1], [1, 1, 1], False, True, [0, 0, 0], True),
}


@isas
@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_residual_block_sample_does_not_depend_on_batch_mates_or_threads(isa, dtype, kind) -> None:
    cpu.set_isa(isa)
    widths = [0, 32, 32, 64] if kind == "paths" else [0, 16, 32, 64]
    block = Block(64, 64, 64, widths, *KINDS[kind], dtype=dtype)
    # Maps of 7 x 9 leave ragged tiles, and few enough of them that samples share a team.
    x = torch.randn(6, 64, 7, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for mates in ([0, 0, 0, 0], [3, 3, 3, 3], [0, 2, 1, 3]):
            level = torch.tensor([2, mates[0], mates[1], 3, *mates[2:]])
            results.append(block(x, level)[[0, 3]])
            assert torch.equal(block(x, level), block(x, level)), "repeats to the bit"
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
            None, None, [3, 3], [1, 1], [1, 1], [], False,
        )  # fmt: skip


def test_packed_weights_of_a_nested_width_are_a_prefix() -> None:
    weight = torch.randn(64, 32, 3, 3)
    whole = cpu.pack_weight(weight, 1).view(4, 32 * 9 * 16)
    part = cpu.pack_weight(weight[:32, :16], 1).view(2, 16 * 9 * 16)
    assert torch.equal(whole[:2, : part.shape[1]], part)


def test_winograd_weights_of_a_nested_width_are_a_prefix() -> None:
    weight = torch.randn(64, 32, 3, 3)
    for tile, points in ((2, 16), (4, 36)):
        whole = cpu.pack_weight(weight, 1, tile).view(2, points, 32, 32)
        part = cpu.pack_weight(weight[:32, :16], 1, tile).view(1, points, 16, 32)
        assert torch.equal(whole[:1, :, :16], part)


# A map of 8 x 8 is four tiles of 4 x 4 outputs.
@pytest.mark.parametrize(
    ("channels", "samples", "tile"),
    [(64, 2, 2), (64, 3, 4), (32, 1, 4), (256, 3, 2), (256, 4, 4), (512, 1, 2), (512, 4, 4)],
)
def test_batches_of_few_tiles_read_smaller_weights(channels, samples, tile) -> None:
    weight = torch.randn(channels, channels, 3, 3)
    ones = torch.ones(1, 1, channels)
    block = dk.FusedResidualBlock(
        [weight] * 2, [ones] * 2, [ones] * 2, [channels], strides=[1, 1], relu=True, backend="cpu"
    )
    batch_class = block.batch_class((samples, channels, 8, 8))
    packed = block.arguments(0, batch_class).weight[0]
    assert torch.equal(packed, cpu.pack_weight(weight, 1, tile))


def test_two_tiles_of_many_channels_are_computed_directly() -> None:
    weight = torch.randn(512, 256, 3, 3)
    forms = cpu.pack_weights(weight, 1, 1, True)
    assert torch.equal(forms[len(cpu.TILE_BOUNDS)], cpu.pack_weight(weight, 1))
    assert torch.equal(forms[0], cpu.pack_weight(weight, 1, 4))


@pytest.mark.parametrize(("tile", "bound"), [(2, 2e-6), (4, 2e-5)])
def test_winograd_error_stays_near_that_of_float32(tile, bound) -> None:
    torch.manual_seed(0)
    block = Block(256, 256, 256, [256], [3, 3], [1, 1], [1, 1], False, True, [tile, tile])
    x = torch.randn(2, 256, 8, 8).contiguous(memory_format=torch.channels_last)
    level = torch.zeros(2, dtype=torch.int64)
    expected = block.reference(x, level)
    error = (block(x, level).double() - expected).abs().max() / expected.abs().max()
    assert error < bound


def test_bfloat16_groups_of_odd_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="3 input channels a group in bfloat16"):
        cpu.pack_weight(torch.zeros(6, 3, 3, 3, dtype=torch.bfloat16), 2)


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
    device = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert cpu.rejects(device, dtype) is None
    assert "takes float32 and bfloat16, got torch.float16" in cpu.rejects(device, torch.float16)
    assert "takes CPU tensors" in cpu.rejects(torch.device("cuda", 0), torch.float32)

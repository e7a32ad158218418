"""The fused convolution, packed weight and norm by level, on every backend and instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import den_kernels as dk
from den_kernels.backends import cpu

BACKENDS = [name for name in dk.available_backends() if name != "triton"]
ISAS = cpu.supported_isas() if cpu.unavailable() is None else []
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2}
NAN = float("nan")


@pytest.fixture(autouse=True)
def _as_before():
    """Instruction set and threads as they were."""
    threads, isa = torch.get_num_threads(), ISAS and cpu.set_isa(ISAS[0])
    yield
    torch.set_num_threads(threads)
    if isa:
        cpu.set_isa(isa)


@st.composite
def convolutions(draw, image: bool = False) -> dict:
    """A convolution of any kind, with a level for each sample. image: of the few channels of an image."""
    groups, levels = 1 if image else draw(st.sampled_from((1, 1, 1, 2, 4))), draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, most // groups)) for most in (5 if image else 70, 70))
    if not image:  # of whole blocks tiles are read without a copy
        inputs = draw(st.sampled_from((inputs, 16 * groups)))

    def ascending(most: int) -> list[int]:
        return sorted(draw(st.lists(st.integers(1, most), min_size=levels, max_size=levels)))

    if groups == 1:
        read, made = ascending(inputs), ascending(outputs)
    else:
        active = ascending(groups)
        read, made = ([a * channels // groups for a in active] for channels in (inputs, outputs))
    elastic = draw(st.sampled_from(("in", "out", "both", "neither")))
    n = draw(st.integers(0, 7))
    return {
        "shape": (n, inputs, draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        "outputs": outputs,
        "kernel": draw(st.sampled_from((3, 5, 7) if image else (1, 3, 3, 5))),
        "in_widths": read if elastic in ("in", "both") and (groups == 1 or elastic == "both") else None,
        "out_widths": made if elastic in ("out", "both") else None,
        "stride": draw(st.sampled_from((1, 1, 2, 3))),
        "groups": groups,
        "relu": draw(st.booleans()),
        "winograd": draw(st.booleans()),
        "level": draw(st.lists(st.integers(0, levels - 1), min_size=n, max_size=n)),
        "levels": levels,
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**16)),
    }


def build(case: dict, dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, dk.FusedConv2d, dict]:
    """Input with NaN beyond each sample's width, the module of two sets, and what the specification takes for set 1."""
    g = torch.Generator().manual_seed(case["seed"])
    n, inputs, *_ = case["shape"]
    fan = inputs // case["groups"] * case["kernel"] ** 2
    x = torch.randn(case["shape"], generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(case["outputs"], inputs // case["groups"], case["kernel"], case["kernel"], generator=g)
    weight = (weight / fan**0.5).to(dtype)
    scale, shift = (torch.randn(2, case["levels"], case["outputs"], generator=g) for _ in range(2))
    form = {name: case[name] for name in ("in_widths", "out_widths", "stride", "groups", "relu")}
    conv = dk.FusedConv2d(weight, scale, shift, **form, winograd=case["winograd"], backend=backend)
    if form["in_widths"]:
        for i in range(n):
            x[i, form["in_widths"][case["level"][i]] :] = NAN
    return x, conv, {"weight": weight.double(), "scale": scale[1].double(), "shift": shift[1].double(), **form}


def run(conv: dk.FusedConv2d, x: torch.Tensor, level: torch.Tensor, **options) -> torch.Tensor:
    plan = dk.plan_levels(level.view(-1, 1), conv.scale.shape[1])
    return conv(x, *plan.block(0)[:2], set_index=1, **options)


def check_equals_the_reference(case: dict, dtype: torch.dtype, backend: str) -> None:
    torch.set_num_threads(case["threads"])
    x, conv, arguments = build(case, dtype, backend)
    level = torch.tensor(case["level"], dtype=torch.int64)
    y = run(conv, x, level)
    expected = dk.reference.fused_conv2d(x.double(), level, **arguments)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert not y.isnan().any(), "channels beyond the input width were read"
    if not len(level):
        return
    error = (y.double() - expected).abs().max() / max(1, float(expected.abs().max()))
    assert error <= TOLERANCE[dtype], f"error {error:.3g}"
    for i, l in enumerate(level.tolist() if case["out_widths"] else ()):
        assert not y[i, case["out_widths"][l] :].any(), "a channel beyond the output width is not 0"


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(case=convolutions())
def test_equals_the_reference(backend: str, case: dict) -> None:
    check_equals_the_reference(case, torch.float32, backend)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@settings(max_examples=60, deadline=None)
@given(case=convolutions())
def test_every_instruction_set_equals_the_reference(isa: str, dtype: torch.dtype, case: dict) -> None:
    if dtype == torch.bfloat16 and case["groups"] > 1 and case["shape"][1] // case["groups"] % 2:
        case = {**case, "groups": 1}  # bfloat16 is multiplied in pairs of channels: odd groups are refused
    cpu.set_isa(isa)
    check_equals_the_reference(case, dtype, "cpu")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@settings(max_examples=40, deadline=None)
@given(case=convolutions(image=True))
def test_a_first_convolution_equals_the_reference(isa: str, dtype: torch.dtype, case: dict) -> None:
    cpu.set_isa(isa)
    check_equals_the_reference(case, dtype, "cpu")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@settings(max_examples=30, deadline=None)
@given(case=convolutions(), data=st.data())
def test_a_sample_does_not_depend_on_its_batch_mates(backend: str, case: dict, data) -> None:
    x, conv, _ = build(case, torch.float32, backend)
    n, level = len(x), torch.tensor(case["level"], dtype=torch.int64)
    if n == 0:
        return
    y = run(conv, x, level)
    kept, place = (data.draw(st.integers(0, n - 1)) for _ in range(2))
    other = torch.randn_like(x)
    other_level = torch.tensor(data.draw(st.lists(st.integers(0, case["levels"] - 1), min_size=n, max_size=n)))
    other[place], other_level[place] = x[kept], level[kept]
    if backend == "cpu":
        torch.set_num_threads(data.draw(st.integers(1, 3)))
    assert torch.equal(run(conv, other, other_level)[place], y[kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_stride_at_the_call(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 3, 3, 3, generator=g), torch.randn(2, 3, 11, 11, generator=g)
    tables = torch.randn(2, 1, 2, 8, generator=g)
    conv = dk.FusedConv2d(weight, *tables, out_widths=(4, 8), backend=backend)
    level = torch.tensor([1, 0], dtype=torch.int32)
    y = conv(x, level, torch.tensor([0, 1], dtype=torch.int32), stride=3)
    expected = dk.reference.fused_conv2d(x, level, weight, *tables[:, 0], out_widths=(4, 8), stride=3)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    tables = torch.randn(2, 1, 2, 12, generator=g)
    conv = dk.FusedConv2d(torch.randn(12, 8, 3, 3, generator=g), *tables, in_widths=(4, 8), backend=backend)
    x = torch.randn(3, 8, 6, 6, generator=g).contiguous(memory_format=torch.channels_last)
    plan = (torch.tensor(values, dtype=torch.int32) for values in ([1, 0, 1], [0, 2, 1]))
    (weight,) = set(conv.packed().values()) if backend != "cpu" else (next(iter(conv.packed().values())),)
    arguments = (conv.in_widths, conv.out_widths, weight, conv.scale[0], conv.shift[0], 3, 1, 1, True, backend)
    torch.library.opcheck(torch.ops.den_kernels.fused_conv2d.default, (x, *plan, *arguments))


def test_flops_follow_the_levels() -> None:
    conv = dk.FusedConv2d(torch.ones(12, 8, 3, 3), *torch.ones(2, 1, 2, 12), in_widths=(4, 8), out_widths=(6, 12))
    x = torch.randn(3, 8, 5, 5)
    order = torch.arange(3, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        conv(x, torch.tensor([1, 0, 0], dtype=torch.int32), order)
    assert counter.get_total_flops() == 2 * 25 * 9 * (8 * 12 + 2 * 4 * 6)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no extension")
def test_gathered_weights_give_the_same_bits() -> None:
    g = torch.Generator().manual_seed(0)
    convs = [
        dk.FusedConv2d(torch.randn(24, 24, k, k, generator=g), *torch.randn(2, 1, 1, 24, generator=g), backend="cpu")
        for k in (3, 1, 3)
    ]
    x = torch.randn(4, 24, 9, 9, generator=g).contiguous(memory_format=torch.channels_last)
    level, order = torch.zeros(4, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    before = [conv(x, level, order) for conv in convs]
    dk.gather_weights(convs)
    for conv, y in zip(convs, before, strict=True):
        assert torch.equal(conv(x, level, order), y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(8, 4, 2, 2)}, r"weight has shape \(8, 4, 2, 2\); it must be \[O, I / groups, k, k\]"),
        ({"scale": torch.ones(1, 2, 7)}, r"scale has shape \(1, 2, 7\); it must be \[sets, levels, 8\]"),
        ({"shift": torch.ones(2, 2, 8)}, r"shift has shape \(2, 2, 8\)"),
        ({"in_widths": (4,)}, "in_widths has 1 levels; scale has 2"),
        ({"in_widths": (0, 4)}, r"in_widths is \(0, 4\); it must ascend from above 0 to at most 4"),
        ({"out_widths": (4, 9)}, r"out_widths is \(4, 9\); it must ascend from above 0 to at most 8"),
        (
            {"weight": torch.ones(8, 2, 3, 3), "groups": 2, "in_widths": (2, 4)},
            "with groups=2 a level must read every group that it makes",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"weight": torch.ones(8, 4, 3, 3), "scale": torch.ones(1, 2, 8), "shift": torch.ones(1, 2, 8), **change}
    with pytest.raises(ValueError, match=message):
        dk.FusedConv2d(**arguments, backend="grouped")


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no extension")
def test_bad_levels_are_named_by_the_extension() -> None:
    conv = dk.FusedConv2d(torch.ones(8, 4, 3, 3), *torch.ones(2, 1, 2, 8), backend="cpu")
    x, order = torch.ones(2, 4, 5, 5), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"level\[1\] is 2; it must be between 0 and 1"):
        conv(x, torch.tensor([0, 2], dtype=torch.int32), order)
    with pytest.raises(ValueError, match=r"order\[1\] is 0"):
        conv(x, torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"level is torch.int64 of shape \(2,\)"):
        conv(x, torch.tensor([0, 1]), order)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_of_one_pixel_does_not_depend_on_its_batch(dtype, stride) -> None:
    """Samples of a level are multiplied together there: to the bit what each gives alone, and near the reference."""
    torch.manual_seed(0)
    tables = torch.rand(1, 3, 96), torch.randn(1, 3, 96)
    form = {"in_widths": (16, 40, 80), "out_widths": (20, 48, 96), "relu": True, "stride": stride}
    weight, x = torch.randn(96, 80, 1, 1).to(dtype), torch.randn(9, 80, 1, 1).to(dtype)
    level, order, _ = dk.plan_levels(torch.arange(9)[:, None] * 5 % 3, 3).block(0)
    conv = dk.FusedConv2d(weight, *tables, **form, backend="cpu")
    y = conv(x, level, order)
    for n in range(9):
        assert torch.equal(conv(x[n : n + 1], level[n : n + 1], torch.zeros(1, dtype=torch.int32))[0], y[n])
    wanted = dk.FusedConv2d(weight.double(), *tables, **form, backend="reference")(x.double(), level, order)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=tolerance * wanted.abs().max().item())
    with pytest.raises(ValueError, match=r"level\[1\] is 3"):
        conv(x, torch.tensor([0, 3, *[0] * 7], dtype=torch.int32), order)
    with pytest.raises(ValueError, match="each of the 9 samples once"):
        conv(x, level, torch.zeros_like(order))

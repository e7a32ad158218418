"""The fused residual block on every backend of this machine against the specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import den_kernels as dk

BACKENDS = [name for name in dk.available_backends() if name not in ("reference", "triton")]


@st.composite
def blocks(draw) -> dict:
    """A residual block of any kind with a level for each sample."""
    bottleneck = draw(st.booleans())
    groups = draw(st.sampled_from((1, 1, 2, 4)))
    hidden = groups * draw(st.integers(1, 10))
    channels = draw(st.integers(1, 20))
    stride = draw(st.sampled_from((1, 1, 2, 3)))
    step = hidden // groups
    inner = sorted(draw(st.lists(st.integers(0, groups if groups > 1 else hidden), min_size=1, max_size=3)))
    widths = [w * (step if groups > 1 else 1) for w in inner] + [hidden]
    n = draw(st.integers(1, 7))
    return {
        "shape": (n, channels, draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        "hidden": hidden,
        "outputs": channels + draw(st.sampled_from((0, 0, 3, channels))),
        "kernel": (1, 3, 1) if bottleneck else draw(st.sampled_from(((3, 3), (1, 3), (5, 3)))),
        "strides": ([1, stride, 1] if bottleneck else [stride, 1]),
        "groups": [1, groups, 1] if bottleneck else [1, 1],
        "widths": widths,
        "level": draw(st.lists(st.integers(0, len(widths) - 1), min_size=n, max_size=n)),
        "preactivation": draw(st.booleans()),
        "projection": draw(st.booleans()),
        "sets": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 2**16)),
    }


def build(case: dict, backend: str) -> tuple[torch.Tensor, dk.FusedResidualBlock, dict]:
    """Input (float64), fused block, and the arguments of the specification for set 0."""
    g = torch.Generator().manual_seed(case["seed"])
    channels, hidden, outputs = case["shape"][1], case["hidden"], case["outputs"]
    sizes = [channels, *[hidden] * (len(case["kernel"]) - 1), outputs]
    levels = len(case["widths"])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    weight, scale, shift = [], [], []
    for i, k in enumerate(case["kernel"]):
        fan = sizes[i] // case["groups"][i]
        weight.append(normal(sizes[i + 1], fan, k, k) / (fan * k * k) ** 0.5)
        scale.append(normal(case["sets"], levels, sizes[i + 1]))
        shift.append(normal(case["sets"], levels, sizes[i + 1]))
    pre = [normal(case["sets"], channels) if case["preactivation"] else None for _ in range(2)]
    projection = ()
    if case.get("projection"):
        kernel = normal(outputs, channels, 1, 1) / channels**0.5
        projection = kernel, normal(case["sets"], levels, outputs), normal(case["sets"], levels, outputs)
    x = normal(*case["shape"])

    def single(values):
        return [None if v is None else v.float() for v in values]

    block = dk.FusedResidualBlock(
        single(weight),
        single(scale),
        single(shift),
        case["widths"],
        strides=case["strides"],
        groups=case["groups"],
        pre_scale=single(pre)[0],
        pre_shift=single(pre)[1],
        projection=tuple(single(projection)) or None,
        relu=not case["preactivation"],
        backend=backend,
    )
    arguments = {
        "widths": case["widths"],
        "weight": weight,
        "scale": [s[-1] for s in scale],
        "shift": [s[-1] for s in shift],
        "pre_scale": None if pre[0] is None else pre[0][-1],
        "pre_shift": None if pre[1] is None else pre[1][-1],
        "stride": case["strides"],
        "groups": case["groups"],
        "projection": [projection[0], projection[1][-1], projection[2][-1]] if projection else [],
        "relu": not case["preactivation"],
    }
    return x, block, arguments


def run(block: dk.FusedResidualBlock, x: torch.Tensor, level: torch.Tensor, **options) -> torch.Tensor:
    plan = dk.plan_levels(level.view(-1, 1), len(block.widths))
    x = x.float().contiguous(memory_format=torch.channels_last)
    return block(x, *plan.block(0), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=blocks())
@settings(max_examples=60, deadline=None)
def test_block_equals_reference(backend: str, case: dict) -> None:
    x, block, arguments = build(case, backend)
    level = torch.tensor(case["level"])
    expected = dk.reference.residual_block(x, level, **arguments)
    y = run(block, x, level, set_index=case["sets"] - 1)
    assert y.shape == expected.shape
    error = (y.double() - expected).abs().max()
    assert error <= 3e-5 * max(1, float(expected.abs().max())), f"error {error:.3g}"
    skipped = torch.tensor(case["widths"])[level] == 0
    if case["projection"]:
        return
    shortcut = dk.reference.shortcut(x.float(), case["outputs"], max(case["strides"]))
    if max(case["strides"]) == 1:
        assert torch.equal(y[skipped], shortcut[skipped]), "a sample of width 0 is not bitwise its shortcut"
    else:
        torch.testing.assert_close(y[skipped], shortcut[skipped])


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=blocks(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_sample_is_independent_of_its_batch_mates(backend: str, case: dict, data) -> None:
    x, block, _ = build(case, backend)
    n, level = len(x), torch.tensor(case["level"])
    y = run(block, x, level)
    kept = data.draw(st.integers(0, n - 1))
    place = data.draw(st.integers(0, n - 1))
    other = torch.randn_like(x)
    other_level = torch.tensor(data.draw(st.lists(st.integers(0, len(block.widths) - 1), min_size=n, max_size=n)))
    other[place], other_level[place] = x[kept], level[kept]
    assert torch.equal(run(block, other, other_level)[place], y[kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_equals_out_of_place(backend: str) -> None:
    case = {
        "shape": (6, 16, 7, 9),
        "hidden": 16,
        "outputs": 16,
        "kernel": (3, 3),
        "strides": [1, 1],
        "groups": [1, 1],
        "widths": [0, 4, 8, 16],
        "preactivation": True,
        "sets": 1,
        "seed": 5,
    }
    x, block, _ = build(case, backend)
    level = torch.tensor([3, 0, 2, 1, 0, 3])
    y = run(block, x, level)
    single = x.float().contiguous(memory_format=torch.channels_last)
    plan = dk.plan_levels(level.view(-1, 1), 4)
    result = block(single, *plan.block(0), inplace=True)
    assert result is single
    assert torch.equal(single, y)
    assert torch.equal(single[level == 0], x.float()[level == 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    weights = [torch.zeros(8, 4, 3, 3), torch.zeros(6, 8, 3, 3)]
    tables = [torch.ones(1, 2, 8), torch.ones(1, 2, 6)]
    block = dk.FusedResidualBlock(weights, tables, tables, (0, 8), strides=(2, 1), backend=backend)
    y = run(block, torch.zeros(0, 4, 7, 7), torch.zeros(0, dtype=torch.int64))
    assert y.shape == (0, 6, 4, 4)


W1, W2 = torch.zeros(8, 4, 3, 3), torch.zeros(4, 8, 3, 3)
T1, T2 = torch.zeros(1, 2, 8), torch.zeros(1, 2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (4, 2)}, "widths is"),
        ({"widths": (0, 9)}, "widths is"),
        ({"weights": [W1]}, "weights has 1 convolutions"),
        ({"weights": [W1, torch.zeros(4, 7, 3, 3)]}, r"weights\[1\] reads 7 channels"),
        ({"weights": [torch.zeros(8, 4, 2, 2), W2]}, "k odd"),
        ({"scales": [T1, T1]}, r"scales\[1\] has shape"),
        ({"strides": (1,)}, "strides has 1 entries"),
        ({"pre_scale": torch.zeros(1, 4)}, "go together"),
        ({"projection": (W1[:4], T2, T2)}, "projection has shapes"),
    ],
    ids=str,
)
def test_bad_blocks_are_named(changes: dict, message: str) -> None:
    arguments = {
        "weights": [W1, W2],
        "scales": [T1, T2],
        "shifts": [T1, T2],
        "widths": (0, 8),
        "strides": (1, 1),
        "backend": "reference",
    }
    with pytest.raises(ValueError, match=message):
        dk.FusedResidualBlock(**{**arguments, **changes})

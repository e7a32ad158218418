"""The table of shapes and level mixes: what it says is what it gives."""

from __future__ import annotations

import math

import pytest
import torch

import den
import den_kernels as dk
from benchmarks import cases
from den.flops import block_macs, fixed_macs

MIXES = list(cases.MIXES.values())


def mean_cost(mix: cases.Mix, batch: int, blocks: int) -> float:
    return torch.tensor(cases.RATIOS)[mix.levels(batch, blocks)].mean().item()


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
@pytest.mark.parametrize("batch", cases.BATCHES)
def test_mix_meets_its_shares(mix: cases.Mix, batch: int) -> None:
    level_NB = mix.levels(batch, 15)
    assert level_NB.shape == (batch, 15)
    assert level_NB.dtype == torch.int64
    share = torch.bincount(level_NB.flatten(), minlength=4).double() / level_NB.numel()
    wanted = torch.tensor(mix.probabilities(), dtype=torch.float64)
    assert wanted.sum().item() == pytest.approx(1)
    assert (share - wanted).abs().max() <= 1 / level_NB.numel()
    assert torch.equal(level_NB, mix.levels(batch, 15))


def test_mean_costs() -> None:
    costs = {mix.name: mean_cost(mix, 64, 15) for mix in MIXES}
    expected = {
        "full": 1,
        "uniform": 0.4375,
        "paper": 0.53,
        "skip": 0,
        "top1-of-4": 0.25,
        "level2": 0.5,
        "level1": 0.25,
    }
    assert costs == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("costs", [(0.0, 0.5, 1.0), (0.25, 0.5, 1.0), (0.5, 1.0)], ids=str)
def test_paper_mix_fits_other_ratios(costs: tuple[float, ...]) -> None:
    p = cases.PAPER.probabilities(costs)
    assert sum(p) == pytest.approx(1)
    assert sum(a * c for a, c in zip(p, costs, strict=True)) == pytest.approx(0.53)
    assert min(p) > 0


def test_impossible_mixes_are_named() -> None:
    with pytest.raises(ValueError, match=r"mean is 0\.53; it must lie between 0\.75 and 1"):
        cases.PAPER.probabilities((0.75, 1))
    with pytest.raises(ValueError, match=r"mix 'top1-of-4' takes ratios \(0\.0, 1\.0\), but ratios is \(0\.25, 0\.5\)"):
        cases.TOP1.probabilities((0.25, 0.5))


@pytest.mark.parametrize("case", cases.MODELS, ids=lambda case: case.name)
@pytest.mark.parametrize("mix", ["full", "uniform", "paper"])
def test_network_flop_ratios(case: cases.ModelCase, mix: str) -> None:
    with torch.device("meta"):  # shapes alone
        model = den.create_model(case.name, tasks=cases.TASK, ratios=case.ratios)
    level_NB = cases.MIXES[mix].levels(64, model.num_blocks, case.ratios)
    full = den.flops(model, [model.num_levels - 1] * model.num_blocks, case.image_size)
    cost = den.flops(model, level_NB, case.image_size).double().mean()
    macs_L = block_macs(model, case.image_size).sum(0).double()
    shares_L = torch.tensor(cases.MIXES[mix].probabilities(case.ratios), dtype=torch.float64)
    mean = 2 * (fixed_macs(model, case.image_size) + (macs_L * shares_L).sum())
    # Blocks with strides cost less than others: a random mix meets the mean within a few percent.
    assert (full / cost).item() == pytest.approx((full / mean).item(), rel=0.03)
    if case.name != "resnet_50":  # whose inner convolutions lose channels on both sides, and whose projections stay
        mean_ratio = {"full": 1.0, "uniform": math.fsum(case.ratios) / len(case.ratios), "paper": 0.53}[mix]
        assert (full / cost).item() == pytest.approx(1 / mean_ratio, rel=0.03)


@pytest.mark.parametrize("case", cases.BLOCKS, ids=lambda case: case.name)
def test_block_case_counts_what_torch_counts(case: cases.BlockCase) -> None:
    macs = case.macs()
    assert macs[0] == 0
    assert sorted(macs) == list(macs)
    size, total = case.size, 0
    x = torch.empty(1, case.channels[0], size, size, device="meta")
    for shape, kernel, stride, groups in zip(case.weight_shapes, case.kernels, case.strides, case.groups, strict=True):
        weight = torch.empty(shape, device="meta")
        x = torch.nn.functional.conv2d(x, weight, None, stride, kernel // 2, 1, groups)
        total += math.prod(shape[1:]) * x.numel()
    assert macs[-1] == total


@pytest.mark.parametrize("case", cases.BLOCKS, ids=lambda case: case.name)
def test_block_cases_build(case: cases.BlockCase) -> None:
    weights = [torch.zeros(shape) for shape in case.weight_shapes]
    tables = [torch.zeros(1, len(cases.RATIOS), shape[0]) for shape in case.weight_shapes]
    pre = torch.zeros(1, case.channels[0]) if case.preactivation else None
    block = dk.FusedResidualBlock(
        weights,
        tables,
        tables,
        case.widths,
        strides=case.strides,
        groups=case.groups,
        pre_scale=pre,
        pre_shift=pre,
        relu=not case.preactivation,
        backend="reference",
    )
    x = torch.randn(2, case.channels[0], case.size, case.size).contiguous(memory_format=torch.channels_last)
    y = block(x, *dk.plan_levels(torch.zeros(2, 1, dtype=torch.int64), len(cases.RATIOS)).block(0))
    assert torch.equal(y, dk.reference.shortcut(x, case.channels[2], math.prod(case.strides)))

"""The fused residual block by itself, against the same convolutions with folded norms in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import den_kernels as dk
from benchmarks import cases
from benchmarks.engines import CLOCK, InProcess, assert_close, need_backend, take_turns
from benchmarks.table import Row, Time

BUDGET_S = {1: 0.3, 8: 0.4, 64: 1.0, 256: 4.0}
CHECKED = 4


class Weights:
    """Random weights of a block, with norms that differ by level."""

    def __init__(self, case: cases.BlockCase):
        torch.manual_seed(0)
        levels = len(cases.RATIOS)
        self.weight = [torch.randn(shape) * (shape[1] * shape[2] * shape[3]) ** -0.5 for shape in case.weight_shapes]
        self.scale = [torch.rand(levels, shape[0]) + 0.5 for shape in case.weight_shapes]
        self.shift = [torch.randn(levels, shape[0]) * 0.1 for shape in case.weight_shapes]
        self.pre_scale = self.pre_shift = None
        if case.preactivation:
            self.pre_scale = torch.rand(case.channels[0]) + 0.5
            self.pre_shift = torch.randn(case.channels[0]) * 0.1


def fused(case: cases.BlockCase, w: Weights, backend: str) -> dk.FusedResidualBlock:
    """The block under test; asserts that it runs on the backend that was asked for."""
    block = dk.FusedResidualBlock(
        w.weight,
        [scale[None] for scale in w.scale],
        [shift[None] for shift in w.shift],
        case.widths,
        strides=case.strides,
        groups=case.groups,
        pre_scale=None if w.pre_scale is None else w.pre_scale[None],
        pre_shift=None if w.pre_shift is None else w.pre_shift[None],
        relu=not case.preactivation,
        backend=backend,
    )
    assert block.backend == backend
    return block


def dense_engine(case: cases.BlockCase, w: Weights, x: Tensor, clock: str) -> InProcess:
    """The top level in plain PyTorch, channels_last, the norms folded into the convolutions."""
    folded = [
        (weight * scale[-1].view(-1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
        for weight, scale in zip(w.weight, w.scale, strict=True)
    ]
    last = len(folded) - 1
    step = 1
    for stride in case.strides:
        step *= stride

    def run() -> Tensor:
        h = x
        if w.pre_scale is not None and w.pre_shift is not None:
            h = F.relu_(torch.addcmul(w.pre_shift.view(1, -1, 1, 1), x, w.pre_scale.view(1, -1, 1, 1)))
        for i, weight in enumerate(folded):
            padding = case.kernels[i] // 2
            h = F.conv2d(h, weight, w.shift[i][-1], case.strides[i], padding, 1, case.groups[i])
            h = F.relu_(h) if i < last else h
        h = h.add_(dk.reference.shortcut(x, case.channels[2], step))
        return h if case.preactivation else F.relu_(h)

    return InProcess("torch eager", run, dense=True, clock=clock)


def reference(case: cases.BlockCase, w: Weights, x: Tensor, level: Tensor) -> Tensor:
    """The specification in float64."""
    return dk.reference.residual_block(
        x.double(),
        level,
        case.widths,
        [t.double() for t in w.weight],
        [t.double() for t in w.scale],
        [t.double() for t in w.shift],
        pre_scale=None if w.pre_scale is None else w.pre_scale.double(),
        pre_shift=None if w.pre_shift is None else w.pre_shift.double(),
        stride=case.strides,
        groups=case.groups,
        relu=not case.preactivation,
    )


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("mix", ["full", "uniform", "level2"])
@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("case", cases.BLOCKS, ids=lambda case: case.name)
def test_block(benchmark, rows, clock: str, case: cases.BlockCase, backend: str, batch: int, mix: str) -> None:
    need_backend(backend)
    w = Weights(case)
    x = torch.randn(batch, case.channels[0], case.size, case.size).contiguous(memory_format=torch.channels_last)
    level = cases.MIXES[mix].levels(batch, 1)
    if batch == 1 and mix == "uniform":
        pytest.skip("one sample has one level, not a mix")
    top = torch.full((batch,), len(cases.RATIOS) - 1)
    plan = dk.plan_levels(level, len(cases.RATIOS)).block(0)

    def elastic_engine(name: str) -> InProcess:
        block = fused(case, w, name)
        return InProcess(f"den[{name}]", lambda: block(x, *plan), clock=clock)

    elastic = [elastic_engine(backend), elastic_engine("grouped")]
    dense = dense_engine(case, w, x, clock)

    some = slice(0, None, max(1, batch // CHECKED))
    tolerance = cases.TOLERANCE[x.dtype]
    expected = reference(case, w, x[some], level[some, 0])
    for engine in elastic:
        assert_close(engine.name, engine.result()[some], expected, tolerance)
    assert_close(dense.name, dense.result()[some], reference(case, w, x[some], top[some]), tolerance)

    measured = take_turns(benchmark, [*elastic, dense], BUDGET_S[batch])
    if measured:
        macs = torch.tensor(case.macs(), dtype=torch.float64)
        ratio = (macs[-1] / macs[level[:, 0]].mean()).item()
        times = {name: Time.of(seconds) for name, seconds in measured.seconds.items()}
        rows.append(
            Row(
                "block",
                case.name,
                elastic[0].name,
                "float32",
                batch,
                mix,
                ratio,
                times,
                [dense.name],
                measured.disturbance,
                measured.thread_speedup,
            )
        )

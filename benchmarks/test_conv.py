"""The primitive by itself, against PyTorch's convolution of the full shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import den_kernels as dk
from benchmarks import cases
from benchmarks.engines import CLOCK, InProcess, assert_close, need_backend, take_turns
from benchmarks.table import Row, Time

BUDGET_S = {1: 0.2, 8: 0.3, 64: 0.7, 256: 3.0}
CHECKED = 4


def widths(case: cases.ConvCase, level: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """in_width and out_width [N] of each sample's level, and each sample's share of the full work."""
    ratio = torch.tensor(cases.RATIOS, dtype=torch.float64)[level]
    inside = (ratio * case.in_channels).long() if case.elastic in ("in", "both") else None
    outside = (ratio * case.out_channels).long() if case.elastic in ("out", "both") else None
    share = ratio * ratio if case.elastic == "both" and case.groups == 1 else ratio
    return inside, outside, share


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("mix", ["full", "uniform"])
@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("case", cases.CONVS, ids=lambda case: case.name)
def test_conv(benchmark, rows, clock: str, case: cases.ConvCase, backend: str, batch: int, mix: str) -> None:
    need_backend(backend)
    if batch == 1 and mix == "uniform":
        pytest.skip("one sample has one level, not a mix")
    torch.manual_seed(0)
    x = torch.randn(batch, case.in_channels, case.size, case.size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(case.out_channels, case.in_channels // case.groups, case.kernel, case.kernel)
    weight = (weight * (weight[0].numel()) ** -0.5).contiguous(memory_format=torch.channels_last)
    geometry: dict[str, Any] = {"stride": case.stride, "padding": case.kernel // 2, "groups": case.groups}
    level = cases.MIXES[mix].levels(batch, 1)[:, 0]
    inside, outside, share = widths(case, level)

    def elastic_engine(name: str) -> InProcess:
        return InProcess(
            f"den[{name}]",
            lambda: dk.den_conv2d(x, weight, None, inside, outside, backend=name, **geometry),
            clock=clock,
        )

    elastic = [elastic_engine(backend), elastic_engine("grouped")]
    dense = InProcess("torch eager", lambda: F.conv2d(x, weight, None, **geometry), dense=True, clock=clock)

    some = slice(0, None, max(1, batch // CHECKED))
    part = [None if w is None else w[some] for w in (inside, outside)]
    expected = dk.reference.den_conv2d(x[some].double(), weight.double(), None, *part, **geometry)
    for engine in elastic:
        assert_close(engine.name, engine.result()[some], expected, cases.TOLERANCE[x.dtype])
    full = F.conv2d(x[some].double(), weight.double(), None, **geometry)
    assert_close(dense.name, dense.result()[some], full, cases.TOLERANCE[x.dtype])

    measured = take_turns(benchmark, [*elastic, dense], BUDGET_S[batch])
    if measured:
        ratio = (1 / share.mean()).item()
        times = {name: Time.of(seconds) for name, seconds in measured.seconds.items()}
        rows.append(
            Row(
                "conv",
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

"""Whole networks, frozen, in mixed batches, against dense engines and the other ways to run a DEN.

Each engine is a process of its own: they work one at a time. N samples, B blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import pytest
import torch

import den
from benchmarks import cases, networks
from benchmarks.engines import CLOCK, InWorker, assert_close, need_backend, take_turns
from benchmarks.lineup import DENSE, Bench, Subject
from benchmarks.table import SELECTOR, Row, Time
from benchmarks.worker import Unusable

# The other ways to run a DEN are shown where levels differ; elsewhere the dense engines are enough.
WITH_PEERS = ("uniform", "paper")
BUDGET_S = {1: 2.0, 8: 3.0, 64: 8.0, 256: 20.0}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("backend", ["cpu"])
def test_network(
    benchmark,
    request,
    rows: list[Row],
    bench: Bench,
    model: cases.ModelCase,
    subject: Subject,
    backend: str,
    batch: int,
    level_mix: cases.Mix,
) -> None:
    need_backend(backend, getattr(torch, subject.dtype))
    if subject.missing():
        pytest.skip(f"{subject.name}: {subject.missing()}")
    if batch not in model.batches:
        pytest.skip(f"{model.name} is not timed at batch {batch}")
    if not level_mix.fits(model.ratios):
        pytest.skip(f"{model.name} has no level for mix {level_mix.name}: its ratios are {model.ratios}")
    net, dtype = networks.network(model.name), subject.dtype
    level_NB = level_mix.levels(batch, net.num_blocks, model.ratios)
    top = net.num_levels - 1

    own = bench.den(subject, model, level_NB, backend)
    elastic = [own, bench.den(subject, model, level_NB, backend, selector=True)]
    chosen = [DENSE[name] for name in request.config.getoption("--engines")]
    dense = _usable(
        functools.partial(bench.dense, opponent, model, dtype, batch)
        for opponent in chosen
        if dtype in opponent.dtypes and not opponent.missing()
    )
    assert dense, f"none of the engines {', '.join(o.label for o in chosen)} can run {dtype} here"
    slim: list[InWorker] = []
    if level_mix.name in WITH_PEERS and not subject.variant:
        elastic += _usable(
            (
                lambda: bench.masked(model, dtype, level_NB),
                lambda: bench.loop(model, dtype, level_NB),
                lambda: bench.den(Subject(dtype, dtype), model, level_NB, "grouped"),
            )
        )
        slim.append(bench.slim(model, dtype, batch, model.half))
    elif level_mix.name != "full" and (level_NB == level_NB[0, 0]).all():
        # A static network of these widths is this very function.
        elastic.append(bench.slim(model, dtype, batch, int(level_NB[0, 0])))

    checked = networks.checked_rows(batch)
    expected = networks.reference_logits(model.name, networks.images(model, batch)[checked], level_NB[checked])
    plain_tolerance = cases.TOLERANCE[getattr(torch, dtype)]
    for engine in elastic:
        tolerance = subject.tolerance if engine in elastic[:2] else plain_tolerance
        assert_close(engine.name, engine.result()[checked], expected, tolerance)
    for level, engines in ((top, dense), (model.half, slim)):
        for engine in engines:
            expected = networks.static_reference(model, batch, level)
            assert_close(engine.name, engine.result()[checked], expected, plain_tolerance)

    measured = take_turns(benchmark, [own, *elastic[1:], *dense, *slim], BUDGET_S[batch], keep=[own.name + SELECTOR])
    if measured:
        cost = den.flops(net, level_NB, model.image_size).double().mean()
        full = den.flops(net, [top] * net.num_blocks, model.image_size)
        rows.append(
            Row(
                group="network",
                case=f"{model.name}@{model.image_size}",
                den=own.name,
                dtype=dtype,
                batch=batch,
                mix=level_mix.name,
                flop_ratio=float(full / cost),
                times={name: Time.of(seconds) for name, seconds in measured.seconds.items()},
                dense=[engine.name for engine in dense],
                disturbance=measured.disturbance,
                thread_speedup=measured.thread_speedup,
            )
        )


def _usable(makers: Iterable[Callable[[], InWorker]]) -> list[InWorker]:
    """The engines that can do this case."""
    found = []
    for make in makers:
        try:
            found.append(make())
        except Unusable:
            continue
    return found

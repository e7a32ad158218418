"""Whole networks, frozen, in mixed batches, against dense engines and the other ways to run a DEN."""

from __future__ import annotations

import pytest

import den
from benchmarks import cases, networks
from benchmarks.engines import Engine, assert_close, need_backend, take_turns
from benchmarks.table import row

# The other ways to run a DEN are shown where levels differ; elsewhere the dense engines are enough.
WITH_PEERS = ("uniform", "paper")
BUDGET_S = {1: 2.0, 8: 3.0, 64: 5.0, 256: 15.0}


@pytest.mark.parametrize("mix", cases.MIXES)
@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("case", cases.MODELS, ids=lambda case: case.name)
def test_network(benchmark, request, rows, case: cases.ModelCase, backend: str, batch: int, mix: str) -> None:
    need_backend(backend)
    if batch not in case.batches:
        pytest.skip(f"{case.name} is not timed at batch {batch}")
    name = case.name
    model = networks.network(name)
    x = networks.images(case, batch)
    level_NB = cases.MIXES[mix].levels(batch, model.num_blocks)
    top = model.num_levels - 1

    subject = networks.den_engine(name, x, level_NB, backend)
    elastic: list[Engine] = [subject, networks.den_selector_engine(name, x, level_NB, backend)]
    dense: list[Engine] = [networks.DENSE[engine](name, x) for engine in request.config.getoption("--engines")]
    slim: list[Engine] = []
    if mix in WITH_PEERS:
        elastic.append(networks.masked_engine(name, x, level_NB))
        elastic.append(networks.loop_engine(name, x, level_NB))
        elastic.append(networks.den_engine(name, x, level_NB, "grouped"))
        slim.append(networks.slim_engine(name, x, 2))
    elif mix != "full" and (level_NB == level_NB[0, 0]).all():
        # A static network of these widths is this very function.
        elastic.append(networks.slim_engine(name, x, int(level_NB[0, 0])))

    checked = networks.checked_rows(batch)
    tolerance = cases.TOLERANCE[x.dtype]
    expected = networks.reference_logits(name, x[checked], level_NB[checked])
    for engine in elastic:
        assert_close(engine.name, engine.result()[checked], expected, tolerance)
    for level, engines in ((top, dense), (2, slim)):
        for engine in engines:
            expected = networks.static_reference(case, batch, level)
            assert_close(engine.name, engine.result()[checked], expected, tolerance)

    medians = take_turns(benchmark, subject, [*elastic[1:], *dense, *slim], BUDGET_S[batch])
    if medians:
        cost = den.flops(model, level_NB, case.image_size).double().mean()
        full = den.flops(model, [top] * model.num_blocks, case.image_size)
        names = [engine.name for engine in dense]
        label = f"{case.name}@{case.image_size}"
        rows.append(row("network", label, backend, "float32", batch, mix, float(full / cost), medians, names))

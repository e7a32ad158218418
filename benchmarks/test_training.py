"""Training steps of whole networks, in mixed batches, against the same network dense in plain PyTorch."""

from __future__ import annotations

import pytest

import den
from benchmarks import cases, networks, training
from benchmarks.engines import CLOCK, InProcess, need_backend, take_turns
from benchmarks.table import Row, Time

# Of a parameter's gradient, between any two of the engines. Rounding differs; a value that it carries over the kink of
# a ReLU moves every gradient before it, more than the sums' own errors do.
TOLERANCE = 3e-2
# The dense opponent is written for networks of pre-activation blocks.
PREACTIVATION = [case for case in cases.MODELS if case.name.startswith("wrn")]
BUDGET_S = {8: 4.0, 64: 12.0, 256: 30.0}


def assert_gradients_agree(name: str, step: training.Step, expected: training.Step) -> None:
    names = [parameter for parameter, _ in step.network.named_parameters()]
    for parameter, ours, theirs in zip(names, step.gradients(), expected.gradients(), strict=True):
        if not theirs.any():
            assert not ours.any(), f"{name}: gradient of {parameter}, which no sample ran, is not exactly 0"
            continue
        error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
        assert error <= TOLERANCE, f"{name}: gradient of {parameter} off by {error:.2e}, allowed {TOLERANCE:.0e}"


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("mix", ["uniform", "paper", "full"])
@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("case", PREACTIVATION, ids=lambda case: case.name)
def test_training(
    benchmark, rows: list[Row], clock: str, case: cases.ModelCase, backend: str, batch: int, mix: str
) -> None:
    need_backend(backend)
    if batch not in case.batches:
        pytest.skip(f"{case.name} is not timed at batch {batch}")
    if batch == 1:
        pytest.skip("batch norm over one image: too badly conditioned for the results to be compared")
    name = case.name
    x = networks.images(case, batch)
    model = networks.network(name)
    level_NB = cases.MIXES[mix].levels(batch, model.num_blocks)
    top_NB = cases.FULL.levels(batch, model.num_blocks)

    elastic = training.elastic_step(name, x, level_NB, backend)
    grouped = training.elastic_step(name, x, level_NB, "grouped")
    dense = training.dense_step(name, x, backend)
    assert_gradients_agree(f"den[{backend}]", elastic, grouped)
    assert_gradients_agree("torch eager", dense, training.elastic_step(name, x, top_NB, "grouped"))

    subject = InProcess(f"den[{backend}]", elastic, clock=clock)
    opponent = InProcess("torch eager", dense, dense=True, clock=clock)
    engines = [subject, opponent, InProcess("den[grouped]", grouped, clock=clock)]
    measured = take_turns(benchmark, engines, BUDGET_S[batch])
    if measured:
        cost = den.flops(model, level_NB, case.image_size).double().mean()
        full = den.flops(model, [model.num_levels - 1] * model.num_blocks, case.image_size)
        rows.append(
            Row(
                "training",
                f"{name}@{case.image_size}, step",
                subject.name,
                "float32",
                batch,
                mix,
                float(full / cost),
                {engine: Time.of(seconds) for engine, seconds in measured.seconds.items()},
                [opponent.name],
                measured.disturbance,
                measured.thread_speedup,
            )
        )

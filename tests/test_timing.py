"""Timing: level mixes, engines in turn, and results checked before they are timed."""

from __future__ import annotations

import re

import pytest
import torch

import den
from den import timing

RATIOS = (0, 0.25, 0.5, 1)


@pytest.fixture(scope="module")
def model() -> den.DEN:
    torch.manual_seed(0)
    return den.create_model("wrn_8_1", {"a": 10, "b": 5}, selector="light").eval()


@pytest.mark.parametrize("samples", [1, 3, 64])
@pytest.mark.parametrize(
    ("mix", "shares"),
    [
        ("full", (0, 0, 0, 1)),
        ("skip", (1, 0, 0, 0)),
        ("uniform", (0.25, 0.25, 0.25, 0.25)),
        ("top1-of-4", (0.75, 0, 0, 0.25)),
        ("2", (0, 0, 1, 0)),
    ],
)
def test_a_mix_meets_its_shares(mix, shares, samples):
    level = timing.level_mix(mix, samples, RATIOS, 15)
    assert level.shape == (samples, 15)
    counts = level.flatten().bincount(minlength=4)
    for count, share in zip(counts.tolist(), shares, strict=True):
        assert abs(count - share * samples * 15) < 1
    assert torch.equal(level, timing.level_mix(mix, samples, RATIOS, 15))


@pytest.mark.parametrize("ratios", [RATIOS, (0, 0.5, 1), (0.25, 0.5, 1)])
def test_the_paper_mix_has_the_papers_mean_cost(ratios):
    level = timing.level_mix("paper", 256, ratios, 15)
    assert float(torch.tensor(ratios)[level].mean()) == pytest.approx(timing.PAPER_COST, abs=1e-3)
    assert level.unique().tolist() == list(range(len(ratios)))


def test_unknown_mix():
    with pytest.raises(ValueError, match="mix is '4'; it must be one of selector, full"):
        timing.level_mix("4", 1, RATIOS, 3)
    with pytest.raises(ValueError, match=r"mean is 0\.53; it must lie between 0\.75 and 1"):
        timing.level_mix("paper", 1, (0.75, 1), 3)


def test_engines_take_turns_on_every_input():
    calls: list[tuple[str, int]] = []
    engines = {name: lambda value, name=name: calls.append((name, value)) for name in "ab"}
    times = timing.interleaved(engines, [1, 2], seconds=0)
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert all(seconds >= 0 for values in times.values() for seconds in values)
    rounds = calls[4:]  # behind the warm-up
    assert len(rounds) == timing.MIN_ROUNDS * 4
    assert rounds[:4] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert rounds[4:8] == [("b", 1), ("a", 1), ("b", 2), ("a", 2)]


def test_latency(model):
    images = torch.randn(3, 3, 16, 16)
    results = timing.latency(model, images, "b", batches=(1, 4), mixes=("selector", "full"), seconds=0)
    assert [(r.task, r.batch, r.mix) for r in results] == [
        ("b", 1, "selector"),
        ("b", 1, "full"),
        ("b", 4, "selector"),
        ("b", 4, "full"),
    ]
    full = results[1]
    assert full.cost == 1
    assert full.dense_flops == full.estimator_flops == float(den.flops(model, [3, 3, 3], 16))
    assert full.den_flops > full.estimator_flops
    assert full.estimator_efficiency == pytest.approx(full.dense_ms / full.estimator_ms)
    chosen = model(images, "b").level
    assert results[2].estimator_flops == pytest.approx(
        float(den.flops(model, chosen[torch.arange(64) % 3], 16).double().mean())
    )
    assert full.backend in ("cpu", "grouped")
    assert set(full.asdict()) >= {"dense_ms", "den_ms", "ratio", "flop_ratio", "efficiency"}


def test_results_that_differ_are_not_timed(model):
    frozen = den.freeze(model)
    plain = den.dense(model, "a")
    x = torch.randn(2, 3, 16, 16)
    timing.check_equal(model, frozen, plain, x, "a")
    with torch.no_grad():
        plain.head.bias += 1
    with pytest.raises(RuntimeError, match=r"the frozen DEN and the dense network differ by .*nothing was timed"):
        timing.check_equal(model, frozen, plain, x, "a")
    with torch.no_grad():
        for parameter in (*frozen.heads["a"].parameters(), *frozen.heads["a"].buffers()):
            parameter.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="differ by nan"):
        timing.check_equal(model, frozen, den.dense(model, "a"), x, "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": (0,)}, "batch is 0"),
        ({"mixes": ("sorted",)}, "mix is 'sorted'"),
        ({"task": "c"}, "task is 'c'"),
        ({"images": torch.empty(0, 3, 16, 16)}, "images is empty"),
    ],
)
def test_bad_input(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        timing.latency(model, **{"images": torch.zeros(1, 3, 16, 16), "task": "a", **arguments})


def test_hardware_names_processor_threads_and_torch():
    assert re.search(rf"{torch.get_num_threads()} threads?, torch {re.escape(torch.__version__)}$", timing.hardware())

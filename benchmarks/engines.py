"""What is compared, and how: engines that take turns, so that a machine whose speed drifts drifts for all of them.

An engine that lives in a process of its own joins by giving `result` and `time`: it measures itself there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from den_kernels.backends import load

MAX_ROUNDS = 25
MIN_ROUNDS = 5
SHORT_CALL_S = 0.05


class Engine(Protocol):
    """One way to compute a case, on inputs that it was made with.

    name: what the table calls it; names the backend where there is one. A fallback gets no name.
    dense: whether it always does the full network's work: the fastest of these is what speed-ups refer to.
    """

    name: str
    dense: bool

    def result(self) -> Tensor:
        """The output of one run."""
        ...

    def time(self, calls: int) -> list[float]:
        """Seconds of each of `calls` runs, behind an untimed one where runs are so short that caches matter."""
        ...


class InProcess:
    """An engine that is a function of no arguments in this process."""

    def __init__(self, name: str, run: Callable[[], Tensor], *, dense: bool = False):
        self.name, self.run, self.dense = name, run, dense
        self._short = True

    @torch.inference_mode()
    def result(self) -> Tensor:
        return self.run()

    @torch.inference_mode()
    def time(self, calls: int) -> list[float]:
        if self._short:
            self.run()
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            self.run()
            seconds.append(time.perf_counter() - start)
        self._short = seconds[-1] < SHORT_CALL_S
        return seconds


def need_backend(name: str) -> None:
    """Skip the test, saying why, where a backend cannot be used here: nothing else ever runs in its place."""
    reason = load(name).unavailable()
    if reason:
        pytest.skip(f"backend {name!r} cannot be used here: {reason}")


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail unless the largest error is within `tolerance` of the largest value. NaN fails."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error = ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    assert error <= tolerance, f"{name}: error {error:.2e} of the largest value, allowed {tolerance:.0e}; not timed"


def take_turns(benchmark: Any, subject: InProcess, others: Sequence[Engine], budget_s: float) -> dict[str, float]:
    """Median seconds of a run of each engine, all measured in turn, round by round.

    pytest-benchmark times `subject`; the others run in the setup of its rounds, which is not timed. With benchmarks
    disabled the subject runs once and nothing is returned.

    Args:
        budget_s: about how long to measure; at least `MIN_ROUNDS` rounds, or 3 where those took over four times that.
    """
    if not benchmark.enabled:
        benchmark.pedantic(subject.result)
        return {}
    engines = [subject, *others]
    first = {engine.name: engine.time(1)[0] for engine in engines}
    if len(first) != len(engines):
        raise ValueError(f"engines of one name: {[engine.name for engine in engines]}")
    calls = max(1, min(5, int(0.02 / first[subject.name])))
    turn = sum((calls + (seconds < SHORT_CALL_S)) * seconds for seconds in first.values())
    # On a busy machine a turn takes several times as long; fewer rounds then, rather than an endless run.
    least = MIN_ROUNDS if MIN_ROUNDS * turn < 4 * budget_s else 3
    rounds = max(least, min(MAX_ROUNDS, int(budget_s / turn)))
    samples: dict[str, list[float]] = {engine.name: [] for engine in engines}
    done = 0

    def setup() -> None:
        nonlocal done
        if done % calls == 0:
            shift = done // calls % max(1, len(others))
            for engine in (*others[shift:], *others[:shift]):
                samples[engine.name] += engine.time(calls)
            if first[subject.name] < SHORT_CALL_S:
                subject.run()
        done += 1

    with torch.inference_mode():
        benchmark.pedantic(subject.run, setup=setup, rounds=rounds * calls)
    samples[subject.name] = list(benchmark.stats.stats.data)
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    benchmark.extra_info["median_ms"] = {name: round(1e3 * value, 4) for name, value in medians.items()}
    benchmark.extra_info["rounds"] = rounds
    return medians

"""What is compared, and how: engines that take turns, so that a machine whose speed drifts drifts for all of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from benchmarks.conditions import Disturbance, thread_speedup
from benchmarks.worker import CLOCKS, SHORT_CALL_S, Job, Worker, timed
from den_kernels.backends import load

MAX_ROUNDS = 25
MIN_ROUNDS = 5
# An opponent this much slower than the fastest one is timed in the first rounds only.
CONTENDER = 1.5


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
    """An engine that is a function of no arguments in this process. clock: of `benchmarks.worker.CLOCKS`."""

    def __init__(self, name: str, run: Callable[[], Tensor], *, dense: bool = False, clock: str = "wall"):
        self.name, self.run, self.dense, self.clock = name, run, dense, CLOCKS[clock]
        self._short = True

    @torch.inference_mode()
    def result(self) -> Tensor:
        return self.run()

    @torch.inference_mode()
    def time(self, calls: int) -> list[float]:
        seconds = timed(self.run, calls, self.clock, self._short)
        self._short = seconds[-1] < SHORT_CALL_S
        return seconds


class InWorker:
    """An engine in a process of its own, which measures itself there."""

    def __init__(self, name: str, worker: Worker, job: Job, *, dense: bool = False):
        self.name, self.dense = name, dense
        self._worker = worker
        worker.build(job)

    @property
    def pid(self) -> int:
        return self._worker.pid

    def result(self) -> Tensor:
        return torch.from_numpy(self._worker.result())

    def time(self, calls: int) -> list[float]:
        return self._worker.time(calls)

    def peak_bytes(self) -> int:
        """Most bytes by which the process grew during one run."""
        return self._worker.peak_bytes()


def need_backend(name: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip the test, saying why, where a backend cannot be used here: nothing else ever runs in its place."""
    backend = load(name)
    reason = backend.unavailable() or backend.rejects(torch.device("cpu"), dtype)
    if reason:
        pytest.skip(f"backend {name!r} cannot be used here: {reason}")


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail unless the largest error is within `tolerance` of the largest value. NaN fails."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error = ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    assert error <= tolerance, f"{name}: error {error:.2e} of the largest value, allowed {tolerance:.0e}; not timed"


@dataclass
class Measured:
    """Of one case: seconds of every run of each engine, and what the machine was like meanwhile.

    disturbance: the share of it that others took. thread_speedup: see `conditions.thread_speedup`; the mean of before
    and after.
    """

    seconds: dict[str, list[float]]
    disturbance: float | None
    thread_speedup: float | None


class Replay:
    """A clock that moves on by a measured run at each call, so that pytest-benchmark's statistics are of those runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds: list[float] = []

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += self.seconds.pop(0)


CLOCK = Replay()


def take_turns(benchmark: Any, engines: Sequence[Engine], budget_s: float, keep: Sequence[str] = ()) -> Measured | None:
    """Time the engines in turn, round by round, in an order that rotates.

    pytest-benchmark is given the runs of the first one; its test must be marked `benchmark(timer=CLOCK)`. With
    benchmarks disabled the first engine runs once and nothing is returned.

    Args:
        budget_s: about how long to measure; at least `MIN_ROUNDS` rounds, or 3 where those took over four times that.
        keep: names of the engines that every round times, with the first one and the fastest dense ones; the others
            are timed in the least number of rounds.
    """
    if not benchmark.enabled:
        benchmark.pedantic(engines[0].result)
        return None
    first = {engine.name: engine.time(1)[0] for engine in engines}
    if len(first) != len(engines):
        raise ValueError(f"engines of one name: {[engine.name for engine in engines]}")
    calls = {name: max(1, min(5, int(0.02 / seconds))) for name, seconds in first.items()}
    turn = {name: (calls[name] + (seconds < SHORT_CALL_S)) * seconds for name, seconds in first.items()}
    whole = sum(turn.values())
    # On a busy machine a turn takes several times as long; fewer rounds then, rather than an endless run.
    least = MIN_ROUNDS if MIN_ROUNDS * whole < 4 * budget_s else 3
    bar = CONTENDER * min((first[e.name] for e in engines if e.dense), default=float("inf"))
    stay = [e for e in engines if e is engines[0] or e.name in keep or (e.dense and first[e.name] <= bar)]
    more = int((budget_s - least * whole) / sum(turn[e.name] for e in stay))
    rounds = min(MAX_ROUNDS, least + max(0, more))

    samples: dict[str, list[float]] = {engine.name: [] for engine in engines}
    before = thread_speedup()
    watch = Disturbance([os.getpid(), *(e.pid for e in engines if isinstance(e, InWorker))])
    for number in range(rounds):
        playing = list(engines) if number < least else stay
        shift = number % len(playing)
        for engine in (*playing[shift:], *playing[:shift]):
            samples[engine.name] += engine.time(calls[engine.name])
    share, after = watch.share(), thread_speedup()
    measured = Measured(samples, share, None if before is None or after is None else (before + after) / 2)

    CLOCK.seconds = list(samples[engines[0].name])
    benchmark.pedantic(CLOCK.run, rounds=len(CLOCK.seconds))
    benchmark.extra_info["median_ms"] = {
        name: round(1e3 * statistics.median(seconds), 4) for name, seconds in samples.items()
    }
    benchmark.extra_info["disturbance"] = measured.disturbance
    benchmark.extra_info["thread_speedup"] = measured.thread_speedup
    return measured

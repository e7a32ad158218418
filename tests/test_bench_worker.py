"""Engines in processes of their own: what they are asked, and how they end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.worker import Job, Unusable, Worker, timed


def job(function: str, **options) -> Job:
    return Job(f"tests.worker_engines:{function}", "any", "float32", "any.npy", options=options)


def state(pid: int) -> str:
    """Of a process: R running, S asleep."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(threads=3)
    yield made
    made.close()


def test_an_engine_is_built_once_for_a_job(worker: Worker) -> None:
    worker.build(job("counting"))
    assert worker.result().tolist() == [[1, 3]]
    worker.build(job("counting"))
    assert worker.result().tolist() == [[2, 3]]
    worker.build(job("counting", offset=0.5))
    result = worker.result()
    assert result.dtype == np.float32
    assert result.tolist() == [[1.5, 3.5]]


def test_short_runs_are_timed_behind_an_untimed_one(worker: Worker) -> None:
    worker.build(job("counting"))
    seconds = worker.time(4)
    assert len(seconds) == 4
    assert min(seconds) >= 0
    assert worker.result().tolist() == [[6, 3]]


def test_timed_reads_the_clock_around_each_run() -> None:
    now, steps = [0.0], iter([100.0, 2.0, 3.0])

    def run() -> None:
        now[0] += next(steps)

    assert timed(run, 2, lambda: now[0], warm_up=True) == [2, 3]


def test_what_the_shell_says_about_threads_does_not_reach_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("GOMP_SPINCOUNT", "8")
    monkeypatch.setenv("DEN_TEST_KEPT", "9")
    worker = Worker(threads=2, environment={"DEN_TEST_ADDED": "5"})
    worker.build(job("environment", names=["OMP_NUM_THREADS", "GOMP_SPINCOUNT", "DEN_TEST_KEPT", "DEN_TEST_ADDED"]))
    assert worker.result().tolist() == [[2, 0, 9, 5]]
    worker.close()


def test_growth_is_of_one_run(worker: Worker) -> None:
    worker.build(job("growing", megabytes=40))
    for _ in range(2):  # given back in between
        assert 39e6 < worker.peak_bytes() < 50e6


def test_failures_are_told(worker: Worker) -> None:
    with pytest.raises(Unusable, match="not for such a job"):
        worker.build(job("unusable"))
    with pytest.raises(RuntimeError, match="no engine was built"):
        worker.result()
    worker.build(job("broken"))
    with pytest.raises(RuntimeError, match="ValueError: matmul"):
        worker.result()
    worker.build(job("counting"))  # it still serves
    assert worker.result().tolist() == [[1, 3]]
    worker.build(job("fatal"))
    with pytest.raises(RuntimeError, match="ended with status 7"):
        worker.result()


def test_an_engine_is_idle_between_requests_and_gone_when_closed(worker: Worker) -> None:
    worker.build(job("counting"))
    worker.time(1)
    pid = worker.pid
    until = time.monotonic() + 10
    while state(pid) != "S" and time.monotonic() < until:  # it may not have reached its read yet
        time.sleep(0.01)
    assert state(pid) == "S"
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

"""Engines for the tests of the workers' process: this file is imported there, by the name that a job gives."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from benchmarks.worker import Job, Unusable


def counting(job: Job, threads: int) -> Callable[[], np.ndarray]:
    """Results: how often it ran so far, the threads that it may use, and the job's offset added to each."""
    offset, runs = job.options.get("offset", 0.0), 0

    def run() -> np.ndarray:
        nonlocal runs
        runs += 1
        return np.array([[runs, threads]], dtype=np.float64) + offset

    return run


def environment(job: Job, threads: int) -> Callable[[], np.ndarray]:
    """Results: the numbers that the variables of the job's option `names` hold, 0 for a variable that is not set."""
    values = [float(os.environ.get(name, "0")) for name in job.options["names"]]
    return lambda: np.array([values])


def growing(job: Job, threads: int) -> Callable[[], np.ndarray]:
    """Holds the job's `megabytes` of written memory for the time of a run."""
    return lambda: np.ones(job.options["megabytes"] * 1_000_000, dtype=np.uint8)[:1, None]


def unusable(job: Job, threads: int) -> Callable[[], np.ndarray]:
    raise Unusable("not for such a job")


def broken(job: Job, threads: int) -> Callable[[], np.ndarray]:
    return lambda: np.array([1.0, 2.0]) @ np.array([1.0])


def fatal(job: Job, threads: int) -> Callable[[], np.ndarray]:
    return lambda: os._exit(7)

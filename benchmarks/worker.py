"""Engines in processes of their own, which work only while the parent waits for their answer.

Two OpenMP or TBB pools in one process disturb each other, and threads of an idle pool that spin would disturb the
engine whose turn it is. So an engine is a process that is blocked in a read when it is not asked, and that answers a
request for time only when its own threads have gone to sleep. This module imports no torch, nor do the runtimes'
processes.

    python -m benchmarks.worker FD THREADS CLOCK         the child's side of the connection FD, started by `Worker`
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHORT_CALL_S = 0.05
# "cpu", the processor time of the process, is for one thread on a machine that others use too.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# What a caller's shell may say about spinning and pools: every engine gets the libraries' own defaults instead.
SHELL_SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "ORT_", "OV_")


class Unusable(Exception):
    """An engine cannot do this job here; the message is the reason."""


@dataclass(frozen=True)
class Job:
    """What an engine computes. The same job has the same result.

    build: "module:function"; the function is given the job and returns one of no arguments, which runs once and returns
        logits [N, classes].
    model, dtype: the network's name in `benchmarks.cases`, and what it computes in.
    images: path of a .npy file, float32 [N, 3, H, W].
    level: [N, B]; None for engines whose work depends on no level.
    options: of the function.
    """

    build: str
    model: str
    dtype: str
    images: str
    level: tuple[tuple[int, ...], ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Worker:
    """A process with one engine. It ends with `close`, or with its parent.

    clock: of `CLOCKS`. environment: variables to set besides. root: the checkout whose code it runs.
    """

    def __init__(
        self, threads: int, clock: str = "wall", environment: Mapping[str, str] | None = None, root: Path = ROOT
    ):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(SHELL_SETTINGS)}
        # Inductor's own pool of compilers would go on living beside the engines.
        fixed = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._connection, child = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(child.fileno()), str(threads), clock],
            cwd=root,
            env={**kept, **fixed, **(environment or {})},
            pass_fds=[child.fileno()],
        )
        child.close()
        self._job: Job | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def build(self, job: Job) -> None:
        """Make the engine; nothing happens if it is there. Raises `Unusable` where it cannot do this job here."""
        if job != self._job:
            self._job = None
            self._ask("build", job)
            self._job = job

    def result(self) -> np.ndarray:
        """Logits of one run, float32 [N, classes]."""
        return self._ask("result", None)

    def time(self, calls: int) -> list[float]:
        """Seconds of each of `calls` runs, behind an untimed one where runs are so short that caches matter."""
        return self._ask("time", calls)

    def peak_bytes(self) -> int:
        """Most bytes by which the process grew during one run."""
        return self._ask("peak_bytes", None)

    def _ask(self, request: str, argument: Any) -> Any:
        try:
            self._connection.send((request, argument))
            kind, answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RuntimeError(f"the engine's process ended with status {self._process.wait()}") from None
        if kind == "unusable":
            raise Unusable(answer)
        if kind == "error":
            raise RuntimeError(f"in the engine's process:\n{answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Served:
    """The child's side: the engine and the requests that it answers."""

    def __init__(self, threads: int, clock: str) -> None:
        self.threads, self.clock = threads, CLOCKS[clock]
        self._run: Callable[[], Any] | None = None
        self._short = True

    def build(self, job: Job) -> None:
        self._run = None  # gives its memory back before the next takes some
        module, function = job.build.split(":")
        self._run = getattr(importlib.import_module(module), function)(job, self.threads)
        self._short = True

    @property
    def run(self) -> Callable[[], Any]:
        if self._run is None:
            raise RuntimeError("no engine was built")
        return self._run

    def result(self, _: None) -> np.ndarray:
        return np.array(self.run(), dtype=np.float32)

    def time(self, calls: int) -> list[float]:
        seconds = timed(self.run, calls, self.clock, self._short)
        self._short = seconds[-1] < SHORT_CALL_S
        settle()
        return seconds

    def peak_bytes(self, _: None) -> int:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status_bytes("VmRSS")
        self.run()
        return _status_bytes("VmHWM") - before


def timed(run: Callable[[], Any], calls: int, clock: Callable[[], float], warm_up: bool) -> list[float]:
    """Seconds of each of `calls` runs, behind an untimed one if asked for."""
    if warm_up:
        run()
    seconds = []
    for _ in range(calls):
        start = clock()
        run()
        seconds.append(clock() - start)
    return seconds


def settle() -> None:
    """Return when the other threads of this process sleep: those of a pool go on spinning some milliseconds."""
    quiet = 0
    for _ in range(200):
        before = time.process_time()
        time.sleep(0.005)
        # On a machine in use a spinning thread may have had no turn meanwhile, so once is not enough.
        quiet = quiet + 1 if time.process_time() - before < 0.0005 else 0
        if quiet == 3:
            return


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def serve(connection: Connection, threads: int, clock: str) -> None:
    """Answer until the parent is gone."""
    served = Served(threads, clock)
    while True:
        try:
            request, argument = connection.recv()
        except EOFError:
            return
        try:
            reply = ("ok", getattr(served, request)(argument))
        except Unusable as error:
            reply = ("unusable", str(error))
        except Exception:
            reply = ("error", traceback.format_exc())
        connection.send(reply)


if __name__ == "__main__":
    # `benchmarks.worker`, not `__main__`: builders raise that module's Unusable, and jobs are of its class.
    serving = importlib.import_module("benchmarks.worker")
    serving.serve(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # nothing is left to save, and the libraries' own farewells take a second

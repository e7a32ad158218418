"""The conditions of a run: the machine, the versions, and how much of it others took meanwhile."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import time
import timeit
from collections.abc import Iterable
from pathlib import Path

import torch

from den_kernels.backends import available_backends, load

RUNTIMES = ("onnxruntime", "openvino")


def of_run(threads: int, clock: str) -> dict[str, str | int]:
    """What the figures depend on besides the code; threads and clock are every engine's."""
    isas = load("cpu").supported_isas() if "cpu" in available_backends() else ()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": threads,
        "clock": clock,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in RUNTIMES},
        "system": f"{platform.system()} {platform.machine()}",
        "backends": ", ".join(available_backends()),
        "cpu_kernels": isas[0] if isas else "none",
        "date": datetime.date.today().isoformat(),
    }


def version(package: str) -> str:
    """Of an installed package; "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor() or "unknown"
    # A virtual machine's name may hide the generation; family and model tell it.
    return f"{found['model name']} (family {found.get('cpu family')}, model {found.get('model')})"


def thread_speedup() -> float | None:
    """How many times faster all of torch's threads multiply matrices than one does; None where there is one.

    About their number on cores of their own. About 1 where a virtual machine's processors are hardware threads of one
    core, or its host shares them out: each thread then has its part of the arithmetic and of the near caches.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    a = torch.rand(512, 512)  # about a millisecond of one core, out of its second cache
    fastest = {}
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            torch.mm(a, a)
            fastest[count] = min(timeit.repeat(lambda: torch.mm(a, a), number=1, repeat=7))
    finally:
        torch.set_num_threads(threads)
    return fastest[1] / fastest[threads]


class Disturbance:
    """Share of the machine's processor time that others took since this was made, 0 to 1; None where /proc is missing.

    Stolen time (a virtual machine's host running something else) counts as others'.
    """

    def __init__(self, own: Iterable[int]):
        self._own = list(own)
        self._begin = self._read()

    def share(self) -> float | None:
        end = self._read()
        if self._begin is None or end is None:
            return None
        busy, own, at = (after - before for after, before in zip(end, self._begin, strict=True))
        capacity = at * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (busy - own) / capacity)) if capacity > 0 else 0.0

    def _read(self) -> tuple[float, float, float] | None:
        """Processor seconds of everyone and of our own processes, and the clock."""
        tick = os.sysconf("SC_CLK_TCK")
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
            # Behind the name, which may hold spaces: fields 14 to 17 of proc(5), of the process and its dead children.
            stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self._own]
        except OSError:
            return None
        own = sum(sum(map(int, fields[11:15])) for fields in stats)
        return (user + nice + system + irq + softirq + steal) / tick, own / tick, time.perf_counter()

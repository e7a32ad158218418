"""Processes that end in time, with all that they started: what is left of a hanging one would hold the GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(command: Sequence[str], timeout: float, **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run` in a session of its own; on subprocess.TimeoutExpired, or any other end, nothing of it is left.

    options: of `subprocess.Popen`.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            kill(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def kill(process: subprocess.Popen) -> None:
    """Kill what `run` started, and the groups of its descendants: they may lead sessions of their own."""
    groups = {process.pid}
    for pid in _descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            groups.add(os.getpgid(pid))
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    """Processes that this one started, and those that they started."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = stat.read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(int(stat.parent.name))
    found = [*children[pid]]
    for one in found:  # grows
        found += children[one]
    return found

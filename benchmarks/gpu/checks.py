"""The kernels' own tests on the device, and compute-sanitizer over some of them.

The cases are those of the interpreter's tests, and what only a device can show (tests/triton_device_cases.py). They run
in several processes, since most of their time goes into compiling.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.context import Context
from benchmarks.gpu.results import ROOT

FILES = tuple(f"tests/triton_{part}_cases.py" for part in ("device", "interpreter", "training", "chain"))
PYTEST = (sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider")
# A few small cases, for a tool that slows a kernel down some hundred times.
SMALL = (
    "interpreter_cases.py::test_conv2d[3x3-both-fp32]",
    "interpreter_cases.py::test_residual_block[basic-fp32]",
    "interpreter_cases.py::test_in_place[basic]",
    "training_cases.py::test_conv2d_backward[3x3 aligned-both-fp32]",
)
TOOLS = ("memcheck", "racecheck")
TOOL_S = 60.0
UNSUPPORTED = "Device not supported"  # compute-sanitizer, in some virtual machines
CHUNK = 16  # cases of one process
DRY = ("test_conv2d[1x1-in-fp32]", "test_repeats_bit_for_bit[conv2d]")


def run(context: Context) -> bool:
    """Every case once; those that have passed in an earlier run are not run again. Whether nothing is left."""
    found = context.results.stage("checks")
    known = {name for name, outcome in found.get("cases", {}).items() if outcome == "passed"}
    wanted = [name for name in _collect() if name not in known and (not context.dry or name.endswith(DRY))]
    _run_cases(wanted, context)
    complete = all(name in context.results.stage("checks").get("cases", {}) for name in wanted)
    for tool in TOOLS:
        if f"sanitizer {tool}" not in context.results.stage("checks"):
            if context.out_of_time(TOOL_S / 2):
                return False
            context.results.put("checks", f"sanitizer {tool}", _sanitize(tool, context))
    return complete


def _collect() -> list[str]:
    """Node ids of all cases of the files that there are."""
    files = [name for name in FILES if (ROOT / name).exists()]
    done = subprocess.run([*PYTEST, "--collect-only", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not names:
        raise RuntimeError(f"the kernels' tests could not be collected:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return names


def _run_cases(names: Sequence[str], context: Context) -> None:
    """Keep the outcome of each case that comes to its end: "passed", "skipped: why" or "failed: how"."""
    chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        for outcomes in pool.map(lambda chunk: _run_chunk(chunk, context), chunks):
            before = context.results.stage("checks").get("cases", {})
            context.results.put("checks", "cases", {**before, **outcomes})


def _run_chunk(names: Sequence[str], context: Context) -> dict[str, str]:
    """Outcomes of some cases in a process of their own; none where the time ran out."""
    if context.out_of_time():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # Without -x: one failure says little about the other cases.
        command = [*PYTEST, f"--junitxml={report}", *names]
        try:
            done = processes.run(command, max(1.0, context.left()), cwd=ROOT, stdout=DEVNULL, stderr=DEVNULL)
        except subprocess.TimeoutExpired:
            return {}
        if report.exists():
            return _outcomes(report)
    # The process died, as of a signal: which of its cases was it is found by running them one by one.
    if len(names) == 1:
        return {names[0]: f"failed: its process ended with status {done.returncode}"}
    return {name: outcome for one in names for name, outcome in _run_chunk([one], context).items()}


def _outcomes(report: Path) -> dict[str, str]:
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if problem is not None:
            found[name] = f"failed: {problem.get('message', '')[:600]}"
        elif skipped is not None:
            found[name] = f"skipped: {skipped.get('message', '')[:200]}"
        else:
            found[name] = "passed"
    return found


def _sanitize(tool: str, context: Context) -> dict[str, Any]:
    """compute-sanitizer over the small cases: its last words, or why it did not run."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None or context.device.type != "cuda":
        return {"left_out": "compute-sanitizer is not installed" if program is None else "there is no GPU"}
    names = [f"tests/triton_{name}" for name in SMALL]
    command = [program, "--tool", tool, "--error-exitcode", "9", *PYTEST, *names]
    # The caching allocator would hide what lies just behind a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begun = time.monotonic()
    try:
        done = processes.run(
            command, max(1.0, min(TOOL_S, context.left())),
            cwd=ROOT, env=environment, text=True, stdout=PIPE, stderr=STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"left_out": f"not finished within {time.monotonic() - begun:.0f} s"}
    if UNSUPPORTED in done.stdout:
        return {"left_out": f"compute-sanitizer: {UNSUPPORTED.lower()}"}
    return {"status": done.returncode, "seconds": time.monotonic() - begun, "tail": done.stdout[-800:]}


def failures(cases: dict[str, str]) -> dict[str, str]:
    """Of the outcomes of a run, those that failed."""
    return {name: outcome for name, outcome in cases.items() if outcome.startswith("failed")}

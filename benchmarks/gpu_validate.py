"""Everything that a machine with an NVIDIA GPU is asked, in one command, within its budget of time:

    python -m benchmarks.gpu_validate --out DIR [--seconds 520] [--stages checks matrix ...] [--dry-run]

are the kernels right there, what can the device do, how fast is the DEN against what else there is, where is time lost,
and which tiles are best. DIR/results.json is rewritten after every finding, and a run into a DIR that has one goes on
with what is missing; DIR/tables holds the tiles, DIR/cache what was compiled. The short table comes last. Exit status
1: something was wrong, or failed.

Each stage is a process of its own, ended when its time is over, so that no stage costs the others theirs. One that
fails, as when a case has cost it the GPU, is started once more and goes on behind that case. --dry-run is the same on
tiny shapes in Triton's interpreter, on a CPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import processes


class Stage(NamedTuple):
    """module, function: of benchmarks.gpu, told a Context. share: of the time that the stages before it have left."""

    module: str
    function: str
    share: float


# The order is that of their worth to a run that is cut.
STAGES = {
    "ceilings": Stage("ceilings", "run", 0.06),
    "checks": Stage("checks", "run", 0.28),
    "matrix": Stage("matrix", "run_headline", 0.36),
    "training": Stage("training", "run", 0.36),
    "compiled": Stage("matrix", "run_compiled", 0.55),
    "layers": Stage("layers", "run", 0.50),
    "peers": Stage("matrix", "run_peers", 0.60),
    "tuning": Stage("tuning", "run", 1.0),
}
GRACE_S = 25.0  # for a stage to end by itself
# Where a stage, or the next run, finds what was compiled before.
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
LEAST_S = 10.0  # a stage that would have less is not started: PyTorch alone takes some of it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, or one of them; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_validate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results.json and tables/")
    parser.add_argument("--seconds", type=float, default=520.0, help="for everything (default: 520)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter, on a CPU")
    parser.add_argument("--in-stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.in_stage:
        return run_stage(options.in_stage, options.out, options.seconds, options.dry_run)
    if not options.dry_run and not has_gpu():
        print("torch sees no NVIDIA GPU; --dry-run exercises this command without one", file=sys.stderr)
        return 1
    end = time.monotonic() + options.seconds
    for name in options.stages:
        left = end - time.monotonic()
        if is_done(name, options.out):
            continue
        if left < LEAST_S:
            print(f"{name}: no time left", flush=True)
            continue
        share = 1.0 if options.stages == [name] else STAGES[name].share
        run_process(name, options.out, left * share, options.dry_run)
    return report(options.out)


def has_gpu() -> bool:
    """Whether PyTorch can use a GPU here."""
    import torch

    return torch.cuda.is_available()


def is_done(name: str, out: Path) -> bool:
    """Whether an earlier run left nothing of a stage."""
    from benchmarks.gpu.results import read

    path = out / "results.json"
    return path.exists() and read(path)["status"].get(name) == "done"


def run_process(name: str, out: Path, budget: float, dry: bool) -> None:
    """A stage in a process of its own, for at most its budget and a grace; one that fails is started once more."""
    begun = time.monotonic()
    status = start_process(name, out, budget, dry)
    left = budget - (time.monotonic() - begun)
    if status and left >= LEAST_S:
        print(f"{name}: once more", flush=True)
        start_process(name, out, left, dry)
    print(f"{name}: {time.monotonic() - begun:.0f} s of {budget:.0f} s", flush=True)


def start_process(name: str, out: Path, budget: float, dry: bool) -> int | None:
    """The exit status of a stage's process; None where its time was over before."""
    out = out.resolve()
    command = [sys.executable, "-m", "benchmarks.gpu_validate", f"--out={out}", f"--seconds={budget}"]
    command += ["--in-stage", name, *["--dry-run"] * dry]
    environment = dict(os.environ)
    for variable, folder in CACHES.items():
        environment[variable] = str(out / "cache" / folder)
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).resolve().parents[1]
    try:
        return processes.run(command, budget + GRACE_S, cwd=root, env=environment).returncode
    except subprocess.TimeoutExpired:
        print(f"{name}: ended", flush=True)
        return None


def run_stage(name: str, out: Path, budget: float, dry: bool) -> int:
    """A stage in this process; what happened to it is in the results."""
    deadline = time.monotonic() + budget
    import torch

    from benchmarks.gpu.context import Context
    from benchmarks.gpu.results import Results, conditions

    device = torch.device("cpu" if dry else "cuda")
    torch.set_grad_enabled(name == "training")
    results = Results(out, conditions(device, dry))
    if results.status(name) == "done":
        return 0
    results.end(name, "cut")  # what stands where the process is ended from outside
    stage = STAGES[name]
    try:
        function = getattr(importlib.import_module(f"benchmarks.gpu.{stage.module}"), stage.function)
        complete = function(Context(device, dry, results, deadline))
        results.end(name, "done" if complete else "cut")
    except Exception:
        results.end(name, f"failed: {traceback.format_exc(limit=-3)[-1500:]}")
        traceback.print_exc()
        return 1
    return 0


def report(out: Path) -> int:
    """Print the short table; 1 where anything was found wrong, or nothing was found."""
    from benchmarks.gpu.results import home, read
    from benchmarks.gpu.table import failed, text, wrong

    path = out / "results.json"
    if not path.exists():
        print(f"no results: {path} was not written", file=sys.stderr)
        return 1
    content = read(path)
    print(text(content))
    print(f"\nwritten to {path}" + ("" if content["conditions"]["dry_run"] else f"; it belongs in {home(content)}"))
    broken = any(status.startswith("failed") for status in content["status"].values())
    return 1 if broken or failed(content) or wrong(content) else 0


if __name__ == "__main__":
    # As an exception, behind which no process of a stage is left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())

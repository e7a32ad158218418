"""Everything that a machine with an NVIDIA GPU is asked, in one command, within its budget of time:

    python -m benchmarks.gpu_validate --out DIR [--seconds 520] [--stages checks matrix ...] [--dry-run]

are the kernels right there, what can the device do, how fast is the DEN against what else there is, where is time lost,
and which tiles are best. DIR/results.json is rewritten after every finding, and a run into a DIR that has one goes on
with what is missing; DIR/tables holds the tiles. The short table comes last. Exit status 1: something was wrong.

Each stage is a process of its own, ended when its time is over, so that no stage costs the others theirs. --dry-run is
the same on tiny shapes in Triton's interpreter, on a CPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


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
    "compiled": Stage("matrix", "run_compiled", 0.50),
    "layers": Stage("layers", "run", 0.40),
    "training": Stage("training", "run", 0.50),
    "peers": Stage("matrix", "run_peers", 0.60),
    "tuning": Stage("tuning", "run", 1.0),
}
GRACE_S = 25.0  # for a stage to start, and to end by itself


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
    begun = time.monotonic()
    for name in options.stages:
        left = options.seconds - (time.monotonic() - begun)
        budget = left if options.stages == [name] else left * STAGES[name].share
        start_process(name, options.out, budget, options.dry_run)
    return report(options.out)


def has_gpu() -> bool:
    """Whether PyTorch can use a GPU here."""
    import torch

    return torch.cuda.is_available()


def start_process(name: str, out: Path, budget: float, dry: bool) -> None:
    """A stage in a process of its own, for at most its budget and a grace."""
    command = [sys.executable, "-m", "benchmarks.gpu_validate", f"--out={out.resolve()}", f"--seconds={budget}"]
    environment = dict(os.environ)
    if dry:
        command.append("--dry-run")
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    begun = time.monotonic()
    try:
        subprocess.run(
            [*command, "--in-stage", name],
            cwd=Path(__file__).resolve().parents[1],
            env=environment,
            timeout=max(budget, 0) + GRACE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: ended", flush=True)
    print(f"{name}: {time.monotonic() - begun:.0f} s of {budget:.0f} s", flush=True)


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
    from benchmarks.gpu.table import text, wrong

    path = out / "results.json"
    if not path.exists():
        print(f"no results: {path} was not written", file=sys.stderr)
        return 1
    content = read(path)
    print(text(content))
    print(f"\nwritten to {path}" + ("" if content["conditions"]["dry_run"] else f"; it belongs in {home(content)}"))
    failed = any(status.startswith("failed") for status in content["status"].values())
    return 1 if failed or wrong(content) else 0


if __name__ == "__main__":
    sys.exit(main())

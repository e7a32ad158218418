"""The results file of a GPU run: conditions and, for each stage, what it found by key. Rewritten at each entry."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.conditions import version
from den_kernels.backends.triton.tile_tables import slug

FOLDER = Path(__file__).resolve().parents[1] / "results"
ROOT = FOLDER.parents[1]


def conditions(device: torch.device, dry: bool) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    facts: dict[str, Any] = {
        "dry_run": dry,
        "device": "interpreter",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": numpy.__version__,
        "commit": _output("git", "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def _output(*command: str) -> str:
    """The first line that a command prints; "unknown" where it cannot."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0]


class Results:
    """The file of a folder; what it holds is kept, so that a run that was cut goes on.

    Raises ValueError where it holds another device's results, or a dry run's where this is none.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.path = folder / "results.json"
        self.content: dict[str, Any] = {"conditions": facts, "status": {}, "stages": {}}
        if not self.path.exists():
            return
        self.content = read(self.path)
        before = self.content["conditions"]
        for fact in ("device", "dry_run", "torch", "triton"):
            if before.get(fact) != facts.get(fact):
                raise ValueError(
                    f"{self.path} holds results of {fact} {before.get(fact)!r}, this is {facts.get(fact)!r}: "
                    "choose another folder"
                )
        if before.get("commit") != facts.get("commit"):
            before["commit"] = f"{before['commit']}, {facts['commit']}"
        before["date"] = facts["date"]

    def stage(self, stage: str) -> dict[str, Any]:
        """What a stage has found, by key."""
        return self.content["stages"].get(stage, {})

    def put(self, stage: str, key: str, value: Any) -> None:
        """Keep a finding of a stage."""
        self.content["stages"].setdefault(stage, {})[key] = value
        self._write()

    def forget(self, stage: str, key: str) -> None:
        """Take a finding back."""
        del self.content["stages"][stage][key]
        self._write()

    def status(self, stage: str) -> str | None:
        """How a stage ended; "done" where nothing is left of it."""
        return self.content["status"].get(stage)

    def end(self, stage: str, status: str) -> None:
        self.content["status"][stage] = status
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)


def read(path: Path) -> dict[str, Any]:
    """What `Results` wrote. Raises ValueError for another file."""
    try:
        content = json.loads(path.read_text())
        content["conditions"]["device"], content["status"], content["stages"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results.json of benchmarks.gpu_validate: {error!r}") from None
    return content


def measured() -> dict[str, Path]:
    """The committed results files, by the name of their device's folder."""
    return {path.parent.name: path for path in sorted(FOLDER.glob("*/results.json"))}


def home(content: dict[str, Any]) -> Path:
    """Where a results file belongs once it is committed."""
    return FOLDER / slug(content["conditions"]["device"]) / "results.json"

"""A small real problem for the competitors: digits as one task or as two, and a network of three blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from den.baselines import METHODS, BaselineConfig
from den.tasks import Task, load_task

OPTIONS = {"base_size": 8}
SINGLE = ("random", "slim", "blockdrop", "pruned")  # what the paper has in network compression alone
QUICK: dict[str, dict[str, Any]] = {
    "blockdrop": {"curriculum_epochs": 2, "joint_epochs": 1},
    "pruned": {"tune_epochs": 1},
}


@cache
def digits(subset: int = 192) -> Task:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return load_task("digits", subset=subset)


def tasks_of(method: str, subset: int = 192) -> list[Task]:
    """Digits, once or as two tasks that do not know of each other."""
    task = digits(subset)
    return [task] if method in SINGLE else [replace(task, name="a"), replace(task, name="b")]


def quick(method: str, out: Path | None = None, **changes: Any) -> BaselineConfig:
    """Settings of a run of about a second."""
    if method == "pruned":
        pytest.importorskip("torch_pruning", reason="channel pruning needs torch-pruning")
    settings = {"epochs": 1, "batch_size": 64, "lr": 0.05, "progress": False, "out": out, **QUICK.get(method, {})}
    return METHODS[method].Config(**{**settings, **changes})

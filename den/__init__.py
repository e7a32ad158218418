"""Deep Elastic Networks: each image chooses, block by block, the channels to run (arXiv 1909.04860).

The public names are imported when they are first used: the command line answers without waiting for PyTorch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from den.backbones import list_models
    from den.checkpoint import load, save
    from den.dense import dense
    from den.flops import cost_ratios, count_parameters, flops
    from den.freeze import FrozenDEN, freeze
    from den.hierarchy import Hierarchy
    from den.model import DEN, DENOutput, create_model
    from den.tasks import Task, load_task, make_task
    from den.trainer import TrainConfig, Trainer

__version__ = "0.1.0"

__all__ = [
    "DEN",
    "DENOutput",
    "FrozenDEN",
    "Hierarchy",
    "Task",
    "TrainConfig",
    "Trainer",
    "cost_ratios",
    "count_parameters",
    "create_model",
    "dense",
    "flops",
    "freeze",
    "list_models",
    "load",
    "load_task",
    "make_task",
    "save",
]

_HOME = {
    "DEN": "model",
    "DENOutput": "model",
    "FrozenDEN": "freeze",
    "Hierarchy": "hierarchy",
    "Task": "tasks",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "cost_ratios": "flops",
    "count_parameters": "flops",
    "create_model": "model",
    "dense": "dense",
    "flops": "flops",
    "freeze": "freeze",
    "list_models": "backbones",
    "load": "checkpoint",
    "load_task": "tasks",
    "make_task": "tasks",
    "save": "checkpoint",
}


class _Package(ModuleType):
    """This package. `den.freeze` is the function, also once the submodule that it comes from has been imported."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOME[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            return  # the import system binds a submodule to its package
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package

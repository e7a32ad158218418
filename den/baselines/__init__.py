"""The competitors of the paper (section 4.1), trained by the loop of `den.Trainer` and evaluated by the same code.

    summary = den.baselines.train("packnet", "wrn_32_4", tasks, den.baselines.METHODS["packnet"].Config(out=folder))

`METHODS` lists them; docs/baselines.md tells what each takes from its paper and what differs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from den import checkpoint
from den.baselines.base import BaselineConfig, Method, TaskNetwork
from den.baselines.blockdrop import BlockDrop, BlockDropConfig
from den.baselines.cross_stitch import CrossStitch, CrossStitchConfig, CrossStitchNetworks
from den.baselines.independent import Independent, IndependentNetworks
from den.baselines.nestednet import NestedConfig, NestedNet, NestedNetConfig
from den.baselines.packnet import PackNet
from den.baselines.pruned import Pruned, PrunedConfig, PrunedNetwork
from den.baselines.random_selector import RandomSelector
from den.baselines.routing import RoutedNetwork, Routing, RoutingConfig
from den.baselines.slim import Slim, SlimConfig, slim_path
from den.model import DEN
from den.tasks import Task

__all__ = [
    "METHODS",
    "BaselineConfig",
    "BlockDropConfig",
    "CrossStitchConfig",
    "Method",
    "NestedConfig",
    "NestedNetConfig",
    "PrunedConfig",
    "RoutingConfig",
    "SlimConfig",
    "TaskNetwork",
    "load",
    "slim_path",
    "train",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Independent,
        RandomSelector,
        Slim,
        NestedNet,
        PackNet,
        BlockDrop,
        Routing,
        CrossStitch,
        Pruned,
    )
}

_NETWORKS: dict[str, type[Any]] = {
    Independent.name: IndependentNetworks,
    CrossStitch.name: CrossStitchNetworks,
    Routing.name: RoutedNetwork,
    Pruned.name: PrunedNetwork,
}


def train(
    method: str,
    model: str,
    tasks: Sequence[Task],
    config: BaselineConfig | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Train a competitor to the end.

    Args:
        method: a key of `METHODS`.
        model: name of the backbone, as `den.create_model` takes it.
        tasks: one or several.
        config: of `METHODS[method].Config`; None: its defaults. Its `out` is the run folder.
        options: further arguments of `den.create_model`; see `Method` for ratios.
        more: source, about, on_epoch, as of `den.Trainer`.

    Returns: the run's summary, task -> policy -> plain numbers.

    Raises:
        ValueError: a method that is not there, or arguments that do not fit together.
        TypeError: a config of another method's.
        FileExistsError: the run folder holds a run already.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    return METHODS[method](model, tasks, config, options=options, **more).fit()


def load(run: str | os.PathLike[str]) -> DEN | TaskNetwork:
    """The network of a competitor's run folder, in evaluation mode.

    Raises ValueError for a folder that holds none, or a damaged one.
    """
    folder = Path(run)
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no run that can be read: {error}") from error
    network = _NETWORKS.get(config.pop("name", ""))
    if network is None:
        return checkpoint.load(folder / "checkpoint")
    try:
        built = network(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no network that can be built: {error}") from error
    checkpoint.load_tensors(built, folder / "checkpoint" / checkpoint.TENSORS)
    return built.eval()

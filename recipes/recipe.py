"""One training run as plain values, and how it is carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

import den
from den import baselines
from den.config import TrainConfig
from den.tasks import Task, load_task
from den.trainer import Trainer

OWN = {"den": "selector", "dense": "full"}  # methods that `den.Trainer` runs, and the policy that is their result


@dataclass(frozen=True)
class Recipe:
    """One run: data, model and training, and what it is an example of.

    tasks: arguments of `den.load_task` for each task by its name, without the name and the root.
    model: arguments of `den.create_model`, its name included, without the tasks.
    train: a DEN's settings. A competitor is trained alike, see `competitor`.
    scenario, scale, method, row, seed: as in a run's `about` (row: of the paper's tables; None: none of them).
    group: what the runs of one comparison share, such as "cifar10/wrn_32_4": data and backbone.
    variant: what tells runs of one method in a group apart, such as "rho0.1".
    options: settings of the competitor's own, fields of its `Config`.
    share_of: key of another recipe whose share of the full network's FLOPs, selector included, is the option `share`
        of this one: a static network at equal FLOPs.
    """

    tasks: Mapping[str, Mapping[str, Any]]
    model: Mapping[str, Any]
    train: TrainConfig
    scenario: str | None = None
    scale: str | None = None
    method: str = "den"
    seed: int = 0
    row: str | None = None
    group: str = ""
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    share_of: str | None = None

    @property
    def method_key(self) -> str:
        """The run's folder without the seed's: group, method and variant."""
        return "/".join(filter(None, (self.group, "_".join(filter(None, (self.method, self.variant))))))

    @property
    def key(self) -> str:
        """The run's folder, relative to the experiment's."""
        return f"{self.method_key}/seed{self.seed}"

    @property
    def about(self) -> dict[str, Any]:
        """For config.json. A competitor tells its policy itself."""
        told = {name: getattr(self, name) for name in ("scenario", "scale", "method", "row", "seed")}
        return {**told, "policy": OWN[self.method]} if self.method in OWN else told

    def options_of(self, task: str, data: Path | None) -> dict[str, Any]:
        """Arguments of `den.load_task` for a task whose data set is under the folder `data`."""
        return {**self.tasks[task], "root": None if data is None else str(data.absolute())}

    def load(self, data: Path | None) -> list[Task]:
        """The tasks, one of two labels as two. Raises FileNotFoundError or RuntimeError, saying how to get it, for data
        that is not there."""
        tasks = [load_task(name=name, **self.options_of(name, data)) for name in self.tasks]
        return [part for task in tasks for part in task.by_head()]

    def source(self, data: Path | None) -> dict[str, Any]:
        """For config.json: what `den eval` reads each head's images again by."""
        heads = {}
        for name in self.tasks:
            options = self.options_of(name, data)
            both = options.get("labels") == "both"
            heads.update(
                {head: {**options, "labels": head} for head in ("coarse", "fine")} if both else {name: options}
            )
        return {"tasks": heads}


def estimator_epochs(train: TrainConfig) -> int:
    """Epochs that a DEN's estimator is trained for, all stages together."""
    e = train.estimator
    return e.first_epochs + (train.stages - 1) * e.epochs + e.settle_epochs


def dense_twin(train: TrainConfig) -> TrainConfig:
    """The backbone alone, trained alike: always the full path, no selector, as many epochs of the estimator."""
    estimator = replace(
        train.estimator,
        first_epochs=estimator_epochs(train),
        settle_epochs=0,
        full_epochs=0,
        sandwich=False,
        rare_boost=0.0,
    )
    selector = replace(train.selector, epochs=0)
    return replace(
        train, tau=1.0, initial="equation_8", stages=1, target_cost=None, estimator=estimator, selector=selector
    )


def fit(
    recipe: Recipe, tasks: Sequence[Task], *, data: Path | None = None, on_epoch: Callable[..., object] | None = None
) -> den.DEN:
    """Train a recipe's model, a DEN or a dense network, on its tasks."""
    torch.manual_seed(recipe.train.seed)
    model = den.create_model(tasks={task.name: task.num_classes for task in tasks}, **recipe.model)
    source = recipe.source(data)
    Trainer(model, tasks, recipe.train, source=source, about=recipe.about, on_epoch=on_epoch).fit()
    return model.eval()


def compete(
    recipe: Recipe, tasks: Sequence[Task], *, data: Path | None = None, on_epoch: Callable[..., object] | None = None
) -> None:
    """Train a recipe's competitor: as the DEN's estimator, as many epochs, with the competitor's own options."""
    model = dict(recipe.model)
    baselines.train(
        recipe.method,
        model.pop("name"),
        tasks,
        competitor_config(recipe),
        options=model,
        source=recipe.source(data),
        about=recipe.about,
        on_epoch=on_epoch,
    )


def competitor_config(recipe: Recipe) -> baselines.BaselineConfig:
    """A competitor's settings: the DEN's where both have them, all its epochs in one schedule, and its own options."""
    kind = baselines.METHODS[recipe.method].Config
    train, estimator = recipe.train, recipe.train.estimator
    named = {f.name for f in fields(kind)}
    shared = {f.name: getattr(train, f.name) for f in fields(train) if f.name in named}
    alike = {name: getattr(estimator, name) for name in ("lr", "momentum", "weight_decay", "schedule", "patience")}
    return kind(**{**shared, **alike, "epochs": estimator_epochs(train), **recipe.options})

"""Algorithm 1 of the paper: estimator and selector trained in turn, stage by stage.

`train_estimator` and `train_selector` hold the steps, `loop` what is common to all training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch

from den.budget import Conditioning
from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from den.costs import cost_table, measure
from den.freeze import freeze
from den.joint import TaskLoss, check_joint
from den.loop import Loop, Phase, Rate
from den.model import DEN
from den.results import write_results
from den.tasks import Task
from den.train_estimator import EstimatorTraining
from den.train_selector import SelectorTraining

__all__ = ["EstimatorConfig", "SelectorConfig", "TrainConfig", "Trainer"]

WEIGHTING_RATE = 0.01  # of learned task weights: some hundred steps to follow a loss


class Trainer:
    """Trains a DEN on one or several tasks.

    Args:
        model: its tasks and classes must be those of `tasks`. One made with a budget is trained for all of them.
        tasks: every step takes a batch of each. Tasks of the same `joint` name share one path for each image.
        config: see `TrainConfig`; the defaults are the paper's, and the authors' code where that is silent.
        source: what JSON can hold about where each task's images came from, kept in config.json and the checkpoint.
        about: what JSON can hold about the experiment, kept in config.json: scenario, scale, method, policy, row, seed.
        on_epoch: called with each record of metrics.jsonl.

    Raises ValueError for a model, tasks or configuration that do not fit together.
    """

    def __init__(
        self,
        model: DEN,
        tasks: Sequence[Task],
        config: TrainConfig | None = None,
        *,
        source: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        on_epoch: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self.config = config = TrainConfig() if config is None else config
        config.check()
        _check(model, tasks, config)
        self.model = model
        self.loop = loop = Loop(model, tasks, config, source=source, about=about, on_epoch=on_epoch)
        e = config.estimator
        sgd = torch.optim.SGD(
            model.estimator.parameters(), e.lr, e.momentum, weight_decay=e.weight_decay, nesterov=e.momentum > 0
        )
        adam = torch.optim.Adam(model.selector.parameters(), config.selector.lr)
        estimator = loop.setup("estimator", model.estimator, sgd)
        selector = loop.setup("selector", model.selector, adam)
        weights = dict(zip([task.name for task in tasks], config.task_weights or [1.0] * len(tasks), strict=True))
        fixed = weighting = TaskLoss(weights, False)
        if config.weighting == "uncertainty":
            weighting = TaskLoss(weights, True).to(loop.device)
            loop.extra["weighting"] = weighting
            weighting = loop.setup("weighting", weighting, torch.optim.SGD(weighting.parameters(), WEIGHTING_RATE))
        self.estimating = EstimatorTraining(loop, model, config, estimator, selector, weighting)
        self.selecting = SelectorTraining(loop, model, config, selector, fixed)

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the summary, which is also the run folder's summary.json.

        The summary holds, for each task, what the selector, a random selector and the full path do on the test images.
        """
        loop = self.loop
        loop.open()
        self._set_costs()
        loop.run(self.phases())
        first = loop.fabric.is_global_zero
        summary = {}
        if first:
            tables = self.selecting.tables
            summary = write_results(loop.folder, freeze(self.model), loop.tasks, seed=self.config.seed, tables=tables)
        return cast(dict[str, Any], loop.fabric.broadcast(summary))

    def phases(self) -> list[Phase]:
        """Algorithm 1: in each stage an estimator phase and a selector phase; perhaps one more of the estimator's, in
        which it settles."""
        stages = range(self.config.stages)
        phases = [phase for stage in stages for phase in (self._estimator_phase(stage), self._selector_phase(stage))]
        return [*phases, self._estimator_phase(len(stages))] if self.config.estimator.settle_epochs else phases

    def _estimator_phase(self, stage: int) -> Phase:
        settings, work = self.config.estimator, self.estimating
        settling = stage == self.config.stages
        epochs = settings.settle_epochs if settling else settings.epochs if stage else settings.first_epochs
        warmup = 0.0 if stage else settings.warmup_epochs / epochs
        rates = {"estimator": _rate(settings, stage, warmup)}
        if self.config.weighting == "uncertainty":
            rates["weighting"] = Rate(WEIGHTING_RATE)
        name = "settling" if settling else f"stage {stage + 1}/{self.config.stages}"
        return Phase(
            "estimator",
            partial(work.step, stage),
            rates,
            epochs,
            stage,
            f"{name}, estimator",
            patience=settings.patience,
            begin=work.begin,
            before_update=work.before_update,
            after_update=work.after_update,
            end=work.end,
        )

    def _selector_phase(self, stage: int) -> Phase:
        settings, work = self.config.selector, self.selecting
        return Phase(
            "selector",
            partial(work.step, stage),
            {"selector": _rate(settings, stage)},
            settings.epochs,
            stage,
            f"stage {stage + 1}/{self.config.stages}, selector",
            split=settings.split,
            patience=settings.patience,
            watch="reward",
            begin=work.begin,
            end=work.end,
        )

    def _set_costs(self) -> None:
        """The cost tables of S(z), by task; times are measured once a run, by one process."""
        unit, ms = self.config.cost_unit, {}
        if unit == "latency":
            ms = self._measured()["ms"]
        tables = {}
        for task in self.loop.tasks:
            ms_BL = torch.tensor(ms[task.name]) if ms else None
            tables[task.name] = cost_table(self.model, unit, task.image_size, ms_BL).to(self.loop.device)
        self.estimating.tables = self.selecting.tables = tables
        if self.model.takes_budget:
            mean_BL = torch.stack(list(tables.values())).mean(0)  # one selector serves all tasks
            cast(Conditioning, self.model.selector.condition).cost_BL.copy_(mean_BL)

    def _measured(self) -> dict[str, Any]:
        loop, found = self.loop, None
        if loop.fabric.is_global_zero:
            path = None if loop.folder is None else loop.folder.path / "latency.json"
            if path is not None and path.exists():
                found = json.loads(path.read_text())
            else:
                found = measure(self.model, loop.tasks)
                if loop.folder is not None:
                    loop.folder.write_json("latency.json", found)
        return cast(dict[str, Any], loop.fabric.broadcast(found))


def _rate(settings: EstimatorConfig | SelectorConfig, stage: int, warmup: float = 0.0) -> Rate:
    """The rate of a stage: a factor less than in the one before, at most so many times."""
    return Rate(settings.lr * settings.decay ** min(stage, settings.decays), settings.schedule, warmup)


def _check(model: DEN, tasks: Sequence[Task], config: TrainConfig) -> None:
    """Raise ValueError unless model, tasks and configuration fit together."""
    found = {task.name: task.num_classes for task in tasks}
    if found != model.tasks:
        raise ValueError(f"tasks are {found} (classes each), but the model was made for {model.tasks}")
    if config.selector.split == "val" and any(task.val is None for task in tasks):
        raise ValueError("selector.split is 'val', but a task holds nothing out; load it with val_fraction above 0")
    if config.task_weights and len(config.task_weights) != len(tasks):
        raise ValueError(f"task_weights is {config.task_weights}; it must have a weight for each of {len(tasks)} tasks")
    if config.target_cost is not None and model.takes_budget:
        raise ValueError("target_cost is given, but the model is trained for every budget; leave it out")
    check_joint(tasks, model.config.get("task_norm", "shared"))

"""Algorithm 1 of the paper: estimator and selector trained in turn, stage by stage.

N samples, B blocks, L levels, K sampled paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from den.flops import cost_ratios
from den.freeze import freeze
from den.loop import Batch, Loop, Means, Phase, Rate
from den.losses import advantage, initial_levels, path_cost, sample_levels, selector_loss
from den.metrics import evaluate
from den.model import DEN
from den.tasks import Task

__all__ = ["EstimatorConfig", "SelectorConfig", "TrainConfig", "Trainer"]


class Trainer:
    """Trains a DEN on one or several tasks.

    Args:
        model: its tasks and classes must be those of `tasks`.
        tasks: every step takes a batch of each.
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
        found = {task.name: task.num_classes for task in tasks}
        if found != model.tasks:
            raise ValueError(f"tasks are {found} (classes each), but the model was made for {model.tasks}")
        if config.selector.split == "val" and any(task.val is None for task in tasks):
            raise ValueError("selector.split is 'val', but a task holds nothing out; load it with val_fraction above 0")
        self.model = model
        self.loop = Loop(model, tasks, config, source=source, about=about, on_epoch=on_epoch)
        self.ratio_BL = cost_ratios(model).to(self.loop.device)
        e = config.estimator
        sgd = torch.optim.SGD(
            model.estimator.parameters(), e.lr, e.momentum, weight_decay=e.weight_decay, nesterov=e.momentum > 0
        )
        adam = torch.optim.Adam(model.selector.parameters(), config.selector.lr)
        self.estimator = self.loop.setup("estimator", model.estimator, sgd)
        self.selector = self.loop.setup("selector", model.selector, adam)

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the summary, which is also the run folder's summary.json.

        The summary holds, for each task, what the selector, a random selector and the full path do on the test images.
        """
        self.loop.run(self.phases())
        summary = self._summary()
        if self.loop.folder is not None and self.loop.fabric.is_global_zero:
            self.loop.folder.write_json("summary.json", summary)
        return summary

    def phases(self) -> list[Phase]:
        """Algorithm 1: in each stage an estimator phase and a selector phase; perhaps one more of the estimator's, in
        which it settles."""
        stages = range(self.config.stages)
        phases = [phase for stage in stages for phase in (self._estimator_phase(stage), self._selector_phase(stage))]
        return [*phases, self._estimator_phase(len(stages))] if self.config.estimator.settle_epochs else phases

    def _estimator_phase(self, stage: int) -> Phase:
        settings = self.config.estimator
        settling = stage == self.config.stages
        epochs = settings.settle_epochs if settling else settings.epochs if stage else settings.first_epochs
        name = "settling" if settling else f"stage {stage + 1}/{self.config.stages}"
        return Phase(
            "estimator",
            partial(self._estimator_step, stage),
            {"estimator": _rate(settings, stage)},
            epochs,
            stage,
            f"{name}, estimator",
            patience=settings.patience,
            begin=self._begin_estimator,
        )

    def _selector_phase(self, stage: int) -> Phase:
        settings = self.config.selector
        return Phase(
            "selector",
            self._selector_step,
            {"selector": _rate(settings, stage)},
            settings.epochs,
            stage,
            f"stage {stage + 1}/{self.config.stages}, selector",
            split=settings.split,
            patience=settings.patience,
            watch="reward",
            begin=self._begin_selector,
        )

    def _begin_estimator(self) -> None:
        self.estimator.train()
        self.selector.eval()

    def _estimator_step(self, stage: int, batches: list[Batch], means: Means) -> Tensor:
        losses = []
        for task, x, y in batches:
            level_NB = self._draw(stage, x)
            logits = self.estimator(x, level_NB, task.name)
            losses.append(F.cross_entropy(logits, y))
            means.add("accuracy", 100 * (logits.argmax(1) == y).float().mean())
            means.add("cost", path_cost(level_NB, self.ratio_BL).mean())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _draw(self, stage: int, x: Tensor) -> Tensor:
        """z [N, B] from p: equation 8 in the first stage, the selector afterwards."""
        settings, generator = self.config.estimator, self.loop.generator
        shape = (len(x), self.model.num_blocks, self.model.num_levels)
        if stage == 0:
            return initial_levels(*shape, self.config.tau, generator).to(x.device)
        logits = self.selector(x)
        level_NB = logits.argmax(2) if settings.levels == "argmax" else sample_levels(logits, 1, 0.0, generator)[0]
        if settings.full_share:
            keep = torch.rand((len(x), 1), generator=generator) < settings.full_share
            level_NB = torch.where(keep.to(x.device), self.model.num_levels - 1, level_NB)
        return level_NB

    def _begin_selector(self) -> None:
        self.selector.train()
        self.estimator.eval()
        # The estimator does not change in this phase, so its fast form gives the rewards.
        self.frozen = freeze(self.model)

    def _selector_step(self, batches: list[Batch], means: Means) -> Tensor:
        settings = self.config.selector
        epsilon = settings.epsilon_decay ** (self.loop.steps("selector") + 1)
        losses = []
        for task, x, y in batches:
            logits = self.selector(x)
            level_KNB = sample_levels(logits, settings.paths, epsilon, self.loop.generator)
            task_loss_KN = self._task_loss(task.name, x, y, level_KNB)
            cost_KN = path_cost(level_KNB, self.ratio_BL)
            reward_KN = task_loss_KN + self.config.rho * cost_KN.square()
            losses.append(selector_loss(logits, level_KNB, advantage(reward_KN, settings.baseline)))
            log_C = logits.detach().log_softmax(2)
            means.add("reward", reward_KN.mean())
            means.add("cost", path_cost(logits.detach().argmax(2), self.ratio_BL).mean())
            means.add("entropy", -(log_C.exp() * log_C).sum(2).mean())
        means.add("epsilon", epsilon)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _task_loss(self, task: str, x: Tensor, y: Tensor, level_KNB: Tensor) -> Tensor:
        """Cross-entropy [K, N] of each image on each of its sampled paths."""
        k, n, _ = level_KNB.shape
        out = self.frozen(x.repeat(k, 1, 1, 1), task=task, level=level_KNB.flatten(0, 1))
        return F.cross_entropy(out.logits.float(), y.repeat(k), reduction="none").view(k, n)

    def _summary(self) -> dict[str, Any]:
        frozen = freeze(self.model)
        return {
            task.name: {
                policy: evaluate(frozen, task, policy=policy, seed=self.config.seed).summary()
                for policy in ("selector", "random", "full")
            }
            for task in self.loop.tasks
        }


def _rate(settings: EstimatorConfig | SelectorConfig, stage: int) -> Rate:
    """The rate of a stage: a factor less than in the one before, at most so many times."""
    return Rate(settings.lr * settings.decay ** min(stage, settings.decays), settings.schedule)

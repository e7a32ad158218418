"""The selector's phases of Algorithm 1 (lines 10 to 12), with what may be added to them.

N samples, B blocks, L levels, K sampled paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.budget import Conditioning, RhoControl
from den.config import TrainConfig
from den.freeze import freeze
from den.joint import Part, TaskLoss, parts
from den.loop import Batch, Loop, Means
from den.losses import (
    entropy,
    expected_square_cost,
    gumbel_gates,
    leave_one_out,
    path_cost,
    sample_levels,
    selector_loss,
    sparsity,
)
from den.model import DEN
from den.tasks import Task
from den.train_estimator import draw_budgets

MOVING = 0.1  # share of a step's reward in the moving average: about the last ten steps
CALIBRATION = 1024  # images of each task, at most


class MovingBaseline(nn.Module):
    """A running mean of each part's rewards; the first one's own mean to begin with."""

    mean: Tensor

    def __init__(self, count: int):
        super().__init__()
        self.register_buffer("mean", torch.full((count,), float("nan")))

    @torch.no_grad()
    def subtract(self, index: int, reward_KN: Tensor, mean: Tensor) -> Tensor:
        """Rewards less the average of the steps before; `mean` of this step's, over all processes, joins it."""
        before = torch.where(self.mean[index].isnan(), mean, self.mean[index])
        self.mean[index] = torch.lerp(before, mean, MOVING)
        return reward_KN - before


class SelectorTraining:
    """Steps of the selector on a fixed estimator.

    Args:
        loop: where `selector` is set up.
        selector: as the loop's `setup` gave it.
        weighting: its fixed weights are those of the rewards.
    """

    def __init__(self, loop: Loop, model: DEN, config: TrainConfig, selector: nn.Module, weighting: TaskLoss) -> None:
        self.loop, self.model, self.config, self.settings = loop, model, config, config.selector
        self.selector, self.weighting = selector, weighting
        self.tables: Mapping[str, Tensor] = {}
        self.control = RhoControl(config.rho, config.target_cost, config.dual_rate, model.takes_budget).to(loop.device)
        self.moving = MovingBaseline(len(loop.tasks)).to(loop.device)
        loop.extra.update(control=self.control, moving=self.moving)

    def begin(self) -> None:
        """Before a phase."""
        self.selector.train()
        self.model.estimator.eval()
        # The estimator does not change in this phase, so its fast form gives the rewards.
        if self.settings.gradient == "policy":
            half = self.config.precision.startswith("bf16")
            self.frozen = freeze(self.model, torch.bfloat16 if half else None)
        else:
            self.model.estimator.requires_grad_(False)

    def step(self, stage: int, batches: list[Batch], means: Means) -> Tensor:
        """A scalar whose gradient is equation 7, or takes its place."""
        losses = []
        for index, part in enumerate(parts(batches)):
            table_BL = self.tables[part.names[0]]
            budget_N = draw_budgets(self.loop, len(part.x)) if self.model.takes_budget else None
            logits = self.selector(part.x) if budget_N is None else self.selector(part.x, budget_N)
            rho = self.control.rho(budget_N)
            if self.settings.gradient == "policy":
                loss, reward = self._policy(index, part, logits, rho, table_BL, means)
            else:
                loss, reward = self._gumbel(stage, part, logits, rho, table_BL)
            if self.settings.entropy:
                loss = loss - self.settings.entropy * entropy(logits).mean()
            losses.append(loss)
            level_NB = logits.detach().argmax(2)
            cost_N = path_cost(level_NB, table_BL)
            self.control.update(self.loop.of_all(cost_N), None if budget_N is None else self.loop.of_all(budget_N))
            means.add("reward", reward.mean())
            means.add("cost", cost_N.mean())
            means.add_usage(F.one_hot(level_NB, self.model.num_levels).sum((0, 1)))
            means.add("entropy", entropy(logits.detach()).mean())
            if self.control.fixed is None:
                means.add("rho", cast(Tensor, rho).mean())
        return torch.stack(losses).mean()

    def _policy(
        self, index: int, part: Part, logits: Tensor, rho: Tensor | float, table_BL: Tensor, means: Means
    ) -> tuple[Tensor, Tensor]:
        """Policy gradient; returns the scalar and the rewards [K, N]."""
        settings, paths = self.settings, self.settings.paths
        epsilon = settings.epsilon_decay ** (self.loop.steps("selector") + 1)
        means.add("epsilon", epsilon)
        level_KNB = sample_levels(self.loop.of_all(logits.detach()), paths, epsilon, self.loop.generator)
        level_KNB = self.loop.mine(level_KNB, 1)
        asked = level_KNB
        if settings.baseline == "self_critical":
            asked = torch.cat([level_KNB, logits.detach().argmax(2)[None]])
        task_loss = self._task_loss(part, asked)
        reward = task_loss + sparsity(asked, table_BL, rho)
        signal = task_loss if settings.cost == "expected" else reward
        loss = selector_loss(logits, level_KNB, self._advantage(index, signal))
        if settings.cost == "expected":
            loss = loss + (rho * expected_square_cost(logits, table_BL)).mean()
        return loss, reward[:paths]

    def _advantage(self, index: int, signal: Tensor) -> Tensor:
        """What paths cost, [K, N], less the baseline; for self_critical, signal has the argmax path's row behind."""
        baseline = self.settings.baseline
        if baseline == "leave_one_out":
            return leave_one_out(signal)
        if baseline == "self_critical":
            return signal[:-1] - signal[-1]
        if baseline == "moving_average":
            mean = cast(Tensor, self.loop.fabric.all_reduce(signal.mean().clone(), reduce_op="mean"))
            return self.moving.subtract(index, signal, mean)
        return signal

    @torch.no_grad()
    def _task_loss(self, part: Part, level_KNB: Tensor) -> Tensor:
        """Cross-entropy [K, N] of each image on each of its sampled paths."""
        k, n, _ = level_KNB.shape
        outputs = self.frozen.forward_tasks(part.x.repeat(k, 1, 1, 1), part.names, level_KNB.flatten(0, 1))
        logits = [outputs[name].logits for name in part.names]
        return self.weighting.of_images(logits, part, k).view(k, n)

    def _gumbel(
        self, stage: int, part: Part, logits: Tensor, rho: Tensor | float, table_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Straight-through Gumbel-softmax; returns the loss and each image's part of it, [N]."""
        n, blocks, levels = logits.shape
        uniform = torch.rand((n * self.loop.fabric.world_size, blocks, levels), generator=self.loop.generator)
        gate_NBL = gumbel_gates(logits.float(), self._temperature(stage), self.loop.mine(uniform).to(logits.device))
        outputs = self.model.estimator(part.x, gate_NBL.argmax(2), part.names, gate_NBL)
        square_N = (gate_NBL * table_BL).sum(2).mean(1).square()
        if self.settings.cost == "expected":
            square_N = expected_square_cost(logits, table_BL)
        loss_N = self.weighting.of_images(outputs, part) + rho * square_N
        return loss_N.mean(), loss_N.detach()

    def _temperature(self, stage: int) -> float:
        settings = self.settings
        last = max(1, self.config.stages * settings.epochs - 1)
        done = (stage * settings.epochs + self.loop.position.epoch) / last
        return settings.temperature * (settings.temperature_end / settings.temperature) ** done

    @torch.no_grad()
    def end(self) -> None:
        """Calibrate the prices of a selector that takes a budget."""
        if not self.model.takes_budget:
            return
        self.model.selector.eval()
        x_of_task = [self._calibration_images(task) for task in self.loop.tasks]
        condition = cast(Conditioning, self.model.selector.condition)
        sizes = [len(x) for x in x_of_task]

        def logits_at(budget_N: Tensor) -> Tensor:
            asked = budget_N.split([size * self.loop.fabric.world_size for size in sizes])
            chunks = [self.model.selector(x, self.loop.mine(b)) for x, b in zip(x_of_task, asked, strict=True)]
            return torch.cat([self.loop.of_all(chunk) for chunk in chunks])

        condition.calibrate(logits_at, sum(sizes) * self.loop.fabric.world_size)

    def _calibration_images(self, task: Task) -> Tensor:
        """Some of the images that the selector learns from, as they are evaluated: this process's share."""
        world, rank = self.loop.fabric.world_size, self.loop.fabric.global_rank
        count = min(CALIBRATION, len(task.split(self.settings.split))) // world
        batches = task.batches(
            self.settings.split, count, training=False, seed=self.config.seed, device=self.loop.device,
            share=(rank, world),
        )  # fmt: skip
        return next(iter(batches))[0]

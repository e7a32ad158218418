"""The estimator's phases of Algorithm 1 (lines 5 to 8), with what may be added to them.

N samples, B blocks, L levels, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import den_kernels as dk
from den.blocks import Block
from den.budget import LEAST
from den.config import TrainConfig
from den.joint import Part, TaskLoss, parts
from den.loop import Batch, Loop, Means
from den.losses import initial_levels, path_cost, sample_levels, soft_cross_entropy
from den.model import DEN

MAX_BOOST = 10.0


class EstimatorTraining:
    """Steps of the estimator.

    Args:
        loop: where `estimator` and, with learned task weights, `weighting` are set up.
        estimator, selector, weighting: as the loop's `setup` gave them.
        tables: of the costs, by task.
    """

    def __init__(
        self,
        loop: Loop,
        model: DEN,
        config: TrainConfig,
        estimator: nn.Module,
        selector: nn.Module,
        weighting: TaskLoss,
    ) -> None:
        self.loop, self.model, self.config, self.settings = loop, model, config, config.estimator
        self.estimator, self.selector, self.weighting = estimator, selector, weighting
        self.tables: Mapping[str, Tensor] = {}
        self.usage_BL = torch.zeros(model.num_blocks, model.num_levels, device=loop.device)
        self.average = None
        if self.settings.ema:
            decay = get_ema_multi_avg_fn(self.settings.ema)
            self.average = AveragedModel(model.estimator, multi_avg_fn=decay, use_buffers=True)
            loop.extra["average"] = self.average

    def begin(self) -> None:
        """Before a phase."""
        self.model.estimator.requires_grad_(True)
        self.estimator.train()
        self.selector.eval()

    def step(self, stage: int, batches: list[Batch], means: Means) -> Tensor:
        """The loss of equation 4 on a batch of each task."""
        self.usage_BL.zero_()
        losses: dict[str, Tensor] = {}
        for part in parts(batches):
            level_NB = self._levels(stage, part.x)
            if self.settings.sandwich:
                settles = self._settles(stage)
                level_NB = level_NB if settles else self._mixed(level_NB)
                losses.update(self._sandwich(part, level_NB, settles, means))
            else:
                logits = self.estimator(part.x, level_NB, part.names)
                losses.update(self._cross_entropy(part, logits, means))
            self._count(part, level_NB, means)
        return self.weighting(losses)

    def _settles(self, stage: int) -> bool:
        return stage == self.config.stages

    def _cross_entropy(self, part: Part, logits: tuple[Tensor, ...], means: Means) -> dict[str, Tensor]:
        for l, y in zip(logits, part.labels, strict=True):
            means.add("accuracy", 100 * (l.argmax(1) == y).float().mean())
        smoothing = self.settings.label_smoothing
        return {
            name: F.cross_entropy(l, y, label_smoothing=smoothing)
            for name, l, y in zip(part.names, logits, part.labels, strict=True)
        }

    def _sandwich(self, part: Part, level_NB: Tensor, labelled: bool, means: Means) -> dict[str, Tensor]:
        """The full path on the labels, and the given paths on what it says: one batch of twice the images.

        labelled: the given paths learn from the labels too.
        """
        full_NB = torch.full_like(level_NB, self.model.num_levels - 1)
        both = self.estimator(torch.cat([part.x, part.x]), torch.cat([full_NB, level_NB]), part.names)
        full, other = zip(*(logits.chunk(2) for logits in both), strict=True)
        losses = self._cross_entropy(part, full, means)
        for name, teacher, student, y in zip(part.names, full, other, part.labels, strict=True):
            losses[name] = losses[name] + soft_cross_entropy(student, teacher)
            if labelled:
                losses[name] = losses[name] + F.cross_entropy(student, y, label_smoothing=self.settings.label_smoothing)
            means.add("small_accuracy", 100 * (student.argmax(1) == y).float().mean())
        return losses

    # Paths

    @torch.no_grad()
    def _levels(self, stage: int, x: Tensor) -> Tensor:
        """z [N, B] from p: equation 8 in the first stage (unless `initial` says otherwise), the selector afterwards."""
        settings, generator, top = self.settings, self.loop.generator, self.model.num_levels - 1
        n, blocks = len(x), self.model.num_blocks
        everywhere = n * self.loop.fabric.world_size
        if stage == 0 and self.loop.position.epoch < settings.full_epochs:
            return torch.full((n, blocks), top, device=x.device)
        if stage == 0 and self.config.initial == "equation_8":
            drawn = initial_levels(everywhere, blocks, top + 1, self.config.tau, generator)
            return self.loop.mine(drawn).to(x.device)
        logits = self.loop.of_all(self._logits(x))
        as_it_runs = settings.levels == "argmax" or self._settles(stage)
        level_NB = logits.argmax(2) if as_it_runs else sample_levels(logits, 1, 0.0, generator)[0]
        if settings.full_share and stage:
            keep = torch.rand((everywhere, 1), generator=generator) < settings.full_share
            level_NB = torch.where(keep.to(x.device), top, level_NB)
        return self.loop.mine(level_NB)

    def _logits(self, x: Tensor) -> Tensor:
        if not self.model.takes_budget:
            return self.selector(x)
        return self.selector(x, draw_budgets(self.loop, len(x)))

    def _mixed(self, drawn_NB: Tensor) -> Tensor:
        """A third of the images on the smallest path, a third on any, a third as drawn."""
        n, blocks = drawn_NB.shape[0] * self.loop.fabric.world_size, drawn_NB.shape[1]
        generator = self.loop.generator
        kind = self.loop.mine(torch.randint(3, (n, 1), generator=generator)).to(drawn_NB.device)
        any_NB = self.loop.mine(torch.randint(self.model.num_levels, (n, blocks), generator=generator))
        smaller = torch.where(kind == 0, 0, any_NB.to(drawn_NB.device))
        return torch.where(kind == 2, drawn_NB, smaller)

    def _count(self, part: Part, level_NB: Tensor, means: Means) -> None:
        cost = path_cost(level_NB, self.tables[part.names[0]]).mean()
        used_BL = F.one_hot(level_NB, self.model.num_levels).sum(0).float()
        if self.settings.sandwich:
            means.add("cost", (1 + cost) / 2)  # of both halves of the batch
            used_BL[:, -1] += len(level_NB)
        else:
            means.add("cost", cost)
        self.usage_BL += used_BL
        means.add_usage(used_BL.sum(0))

    # Around the optimizer

    @torch.no_grad()
    def before_update(self) -> None:
        """Raise the gradients of channels that few images ran; see `rare_boost`."""
        if not self.settings.rare_boost:
            return
        usage_BL = self.loop.fabric.all_reduce(self.usage_BL, reduce_op="sum")
        for block, used_L in zip(self.model.estimator.blocks, cast(Tensor, usage_BL), strict=True):
            ran_L = used_L.flip(0).cumsum(0).flip(0) / used_L.sum()  # share of the images at level l or above
            for layer in cast(Block, block).modules():
                if isinstance(layer, (dk.DENConv2d, dk.DENLinear)) and layer.weight.grad is not None:
                    share = channel_shares(layer, ran_L)
                    layer.weight.grad *= share.clamp(min=1e-9).pow(-self.settings.rare_boost).clamp(max=MAX_BOOST)

    def after_update(self) -> None:
        """Follow the weights with their running average."""
        if self.average is not None:
            self.average.update_parameters(self.model.estimator)

    @torch.no_grad()
    def end(self) -> None:
        """The phase ends on the average, and the next one begins another."""
        if self.average is not None and int(self.average.n_averaged):
            self.model.estimator.load_state_dict(self.average.module.state_dict())
            self.average.n_averaged.zero_()


def channel_shares(layer: dk.DENConv2d | dk.DENLinear, ran_L: Tensor) -> Tensor:
    """Share of the images that ran each weight of an elastic layer, to broadcast over `layer.weight`.

    ran_L: share of them at level l or above. A channel is run from the first level whose width exceeds it.
    """
    share = torch.ones((), device=ran_L.device)
    tables = ((layer.out_widths, layer.weight.shape[0], 0), (layer.in_widths, layer.weight.shape[1], 1))
    for widths_L, channels, dim in tables:
        if widths_L is None or (dim == 1 and getattr(layer, "groups", 1) > 1):
            continue
        channel_C = torch.arange(channels, device=ran_L.device)
        share_C = ran_L[torch.bucketize(channel_C, widths_L.long(), right=True)]
        share = torch.minimum(share, share_C.view(-1, *[1] * (layer.weight.dim() - 1 - dim)))
    return share


def draw_budgets(loop: Loop, count: int) -> Tensor:
    """A budget for each image of this process, uniform from `LEAST` to 1: [count]."""
    drawn = torch.rand(count * loop.fabric.world_size, generator=loop.generator)
    return (LEAST + (1 - LEAST) * loop.mine(drawn)).to(loop.device)

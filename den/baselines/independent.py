"""Independent networks: the backbone once for each task, nothing shared. The paper's "Baseline" in Tables 2 and 4.

N samples, B blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from den.baselines.base import Method, TaskNetwork, supervised
from den.estimator import Estimator
from den.flops import count_parameters, full_macs
from den.loop import Phase
from den.model import DENOutput, LevelLike, check_task, create_model


class IndependentNetworks(TaskNetwork):
    """A whole backbone for each task.

    Args:
        model: name of the backbone.
        tasks: number of classes of each.
        options: further arguments of `den.create_model`.
    """

    def __init__(self, model: str, tasks: Mapping[str, int], options: Mapping[str, Any]):
        super().__init__()
        self.config = {"name": Independent.name, "model": model, "tasks": dict(tasks), "options": dict(options)}
        self.tasks = dict(tasks)
        more = {**options, "ratios": (1,), "selector": "light"}
        estimators = {task: create_model(model, {task: classes}, **more).estimator for task, classes in tasks.items()}
        self.networks = nn.ModuleDict(estimators)
        self.num_blocks, self.num_levels = next(iter(estimators.values())).num_blocks, 1

    def forward(self, x: Tensor, task: str, level: LevelLike | None = None) -> DENOutput:
        task = check_task(task, self.tasks)
        level_NB = self.full(x, level)
        return DENOutput(self.networks[task](x, level_NB, task), level_NB, None)

    def account(self, level_NB: Tensor, image_size: tuple[int, int]) -> dict[str, Any]:
        estimators = [cast(Estimator, network) for network in self.networks.values()]
        return whole(level_NB, image_size, estimators[:1], stored=len(estimators))


def whole(level_NB: Tensor, image_size: tuple[int, int], run: Sequence[Estimator], stored: int) -> dict[str, Any]:
    """What images cost that run these estimators in full, of so many alike that are stored."""
    macs = sum(full_macs(estimator, image_size) for estimator in run)
    parameters = sum(count_parameters(estimator) for estimator in run)
    samples = len(level_NB)
    return {
        "cost": torch.ones(samples),
        "flops": torch.full((samples,), 2 * macs),
        "parameters": torch.full((samples,), parameters),
        "stored_parameters": stored * count_parameters(run[0]),
    }


class Independent(Method):
    """Each network is trained as if it were alone: the losses are added up, and no weight is in two of them."""

    name = "independent"

    def build(self) -> TaskNetwork:
        return IndependentNetworks(self.model_name, {t.name: t.num_classes for t in self.tasks}, self.options)

    def set_up(self) -> None:
        self.net = self.loop.setup("network", self.network, self.sgd(self.network.parameters()))

    def phases(self) -> list[Phase]:
        step = supervised(lambda batch: self.net(batch.x, batch.task.name).logits, total=True)
        return [self.weights_phase("network", step, begin=self.net.train)]

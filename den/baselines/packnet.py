"""PackNet* : the paper's group-wise variant of PackNet (Mallya and Lazebnik 2018). Tasks are learned one after another,
each into channel groups of its own beside those of the tasks before, which it reads and does not change.

"When updating the i-th level of hierarchy, [...] PackNet* considers parameters except those in the (i-1)-th level"
(section 4.1).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import den_kernels as dk
from den.baselines.base import supervised
from den.baselines.nestednet import Nested, NestedConfig
from den.estimator import Estimator
from den.loop import Phase


class PackNet(Nested):
    """A phase for each task of `order`: task t trains the groups that level t adds to level t - 1, its batch norm and
    its head. Stem, shortcuts and what else has no levels are the first task's."""

    name = "packnet"
    one_process = True  # a phase is one task's, without the other tasks' heads
    Config = NestedConfig

    def phases(self) -> list[Phase]:
        return [
            self.weights_phase(
                "network",
                supervised(self.logits),
                stage=level,
                title=task,
                tasks=[task],
                begin=partial(self._begin, task, level),
                after_update=self._restore,
                end=partial(self.forget, "network"),  # the next task starts with no momentum
            )
            for task, level in self.level.items()
        ]

    @torch.no_grad()
    def _begin(self, task: str, level: int) -> None:
        self.net.train()
        self.owned = owned(self.network.estimator, task, level)
        self.kept = {name: p.clone() for name, p in self.network.estimator.named_parameters()}

    @torch.no_grad()
    def _restore(self) -> None:
        """Put back, bit for bit, what weight decay or momentum did to weights that are not the task's."""
        for name, parameter in self.network.estimator.named_parameters():
            parameter.copy_(torch.where(self.owned[name], parameter, self.kept[name]))


def owned(estimator: Estimator, task: str, level: int) -> dict[str, Tensor]:
    """Which weights a task trains whose level is `level`: a boolean mask for each parameter, by its name.

    Those that the level runs and the level below does not; of the first level (0), also all that have no levels.
    """
    masks = {}
    for prefix, module in estimator.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}"
            if prefix.startswith("heads."):
                mask = torch.full_like(parameter, prefix == f"heads.{task}", dtype=torch.bool)
            elif isinstance(module, dk.DENBatchNorm2d):
                mask = torch.zeros_like(parameter, dtype=torch.bool)
                mask[module._rows(estimator.set_index[task])] = True
            else:
                mask = _run(module, parameter, level)
                if level > 0:
                    mask &= ~_run(module, parameter, level - 1)
            masks[full_name] = mask
    return masks


def _run(module: nn.Module, parameter: Tensor, level: int) -> Tensor:
    """Which entries of a layer's weight or bias a level runs."""
    mask = torch.ones_like(parameter, dtype=torch.bool)
    if not isinstance(module, (dk.DENConv2d, dk.DENLinear)):
        return mask
    if module.out_widths is not None:
        mask[int(module.out_widths[level]) :] = False
    if module.in_widths is not None and parameter.dim() > 1 and getattr(module, "groups", 1) == 1:
        mask[:, int(module.in_widths[level]) :] = False
    return mask

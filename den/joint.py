"""The parts of a step, each a batch of images that take one path each: of one task, or of several that label the same
images (scenario M3).

N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.data import ImageSet
from den.loop import Batch
from den.tasks import Task


@dataclass
class Part:
    """Images x [N, C, H, W] and, for each of the tasks that read their path, labels [N]."""

    tasks: tuple[Task, ...]
    x: Tensor
    labels: tuple[Tensor, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The heads that read the path."""
        return tuple(task.name for task in self.tasks)


def parts(batches: Sequence[Batch]) -> list[Part]:
    """Batches by task, those of jointly labelled images as one."""
    found: dict[str, list[Batch]] = {}
    for batch in batches:
        key = f"task {batch.task.name}" if batch.task.joint is None else f"joint {batch.task.joint}"
        found.setdefault(key, []).append(batch)
    return [Part(tuple(b.task for b in group), group[0].x, tuple(b.y for b in group)) for group in found.values()]


def check_joint(tasks: Sequence[Task], task_norm: str) -> None:
    """Raise ValueError unless the tasks of each joint group have the same images in the same order.

    Then their batches, which depend on the seed and the number of images alone, hold the same images too.
    """
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        if task.joint is not None:
            groups.setdefault(task.joint, []).append(task)
    for name, group in groups.items():
        first = group[0]
        for other in group[1:]:
            alike = all(_same(getattr(first, split), getattr(other, split)) for split in ("train", "val", "test"))
            if not alike or first.augment != other.augment or (first.mean, first.std) != (other.mean, other.std):
                raise ValueError(f"tasks {first.name!r} and {other.name!r} are joint {name!r}, but their images differ")
        if len(group) > 1 and task_norm == "per_task":
            raise ValueError(f"tasks of joint {name!r} share each path, so task_norm must be 'shared'")


def _same(one, other) -> bool:
    if isinstance(one, ImageSet) and isinstance(other, ImageSet):
        return one.images.shape == other.images.shape and torch.equal(one.images, other.images)
    return (one is None) == (other is None) and (one is None or len(one) == len(other))


class TaskLoss(nn.Module):
    """One number of several tasks' losses: their mean, weighted by given or by learned weights.

    uncertainty: task t counts exp(-s_t) with s_t = log variance learned, at the price of s_t / 2 (Kendall, Gal and
    Cipolla 2018, equation 10: noise of a task lowers its weight). All s_t begin at 0.
    """

    def __init__(self, weights: Mapping[str, float], uncertainty: bool):
        super().__init__()
        self.weights = dict(weights)
        self.order = {name: index for index, name in enumerate(weights)}
        self.log_variance = nn.Parameter(torch.zeros(len(weights))) if uncertainty else None

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Scalar losses by task -> a scalar."""
        terms = [self.weights[name] * loss for name, loss in losses.items()]
        if self.log_variance is not None:
            s = self.log_variance
            terms = [
                torch.exp(-s[self.order[name]]) * term + s[self.order[name]] / 2
                for name, term in zip(losses, terms, strict=True)
            ]
        return torch.stack(terms).mean()

    def of_images(self, logits: Sequence[Tensor], part: Part, repeats: int = 1) -> Tensor:
        """Cross-entropy of each image, the weighted mean over the part's tasks: [repeats * N]."""
        losses = [
            self.weights[name] * F.cross_entropy(l.float(), y.repeat(repeats), reduction="none")
            for name, l, y in zip(part.names, logits, part.labels, strict=True)
        ]
        return torch.stack(losses).mean(0)

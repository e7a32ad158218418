"""Calls of a frozen model that only run: what each would check and look up is kept, by task and form of the images.

Behind the weights of a network little of Python is left in the caches, and each of its steps is read from memory again:
of a call that takes 4 ms, 0.3.

Suffixes: N samples, B blocks, L levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from den.estimator import stem_stride
from den.model import DENOutput, LevelLike, check_images, check_level, check_task
from den.selector import mask_levels
from den.trunk import Bound
from den_kernels.packed import changes
from den_kernels.unwatched import unwatched

if TYPE_CHECKING:
    from den.freeze import FrozenDEN

_MOST_KEPT = 64  # forms of images


class BoundCalls:
    """The calls of one frozen model, for as long as none of its layers changes."""

    def __init__(self) -> None:
        self._changes = -1
        self._kept: dict[tuple, BoundCall | None] = {}

    def __reduce__(self) -> tuple:
        return BoundCalls, ()  # what is kept belongs to the model itself, not to its copies

    def find(self, model: FrozenDEN, x: Tensor, task: str | None) -> BoundCall | None:
        """The call for images like x; None where it is to be made in full. Raises as `DEN.forward` does."""
        if not unwatched(x):
            return None
        kept = self._kept
        if self._changes != changes() or len(kept) > _MOST_KEPT:
            self._changes, self._kept = changes(), {}
            kept = self._kept
        key = task, x.shape, x.dtype, x.device
        call = kept.get(key)
        if key not in kept or (call is not None and not call.is_of(model)):
            call = kept[key] = bind_call(model, x, task)
        return call


class BoundCall:
    """A call for one task and for images of one shape and dtype."""

    def __init__(self, model: FrozenDEN, task: str, run: Bound, choose: Bound | None):
        self._task, self._run, self._choose = task, run, choose
        self._selector, self._head = model.selector, model.heads[task]
        self._blocks, self._levels = model.num_blocks, model.num_levels

    def is_of(self, model: FrozenDEN) -> bool:
        """Whether the model has the selector and the head that this call is made of."""
        return model.selector is self._selector and model.heads[self._task] is self._head

    def __call__(self, x: Tensor, level: LevelLike | None) -> DENOutput:
        """As `FrozenDEN.forward`, for the task."""
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        if level is not None:
            level_NB = check_level(level, x, self._blocks, self._levels, checked_later=True).contiguous()
            return DENOutput(self._run(x, level_NB), level_NB, None)
        level_probs = self._logits(x).softmax(2, dtype=torch.float32)
        level_NB = level_probs.argmax(2)
        return DENOutput(self._run(x, level_NB), level_NB, level_probs)

    def _logits(self, x: Tensor) -> Tensor:
        selector = self._selector
        if self._choose is None or selector._forward_hooks or selector._forward_pre_hooks:
            return selector(x)
        return mask_levels(self._choose(x, None), self._blocks, cast("Tensor | None", selector.level_mask))


def bind_call(model: FrozenDEN, x: Tensor, task: str | None) -> BoundCall | None:
    """The call for a task and images like x; None where images are converted, or the network is not one chain of blocks
    that all have levels."""
    from den.freeze import FrozenSelector

    task = check_task(task, model.tasks)
    check_images(x, model.in_channels, model.device, "this model was frozen for")
    all_blocks = [list(range(model.num_blocks))]
    if model.calls is not None or x.dtype != model.dtype or model.trunk.rows != all_blocks:
        return None
    stride = stem_stride(x.shape[2], x.shape[3], model.base_size)
    run = model.trunk.bind(x, model.set_index[task], stride, model.heads[task])
    if run is None:
        return None
    return BoundCall(model, task, run, model.selector.bind(x) if isinstance(model.selector, FrozenSelector) else None)

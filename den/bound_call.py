"""Calls of a frozen model that only run: what each would check and look up is kept, by task and form of the images.

Behind the weights of a network little of Python is left in the caches, and each of its steps is read from memory again.

Suffixes: N samples, B blocks, L levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from den.estimator import stem_stride
from den.model import DENOutput, LevelLike, check_images, check_level, check_task
from den.selector import mask_levels
from den_kernels.fused_chain import Bound
from den_kernels.packed import changes
from den_kernels.unwatched import unwatched

if TYPE_CHECKING:
    from den.freeze import FrozenDEN

_MOST_KEPT = 64  # forms of images


class BoundCalls:
    """The calls of one frozen model whose trunk binds, for as long as no layer changes."""

    def __init__(self) -> None:
        self._changes = -1
        self._kept: dict[tuple, BoundCall | None] = {}

    def __reduce__(self) -> tuple:
        return BoundCalls, ()  # what is kept belongs to the model itself, not to its copies

    def find(self, model: FrozenDEN, x: Tensor, task: str | None) -> BoundCall | None:
        """The call for images like x; None where it is to be made in full. Raises as `DEN.forward` does."""
        if not unwatched(x):
            return None
        count = changes()
        if self._changes != count or len(self._kept) > _MOST_KEPT:
            self._kept = {}
            self._changes = count  # last: other threads then find nothing old
        kept = self._kept
        key = task, x.shape, x.dtype, x.device
        call = kept.get(key)
        if key not in kept or (call is not None and not call.is_of(model)):
            call = kept[key] = bind_call(model, x, task)
        return call


class BoundCall:
    """A call for one task and for images of one shape and dtype.

    run: the network, of images and levels. choose: its selector, of images; None where that is to be called itself.
    """

    def __init__(self, model: FrozenDEN, task: str, run: Bound, choose: Bound | None):
        self._task, self._run, self._choose = task, run, choose
        self._dtype = model.dtype
        self._head, self._selector = model.heads[task], model.selector
        self._selector_head = getattr(model.selector, "head", None)
        self._blocks, self._levels = model.num_blocks, model.num_levels

    def is_of(self, model: FrozenDEN) -> bool:
        """Whether the model has the parts that this call is made of."""
        selector = model.selector
        return (
            model.heads[self._task] is self._head
            and selector is self._selector
            and (self._choose is None or selector.head is self._selector_head)
        )

    def takes(self, level: LevelLike | None) -> bool:
        """Whether it serves such levels, None for the selector's."""
        if level is not None:
            return type(level) is Tensor or not isinstance(level, Tensor)
        hooked = self._selector._forward_hooks or self._selector._forward_pre_hooks or _has_any_global_hook()
        return self._choose is not None and not hooked

    def __call__(self, x: Tensor, level: LevelLike | None) -> DENOutput:
        """As `FrozenDEN.forward`, for the task."""
        if x.dtype is not self._dtype or not x.is_contiguous(memory_format=torch.channels_last):
            x = x.to(self._dtype, memory_format=torch.channels_last)
        if level is not None:
            level_NB = check_level(level, x, self._blocks, self._levels, checked_later=True).contiguous()
            return DENOutput(self._run(x, level_NB), level_NB, None)
        mask_BL = cast("Tensor | None", self._selector.level_mask)
        level_probs = mask_levels(cast(Bound, self._choose)(x, None), self._blocks, mask_BL)
        level_probs = level_probs.softmax(2, dtype=torch.float32)
        level_NB = level_probs.argmax(2)
        return DENOutput(self._run(x, level_NB), level_NB, level_probs)


def bind_call(model: FrozenDEN, x: Tensor, task: str | None) -> BoundCall | None:
    """The call for a task and images like x; None where a part of the model is to be called in full."""
    from den.freeze import FrozenSelector

    task = check_task(task, model.tasks)
    check_images(x, model.in_channels, model.device, "this model was frozen for")
    x = x.to(model.dtype)  # as the call does
    stride = stem_stride(x.shape[2], x.shape[3], model.base_size)
    run = model.trunk.bind(x, model.set_index[task], stride, model.heads[task])
    if run is None:
        return None
    # A class of the caller's may do more.
    return BoundCall(model, task, run, model.selector.bind(x) if type(model.selector) is FrozenSelector else None)

"""The inference form of a DEN: norms folded, weights packed, residual blocks chained in one operator call.

A new kind of block, tail or selector joins by registering with `freeze_block`, `freeze_tail` or `freeze_selector`.

Suffixes: N samples, C channels, H W space, B blocks, L levels, T sets of batch-norm statistics.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import den_kernels as dk
from den.blocks.base import Block
from den.blocks.forms import FreezeOptions, freeze_block, tables
from den.bound_call import BoundCalls
from den.budget import Budget
from den.cuda_graph import StaticCalls, check_batches, check_capturable
from den.estimator import HiddenTail, PoolTail, Stem, Tail, stem_stride
from den.model import DEN, DENOutput, LevelLike, check_choice, check_images, check_task, check_tasks, choose
from den.selector import Selector, SelectorBlock, budget_of, mask_levels, read_head, shrink
from den.trunk import Trunk, first_conv, last_linear
from den_kernels.fused_chain import Bound


def freeze(
    model: DEN,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    *,
    winograd: bool = True,
    cuda_graph: bool | Sequence[int] = False,
) -> FrozenDEN:
    """The inference form of a model, on the model's device, with copies of its weights.

    Batch norms, with their running statistics whatever mode the model is in, become a scale and shift by level;
    residual blocks become one fused operator each, at the level of each sample. Nothing in a call waits for a GPU, so
    that a call can be captured in a CUDA graph and replayed with other images and levels.

    Args:
        model: a DEN.
        dtype: of weights and activations; None: the model's, in which the norms are folded too.
        backend: of `den_kernels`; "auto" takes the fastest on this machine.
        winograd: let the CPU kernels compute 3x3 convolutions of stride 1 by Winograd's algorithm: faster, with a
            largest error near 1e-5 of the largest value in place of 1e-6 (float32).
        cuda_graph: replay each call, selector included, as one CUDA graph. True: for batches of the first call's size;
            or the batch sizes to allow, such as (1, 64). Images are all of the first call's height and width; another
            size is a ValueError. Each batch size is captured at its first call, for each task, and once more where the
            caller gives the levels. Use one stream at a time.

    Returns: a module called like the model, with the same `DENOutput` (logits in `dtype`).

    Raises:
        TypeError: model is not a DEN, dtype not a floating-point dtype, cuda_graph neither a bool nor batch sizes, or a
            block of a kind that cannot be frozen.
        ValueError: cuda_graph holds a batch size below 1.
        RuntimeError: a backend asked for by name cannot be used here; cuda_graph for a model that is not on a GPU, or
            whose blocks run on another backend than "triton".
    """
    if not isinstance(model, DEN):
        raise TypeError(f"model is a {type(model).__name__}; it must be a den.DEN")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}; it must be a floating-point dtype such as torch.bfloat16")
    batches = None if cuda_graph is False else check_batches(cuda_graph)
    with torch.no_grad():
        dtype = dtype or next(model.estimator.parameters()).dtype
        if batches is not None:
            check_capturable(model.estimator.device, ())  # before the work of freezing
        frozen = FrozenDEN(model, FreezeOptions(dtype, winograd, backend))
    if batches is not None:
        kinds = (dk.FusedResidualBlock, dk.FusedConv2d)
        fused = (module for module in frozen.modules() if isinstance(module, kinds))
        check_capturable(frozen.device, [block.backend for block in fused])
        frozen.calls = StaticCalls(batches, dtype)
    return frozen


class FrozenDEN(nn.Module):
    """Made by `freeze`; see there. For inference alone, on the device that it was made for."""

    def __init__(self, model: DEN, options: FreezeOptions):
        super().__init__()
        estimator, dtype = model.estimator, options.dtype
        self.tasks, self.config = dict(model.tasks), dict(model.config)
        self.num_blocks, self.num_levels = model.num_blocks, model.num_levels
        self.in_channels, self.base_size = estimator.in_channels, estimator.base_size
        self.device, self.dtype = estimator.device, dtype
        self.set_index = dict(estimator.set_index)
        num_sets = 1 + max(self.set_index.values())
        self.stem = None if estimator.stem is None else freeze_stem(estimator.stem, num_sets, options)
        blocks = cast("list[Block]", list(estimator.blocks))
        self.blocks = nn.ModuleList(freeze_block(block, options) for block in blocks)
        self.tail = freeze_tail(cast(Tail, estimator.tail), dtype)
        self.trunk = Trunk(self.stem, self.blocks, self.tail)
        self.heads = nn.ModuleDict(
            {task: last_linear(cast(nn.Linear, head), options) for task, head in estimator.heads.items()}
        )
        self.selector = freeze_selector(model.selector, options)
        self.calls: StaticCalls | None = None  # set by `freeze`: how calls are replayed
        self._bound = BoundCalls() if self.trunk.binds else None
        # The architecture without its weights, for cost tables; in __dict__ so that it is no part of this module.
        self.__dict__["source"] = _without_weights(model)
        self.eval()

    def train(self, mode: bool = True) -> FrozenDEN:
        """A frozen model is always in evaluation mode."""
        return super().train(False)

    def _apply(self, fn, recurse=True):
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.device != self.device or probe.dtype != self.dtype:
            raise RuntimeError(
                f"this model was frozen for {self.device} and {self.dtype}, and its weights are packed for that; "
                f"move the model that it was made from to {probe.device} and freeze that"
            )
        if self.calls is not None:
            self.calls.clear()
        return super()._apply(fn, recurse)

    def forward(
        self, x: Tensor, task: str | None = None, level: LevelLike | None = None, budget: Budget | None = None
    ) -> DENOutput:
        """As `DEN.forward`; x may be of any floating-point dtype and layout (channels_last saves a copy)."""
        if self._bound is not None and budget is None and self.calls is None:
            bound = self._bound.find(self, x, task)
            if bound is not None and bound.takes(level):
                return bound(x, level)
        task = check_task(task, self.tasks)
        level_NB, level_probs, logits = self._outputs(x, (task,), level, budget)
        return DENOutput(logits, level_NB, level_probs)

    def forward_tasks(
        self, x: Tensor, tasks: Sequence[str], level: LevelLike | None = None, budget: Budget | None = None
    ) -> dict[str, DENOutput]:
        """As `DEN.forward_tasks`."""
        check_tasks(tasks, self.tasks, self.set_index)
        level_NB, level_probs, *logits = self._outputs(x, tuple(tasks), level, budget)
        return {task: DENOutput(l, level_NB, level_probs) for task, l in zip(tasks, logits, strict=True)}

    def _outputs(
        self, x: Tensor, tasks: tuple[str, ...], level: LevelLike | None, budget: Budget | None
    ) -> tuple[Any, ...]:
        """Levels, probabilities and logits of each task, which is checked; the other arguments are checked here."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._outputs(x, tasks, level, budget)
        check_images(x, self.in_channels, self.device, "this model was frozen for")
        # A trunk that takes levels as they are checks them itself.
        checked_later = self.trunk.takes_levels
        inputs = check_choice(self.selector, x, level, budget, self.num_blocks, self.num_levels, checked_later)
        return self.run(tasks, x, *inputs) if self.calls is None else self.calls(self.run, tasks, x, *inputs)

    def run(
        self, tasks: tuple[str, ...], x: Tensor, level_NB: Tensor | None, budget_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """A call on checked arguments: levels, probabilities, logits of each task. Nothing here waits for a GPU."""
        set_index = self.set_index[tasks[0]]
        if x.dtype is not self.dtype or not x.is_contiguous(memory_format=torch.channels_last):
            x = x.to(self.dtype, memory_format=torch.channels_last)
        level_NB, level_probs = choose(self.selector, x, level_NB, budget_N)
        plan = level_NB.contiguous() if self.trunk.takes_levels else dk.plan_levels(level_NB, self.num_levels)
        stride = stem_stride(x.shape[2], x.shape[3], self.base_size)
        if len(tasks) == 1:
            return level_NB, level_probs, self.trunk(x, plan, set_index, stride, self.heads[tasks[0]])
        features = self.trunk(x, plan, set_index, stride)
        return level_NB, level_probs, *(self.heads[task](features) for task in tasks)


def freeze_stem(stem: Stem, num_sets: int, options: FreezeOptions) -> nn.Module:
    """The inference form of a stem, for `Trunk`."""
    norm = None
    if stem.norm is not None:
        scale, shift = tables(stem.norm)
        norm = scale[:, 0], shift[:, 0]
    return first_conv(stem.conv.weight, norm, options, stride=stem.stride, pool=stem.pool, num_sets=num_sets)


@functools.singledispatch
def freeze_tail(tail: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The inference form of a tail: forward(x, set_index) -> [N, F]; x may be overwritten."""
    raise TypeError(
        f"cannot freeze a tail of type {type(tail).__name__}; register its form with den.freeze.freeze_tail"
    )


@freeze_tail.register
def _(tail: PoolTail, dtype: torch.dtype) -> nn.Module:
    return dk.FusedPool() if tail.norm is None else dk.FusedPool(*(table[:, 0] for table in tables(tail.norm)))


@freeze_tail.register
def _(tail: HiddenTail, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(tail).to(dtype).requires_grad_(False)


@functools.singledispatch
def freeze_selector(selector: nn.Module, options: FreezeOptions) -> nn.Module:
    """The inference form of a selector, images -> logits [N, B, L]; a module of the caller's is copied as it is."""
    return copy.deepcopy(selector).to(options.dtype).eval().requires_grad_(False)


class FrozenSelector(nn.Module):
    """A `Selector` whose blocks are fused operators of one level."""

    level_mask: Tensor | None

    def __init__(self, selector: Selector, options: FreezeOptions):
        super().__init__()
        dtype = options.dtype
        self.spec, self.num_blocks = selector.spec, selector.num_blocks
        scale, shift = _batch_norm_tables(selector.norm)
        self.conv = first_conv(selector.conv.weight, (scale[None], shift[None]), options)
        blocks = cast("list[SelectorBlock]", list(selector.blocks))
        self.blocks = nn.ModuleList(_freeze_selector_block(block, options) for block in blocks)
        self.trunk = Trunk(self.conv, self.blocks, dk.FusedPool())
        self.head = last_linear(selector.head, options)
        self.condition = (
            copy.deepcopy(selector.condition).to(dtype).requires_grad_(False) if selector.condition else None
        )
        self.register_buffer("level_mask", None if selector.level_mask is None else selector.level_mask.clone())

    def bind(self, x: Tensor) -> Bound | None:
        """A call for images like x, as `Trunk.bind`, to logits [N, B * L] before the mask; None where it is more."""
        if self.condition is not None or self.spec.pool != 1:
            return None
        return self.trunk.bind(x, 0, stem_stride(x.shape[2], x.shape[3], self.spec.base_size), self.head)

    def forward(self, x: Tensor, budget: Budget | None = None) -> Tensor:
        """Logits [N, B, L] of images x [N, C, H, W]; see `Selector.forward`."""
        budget_N = budget_of(self.condition, budget, x)
        x, stride = shrink(x, self.spec)
        if budget_N is None:
            return mask_levels(self.trunk(x, None, 0, stride, self.head), self.num_blocks, self.level_mask)
        features = self.trunk(x, None, 0, stride)
        return read_head(self.head, self.condition, features, budget_N, self.num_blocks, self.level_mask)


def _batch_norm_tables(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of a norm with running statistics and affine."""
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = (norm.weight * torch.rsqrt(var + norm.eps)).detach()
    return scale, (norm.bias - mean * scale).detach()


def _freeze_selector_block(block: SelectorBlock, options: FreezeOptions) -> dk.FusedResidualBlock:
    rows = [_batch_norm_tables(norm) for norm in (block.norm1, block.norm2)]
    return dk.FusedResidualBlock(
        [block.conv1.weight.to(options.dtype), block.conv2.weight.to(options.dtype)],
        [scale[None, None] for scale, _ in rows],
        [shift[None, None] for _, shift in rows],
        [block.out_channels],
        strides=[block.stride, 1],
        relu=True,
        winograd=options.winograd,
        backend=options.backend,
    )


@freeze_selector.register
def _(selector: Selector, options: FreezeOptions) -> nn.Module:
    return FrozenSelector(selector, options)


def _without_weights(model: DEN) -> DEN:
    """A copy on the meta device, which holds shapes alone."""
    selector = model.selector if isinstance(model.selector, Selector) else nn.Identity()
    bare = DEN(model.estimator, selector, model.config)
    memo = {id(p): p.detach().to("meta") for p in (*bare.parameters(), *bare.buffers())}
    return copy.deepcopy(bare, memo)

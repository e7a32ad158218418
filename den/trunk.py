"""What a frozen network computes between images and features: a first convolution, blocks and a tail.

Neighbouring layers that the kernels know become one operator call; anything else runs by itself between these.

Suffixes: N samples, C channels, H W space, B blocks, T sets of batch-norm statistics.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import den_kernels as dk
from den.blocks.forms import FreezeOptions, fold, register_conv
from den.estimator import stem_pool
from den_kernels.fused_chain import Bound

Fused = dk.FusedConv2d | dk.FusedResidualBlock
Plan = dk.LevelPlan | Tensor  # or the levels [N, B] that it is made of


class FirstConv(nn.Module):
    """A network's first convolution as PyTorch's own, a norm's scale and shift folded in for each set of statistics.

    weight: [O, C, k, k]. norm: scale and shift [T, O], a ReLU behind them; None: neither. stride: times that of a call.
    pool: a 3x3 max pool of stride 2 follows.
    """

    def __init__(self, weight: Tensor, norm: tuple[Tensor, Tensor] | None, stride: int, pool: bool, dtype: torch.dtype):
        super().__init__()
        self.stride, self.relu, self.pool = stride, norm is not None, pool
        folded = [(weight.detach(), None)] if norm is None else [fold(weight, *row) for row in zip(*norm, strict=True)]
        self.convs = [register_conv(self, str(t), *pair, dtype) for t, pair in enumerate(folded)]

    def forward(self, x: Tensor, set_index: int = 0, entry_stride: int = 1) -> Tensor:
        """x [N, C, H, W] -> a new [N, O, H', W']."""
        weight, bias = self.convs[set_index if self.relu else 0]
        x = F.conv2d(x, weight, bias, entry_stride * self.stride, weight.shape[2] // 2)
        return stem_pool(x.relu_() if self.relu else x, self.pool)


def first_conv(
    weight: Tensor,
    norm: tuple[Tensor, Tensor] | None,
    options: FreezeOptions,
    *,
    stride: int = 1,
    pool: bool = False,
    num_sets: int = 1,
) -> dk.FusedConv2d | FirstConv:
    """The inference form of a first convolution: a layer of the chain behind it where that is faster.

    norm: scale and shift [T, O] of the norm behind it, and a ReLU behind that; None: neither, for num_sets sets.
    """
    if not dk.joins_chain(options.backend, weight.device, options.dtype):
        return FirstConv(weight, norm, stride, pool, options.dtype)
    plain = torch.ones, torch.zeros
    scale, shift = norm or (fill((num_sets, weight.shape[0]), device=weight.device) for fill in plain)
    return dk.FusedConv2d(
        weight.detach().to(options.dtype),
        scale[:, None],
        shift[:, None],
        stride=stride,
        relu=norm is not None,
        max_pool=pool,
        winograd=False,
        backend=options.backend,
    )


def last_linear(linear: nn.Linear, options: FreezeOptions) -> dk.FusedLinear | nn.Linear:
    """The inference form of a linear layer behind a tail: the end of the chain in front of it where that is faster."""
    weight = linear.weight.detach()
    if not dk.joins_chain(options.backend, weight.device, options.dtype):
        return copy.deepcopy(linear).to(options.dtype).requires_grad_(False)
    return dk.FusedLinear(weight.to(options.dtype), linear.bias, backend=options.backend)


class Trunk:
    """A first convolution, blocks and a tail in their order; each of the ends may be missing.

    first: from `first_conv`. blocks: from `freeze_block`. tail: from `freeze_tail`. takes_levels: whether a call takes
    levels as they are, in place of a plan.
    """

    def __init__(self, first: nn.Module | None, blocks: Iterable[nn.Module], tail: nn.Module | None = None):
        blocks = list(blocks)
        dk.gather_weights([m for block in blocks for m in block.modules() if isinstance(m, dk.FusedConv2d)])
        self.first, self.tail = first, tail
        self.steps: list[dk.FusedChain | nn.Module] = []
        self.rows: list[list[int]] = []  # of each step, the blocks whose levels it takes
        numbers = {id(block): b for b, block in enumerate(blocks)}
        layers = [layer for layer in (first, *blocks, tail) if layer is not None]
        for fused, group in itertools.groupby(layers, lambda layer: isinstance(layer, Fused | dk.FusedPool)):
            members = list(group)
            chained = [layer for layer in members if isinstance(layer, Fused)]
            if fused and chained:
                pool = members[-1] if isinstance(members[-1], dk.FusedPool) else None
                self.steps.append(dk.FusedChain(chained, pool))
                self.rows.append([numbers[id(layer)] for layer in chained if layer.num_levels > 1])
            else:
                self.steps += members
                self.rows += [[numbers[id(layer)]] if id(layer) in numbers else [] for layer in members]
        self.num_blocks = len(blocks)
        self.takes_levels = len(self.steps) == 1 and isinstance(first, dk.FusedConv2d)
        # Whether a call needs nothing but images and the levels of all blocks.
        self.binds = self.takes_levels and self.rows[0] == list(range(self.num_blocks))

    def bind(self, x: Tensor, set_index: int, entry_stride: int, head: nn.Module) -> Bound | None:
        """A call for batches like x and a linear layer, as `FusedChain.bind`; None where it is not one chain."""
        chain = self.steps[0]
        if not self.takes_levels or not isinstance(chain, dk.FusedChain) or not isinstance(head, dk.FusedLinear):
            return None
        return chain.bind(x, set_index, entry_stride * chain.layers[0].strides[0], head)

    def __call__(
        self,
        x: Tensor,
        plan: Plan | None,
        set_index: int,
        entry_stride: int = 1,
        head: nn.Module | None = None,
    ) -> Tensor:
        """x [N, C, H, W] channels_last, never overwritten -> the tail's features, or the last block's map.

        plan: of the blocks, or their levels [N, B] if it takes these; None where none has levels. entry_stride: of what
        comes first, times its own. head: from `last_linear`, of the features.
        """
        for step, rows in zip(self.steps, self.rows, strict=True):
            if isinstance(step, dk.FusedChain):
                own = entry_stride * step.layers[0].strides[0] if step.layers[0] is self.first else None
                end = None
                if isinstance(head, dk.FusedLinear) and step is self.steps[-1] and step.pool is not None:
                    head, end = None, head
                x = step(x, _rows_of(plan, rows, self.num_blocks), set_index, own, end)
            elif isinstance(plan, dk.LevelPlan) and rows:
                x = step(x, *plan.block(rows[0]), set_index, entry_stride)
            else:
                x = step(x, set_index, entry_stride) if step is self.first else step(x, set_index)
            entry_stride = 1
        return x if head is None else head(x)


def _rows_of(plan: Plan | None, rows: list[int], num_blocks: int) -> Plan | None:
    """The plan, or the levels, of these blocks; None of none."""
    if plan is None or not rows:
        return None
    if len(rows) == num_blocks:
        return plan
    if isinstance(plan, Tensor):
        return plan[:, rows].contiguous()
    if rows[-1] - rows[0] + 1 == len(rows):
        return dk.LevelPlan(*(part[rows[0] : rows[-1] + 1] for part in plan))
    return dk.LevelPlan(*(torch.stack([part[row] for row in rows]) for part in plan))

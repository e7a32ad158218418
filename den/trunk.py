"""What a frozen network computes between images and features: a first convolution, blocks and a tail.

Neighbouring layers that the kernels know become one operator call; anything else runs by itself between these.

Suffixes: N samples, C channels, H W space, B blocks, T sets of batch-norm statistics.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import den_kernels as dk
from den.blocks.forms import FreezeOptions, fold, register_conv
from den.estimator import stem_pool

Fused = dk.FusedConv2d | dk.FusedResidualBlock


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


class Trunk:
    """A first convolution, blocks and a tail in their order; each of the ends may be missing.

    first: from `first_conv`. blocks: from `freeze_block`. tail: from `freeze_tail`.
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

    def __call__(self, x: Tensor, plan: dk.LevelPlan | None, set_index: int, entry_stride: int = 1) -> Tensor:
        """x [N, C, H, W] channels_last, never overwritten -> the tail's features, or the last block's map.

        plan: of the blocks; None where none has levels. entry_stride: of what comes first, times its own.
        """
        for step, rows in zip(self.steps, self.rows, strict=True):
            if isinstance(step, dk.FusedChain):
                own = entry_stride * step.layers[0].strides[0] if step.layers[0] is self.first else None
                x = step(x, _rows_of(plan, rows), set_index, own)
            elif plan is not None and rows:
                x = step(x, *plan.block(rows[0]), set_index, entry_stride)
            else:
                x = step(x, set_index, entry_stride) if step is self.first else step(x, set_index)
            entry_stride = 1
        return x


def _rows_of(plan: dk.LevelPlan | None, rows: list[int]) -> dk.LevelPlan | None:
    """The plan of these blocks."""
    if plan is None or not rows:
        return None
    if rows[-1] - rows[0] + 1 == len(rows):
        return dk.LevelPlan(*(part[rows[0] : rows[-1] + 1] for part in plan))
    return dk.LevelPlan(*(torch.stack([part[row] for row in rows]) for part in plan))

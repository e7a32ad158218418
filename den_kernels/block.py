"""The constants of fused residual blocks, and chains of them as the flat lists that an operator can take.

L levels, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BlockArguments(NamedTuple):
    """What a residual block computes with, behind its input and levels; see `reference.residual_block`.

    widths: int32 [L]. weight: packed by a backend, one a convolution, like scale and shift [L, C], kernel_size, stride
    and groups. pre_scale, pre_shift: [C], or None.
    """

    widths: Tensor
    weight: Sequence[Tensor]
    scale: Sequence[Tensor]
    shift: Sequence[Tensor]
    pre_scale: Tensor | None
    pre_shift: Tensor | None
    kernel_size: Sequence[int]
    stride: Sequence[int]
    groups: Sequence[int]
    relu: bool


def flatten(blocks: Sequence[BlockArguments]) -> tuple[list[Tensor], list[int]]:
    """The tensors of all blocks, and integers that say how to put the blocks together again."""
    tensors: list[Tensor] = []
    spec: list[int] = []
    for block in blocks:
        tensors += (block.widths, *block.weight, *block.scale, *block.shift)
        pre = block.pre_scale is not None and block.pre_shift is not None
        if block.pre_scale is not None and block.pre_shift is not None:
            tensors += (block.pre_scale, block.pre_shift)
        spec += (len(block.weight), pre, block.relu, *block.kernel_size, *block.stride, *block.groups)
    return tensors, spec


def unflatten(tensors: Sequence[Tensor], spec: Sequence[int]) -> list[BlockArguments]:
    """The blocks that `flatten` took apart."""
    blocks: list[BlockArguments] = []
    t = s = 0
    while s < len(spec):
        k, pre, relu = spec[s : s + 3]
        weight, scale, shift = (tensors[t + 1 + i * k : t + 1 + (i + 1) * k] for i in range(3))
        kernel_size, stride, groups = (spec[s + 3 + i * k : s + 3 + (i + 1) * k] for i in range(3))
        after = t + 1 + 3 * k
        pre_scale, pre_shift = (tensors[after], tensors[after + 1]) if pre else (None, None)
        blocks.append(
            BlockArguments(
                tensors[t], weight, scale, shift, pre_scale, pre_shift, kernel_size, stride, groups, bool(relu)
            )
        )
        t, s = after + 2 * pre, s + 3 + 3 * k
    return blocks


def output_shape(shape: Sequence[int], scale: Sequence[Tensor], stride: Sequence[int]) -> tuple[int, int, int, int]:
    """[N, C, H, W] behind a block that reads a map of this shape."""
    step = math.prod(stride)
    return shape[0], scale[-1].shape[1], (shape[2] + step - 1) // step, (shape[3] + step - 1) // step


def empty_outputs(x: Tensor, blocks: Sequence[BlockArguments]) -> list[Tensor]:
    """Where each block of a chain writes: a new channels_last map where the shape changes, else what it reads.

    x itself is never written.
    """
    outs: list[Tensor] = []
    shape: Sequence[int] = x.shape
    for block in blocks:
        before, shape = shape, output_shape(shape, block.scale, block.stride)
        same = bool(outs) and tuple(before) == shape
        new = None if same else torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        outs.append(outs[-1] if new is None else new)
    return outs


def one_by_one(residual_block: Callable[..., None]) -> Callable[..., None]:
    """A backend's `residual_blocks`, a chain in one call, from its `residual_block`."""

    def residual_blocks(x: Tensor, outs, level: Tensor, order: Tensor, count: Tensor, blocks) -> None:
        for out, *plan, block in zip(outs, level, order, count, blocks, strict=True):
            residual_block(x, out, *plan, *block)
            x = out

    return residual_blocks

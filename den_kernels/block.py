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
    and groups. pre_scale, pre_shift: [C], or None. projection: a packed 1x1 weight and its scale and shift [L, C], or
    nothing.
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
    projection: Sequence[Tensor]
    relu: bool


def flatten(blocks: Sequence[BlockArguments]) -> tuple[list[Tensor], list[int]]:
    """The blocks as a few tensors, and integers that say how to put them together again.

    The integers of each block: convolutions k, input, hidden and output channels, levels, whether there is a norm in
    front, a ReLU behind and a projection, then k each of kernel sizes, strides, groups and the numbers of packed
    weights. The tensors: all widths; all tables, of each block k scales and k shifts, the norm in front, the scale and
    shift of the projection; then each block's weights, that of the projection last.
    """
    tables: list[Tensor] = []
    weights: list[Tensor] = []
    spec: list[int] = []
    for block in blocks:
        tables += (*block.scale, *block.shift)
        pre = block.pre_scale is not None and block.pre_shift is not None
        if block.pre_scale is not None and block.pre_shift is not None:
            tables += (block.pre_scale, block.pre_shift)
        tables += block.projection[1:]
        weights += (*block.weight, *block.projection[:1])
        levels, hidden = block.scale[0].shape
        inside = 0 if block.pre_scale is None else block.pre_scale.numel()
        spec += (len(block.weight), inside, hidden, block.scale[-1].shape[1], levels)
        spec += (pre, block.relu, len(block.projection) > 0)
        spec += (*block.kernel_size, *block.stride, *block.groups, *(w.numel() for w in block.weight))
    widths = torch.cat([block.widths for block in blocks])
    return [widths, torch.cat([table.flatten() for table in tables]), *weights], spec


def unflatten(tensors: Sequence[Tensor], spec: Sequence[int]) -> list[BlockArguments]:
    """The blocks that `flatten` took apart: views of its tensors."""
    all_widths, all_tables, *weights = tensors
    blocks: list[BlockArguments] = []
    s = w = width = table = 0

    def take(*shape: int) -> Tensor:
        nonlocal table
        start, table = table, table + math.prod(shape)
        return all_tables[start:table].view(shape)

    while s < len(spec):
        k, inside, hidden, outside, levels, pre, relu, projected = spec[s : s + 8]
        outputs = [hidden] * (k - 1) + [outside]
        scale, shift = ([take(levels, channels) for channels in outputs] for _ in range(2))
        norm = [take(inside) if pre else None for _ in range(2)]
        projection = [weights[w + k], take(levels, outside), take(levels, outside)] if projected else []
        kernel_size, stride, groups = (spec[s + 8 + i * k : s + 8 + (i + 1) * k] for i in range(3))
        form = (kernel_size, stride, groups, projection, bool(relu))
        widths = all_widths[width : width + levels]
        blocks.append(BlockArguments(widths, weights[w : w + k], scale, shift, norm[0], norm[1], *form))
        s, w, width = s + 8 + 4 * k, w + k + projected, width + levels
    return blocks


def at_levels(widths: Tensor | None, level: Tensor) -> Tensor | None:
    """The width [N] of each sample of a level [N], from those of each level [L]; None: all channels."""
    return None if widths is None else widths.index_select(0, level)


def batch_class(tile_bounds: Sequence[int], shape: Sequence[int], stride: int) -> int:
    """Which form of its weights a layer of this stride takes for a batch [N, C, H, W]; see `den_kernels.backends`."""
    step = 4 * stride
    tiles = shape[0] * -(-shape[2] // step) * -(-shape[3] // step)
    return sum(tiles < bound for bound in tile_bounds)


def output_shape(shape: Sequence[int], channels: int, stride: Sequence[int]) -> tuple[int, int, int, int]:
    """[N, C, H, W] behind a block of these output channels and strides that reads a map of this shape."""
    step = math.prod(stride)
    return shape[0], channels, (shape[2] + step - 1) // step, (shape[3] + step - 1) // step


def chain_output(x: Tensor, spec: Sequence[int]) -> Tensor:
    """An empty channels_last map for what a chain of these blocks makes of x [N, C, H, W]."""
    shape = tuple(x.shape)
    s = 0
    while s < len(spec):
        k = spec[s]
        shape = output_shape(shape, spec[s + 3], spec[s + 8 + k : s + 8 + 2 * k])
        s += 8 + 4 * k
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def one_by_one(residual_block: Callable[..., None]) -> Callable[..., None]:
    """A backend's `residual_chain`, a chain in one call, from its `residual_block`."""

    def residual_chain(x: Tensor, out: Tensor, level, order, count, tensors, spec: Sequence[int]) -> None:
        blocks = unflatten(tensors, spec)
        for b, (*plan, block) in enumerate(zip(level, order, count, blocks, strict=True)):
            shape = output_shape(x.shape, block.scale[-1].shape[1], block.stride)
            if b + 1 == len(blocks):
                y = out
            elif b > 0 and shape == tuple(x.shape):
                y = x  # a map of this chain's own
            else:
                y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            residual_block(x, y, *plan, *block)
            x = y

    return residual_chain


def unmoved(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A backend's `gather` where it does not matter in which memory weights lie: the tensors themselves."""
    return list(tensors)

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
    """The tensors of all blocks, and integers that say how to put the blocks together again.

    The integers of each block: convolutions k, hidden and output channels, levels, whether there is a norm in front and
    a ReLU behind, whether there is a projection, then k each of kernel sizes, strides, groups and the numbers of packed
    weights. Its tensors: widths, k weights, k scales, k shifts, the norm in front, the projection and its norm.
    """
    tensors: list[Tensor] = []
    spec: list[int] = []
    for block in blocks:
        tensors += (block.widths, *block.weight, *block.scale, *block.shift)
        pre = block.pre_scale is not None and block.pre_shift is not None
        if block.pre_scale is not None and block.pre_shift is not None:
            tensors += (block.pre_scale, block.pre_shift)
        tensors += block.projection
        levels, hidden = block.scale[0].shape
        spec += (len(block.weight), hidden, block.scale[-1].shape[1], levels, pre, block.relu)
        spec.append(len(block.projection) > 0)
        spec += (*block.kernel_size, *block.stride, *block.groups, *(w.numel() for w in block.weight))
    return tensors, spec


def unflatten(tensors: Sequence[Tensor], spec: Sequence[int]) -> list[BlockArguments]:
    """The blocks that `flatten` took apart."""
    blocks: list[BlockArguments] = []
    t = s = 0
    while s < len(spec):
        k, _, _, _, pre, relu, projected = spec[s : s + 7]
        weight, scale, shift = (tensors[t + 1 + i * k : t + 1 + (i + 1) * k] for i in range(3))
        kernel_size, stride, groups = (spec[s + 7 + i * k : s + 7 + (i + 1) * k] for i in range(3))
        widths, t = tensors[t], t + 1 + 3 * k
        pre_scale, pre_shift = (tensors[t], tensors[t + 1]) if pre else (None, None)
        t += 2 * pre
        projection = tensors[t : t + 3 * projected]
        t, s = t + 3 * projected, s + 7 + 4 * k
        form = (kernel_size, stride, groups, projection, bool(relu))
        blocks.append(BlockArguments(widths, weight, scale, shift, pre_scale, pre_shift, *form))
    return blocks


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
        shape = output_shape(shape, spec[s + 2], spec[s + 7 + k : s + 7 + 2 * k])
        s += 7 + 4 * k
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

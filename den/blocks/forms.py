"""A block's two forms for inference: frozen, at the level of each sample, and plain, one level of ordinary PyTorch.

Every kind of block registers its own with `freeze_block` and `plain_block`, beside the block; what they are made from
is here.

Suffixes: N samples, C channels, H W space, L levels, T sets of batch-norm statistics.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

import den_kernels as dk
from den.blocks.base import shortcut


def tables(norm: dk.DENBatchNorm2d, num_levels: int = 1) -> tuple[Tensor, Tensor]:
    """Inference scale and shift of a norm, [T, L, C] each; one row serves every level where the norm has one."""
    rows = [norm.scale_shift(t) for t in range(norm.num_sets)]
    scale, shift = (torch.stack([row[i].detach() for row in rows]) for i in (0, 1))
    return scale.expand(-1, num_levels, -1), shift.expand(-1, num_levels, -1)


def fold(weight: Tensor, scale_C: Tensor, shift_C: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution without bias followed by a scale and shift of its output channels."""
    return weight.detach() * scale_C[:, None, None, None].to(weight.dtype), shift_C.to(weight.dtype)


def register_conv(
    module: nn.Module, suffix: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Keep a channels_last weight and a bias as buffers; returns them."""
    weight = weight.to(dtype, copy=True).contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.to(dtype, copy=True)
    module.register_buffer(f"weight{suffix}", weight)
    module.register_buffer(f"bias{suffix}", bias)
    return weight, bias


class FreezeOptions(NamedTuple):
    """What `den.freeze` was asked for; see there."""

    dtype: torch.dtype
    winograd: bool
    backend: str


@functools.singledispatch
def freeze_block(block: nn.Module, options: FreezeOptions) -> nn.Module:
    """The inference form of a block: forward(x, level_N, order_N, count_L, set_index, entry_stride) -> map."""
    raise TypeError(
        f"cannot freeze a block of type {type(block).__name__}; register its form with den.blocks.freeze_block"
    )


def plain_conv(weight: Tensor, bias: Tensor | None, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A padded convolution with a copy of these weights."""
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        stride,
        weight.shape[2] // 2,
        groups=groups,
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    conv.weight.copy_(weight)
    if bias is not None and conv.bias is not None:
        conv.bias.copy_(bias)
    return conv


@functools.singledispatch
def plain_block(block: nn.Module, level: int, set_index: int) -> nn.Module:
    """The plain form of a block at one level; other kinds of block join by registering."""
    raise TypeError(f"no plain form of a block of type {type(block).__name__}; register it with den.blocks.plain_block")


class PlainShortcut(nn.Module):
    """The parameter-free shortcut, and a residual block that has no other at level 0."""

    def __init__(self, stride: int, out_channels: int):
        super().__init__()
        self.stride, self.out_channels = stride, out_channels

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]; see `shortcut`."""
        return shortcut(x, self.stride, self.out_channels)

"""One path of a DEN as an ordinary PyTorch network: the dense opponent of the benchmarks, and a static slim network.

Suffixes: N samples, C channels, H W space, B blocks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from den.blocks import Block, ConvPairBlock, ResidualBlock, pool, shortcut
from den.estimator import Stem, Tail, stem_stride
from den.freeze import fold, freeze_tail, tables
from den.model import DEN, check_level, check_task


def dense(
    model: DEN,
    task: str | None = None,
    level: Sequence[int] | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> DenseNetwork:
    """The sub-network of one path as plain PyTorch: `nn.Conv2d`s of the path's widths, channels_last, norms folded.

    A norm behind a convolution goes into its weight and bias; the one that a pre-activation block begins with stays a
    scale and shift. A residual block at level 0 is its shortcut. Weights are copies.

    Args:
        model: a DEN.
        task: whose statistics and head; may be left out if there is one.
        level: integers [B]; None: every block at its top level.
        dtype: of weights and activations; None: the model's.

    Returns: a module from images [N, C, H, W] to logits [N, classes], equal to `model.eval()(x, task, level).logits`.

    Raises:
        TypeError, ValueError: model is not a DEN, or task or level are none of its own.
    """
    if not isinstance(model, DEN):
        raise TypeError(f"model is a {type(model).__name__}; it must be a den.DEN")
    task = check_task(task, model.tasks)
    path = [model.num_levels - 1] * model.num_blocks if level is None else level
    path = path.cpu() if isinstance(path, Tensor) else path
    checked = check_level(path, torch.empty(1), model.num_blocks, model.num_levels)  # a batch of one
    with torch.no_grad():
        return DenseNetwork(model, task, checked[0].tolist(), dtype or next(model.estimator.parameters()).dtype)


class DenseNetwork(nn.Module):
    """Made by `dense`; see there."""

    def __init__(self, model: DEN, task: str, path: list[int], dtype: torch.dtype):
        super().__init__()
        estimator = model.estimator
        self.base_size, self.dtype = estimator.base_size, dtype
        self.set_index = set_index = estimator.set_index[task]
        self.stem = None if estimator.stem is None else PlainStem(estimator.stem, set_index)
        blocks = cast("list[Block]", list(estimator.blocks))
        self.blocks = nn.ModuleList(plain_block(block, l, set_index) for block, l in zip(blocks, path, strict=True))
        self.tail = freeze_tail(cast(Tail, estimator.tail), dtype)
        self.head = copy.deepcopy(estimator.heads[task])
        self.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, classes]."""
        x = x.to(self.dtype, memory_format=torch.channels_last)
        stride = stem_stride(x.shape[2], x.shape[3], self.base_size)
        if self.stem is not None:
            x = self.stem(x, stride)
            stride = 1
        for block in self.blocks:
            x = block(x) if stride == 1 else block(x, stride)
            stride = 1
        return self.head(self.tail(x, self.set_index))


def plain_conv(weight: Tensor, bias: Tensor | None, stride: int = 1) -> nn.Conv2d:
    """A padded convolution with a copy of these weights."""
    conv = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        stride,
        weight.shape[2] // 2,
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    conv.weight.copy_(weight)
    if bias is not None and conv.bias is not None:
        conv.bias.copy_(bias)
    return conv


class PlainStem(nn.Module):
    """The stem with its norm, if any, folded."""

    def __init__(self, stem: Stem, set_index: int):
        super().__init__()
        self.relu = stem.norm is not None
        if stem.norm is None:
            self.conv = plain_conv(stem.conv.weight, None)
        else:
            self.conv = plain_conv(*fold(stem.conv.weight, *(table[set_index, 0] for table in tables(stem.norm))))

    def forward(self, x: Tensor, stride: int) -> Tensor:
        x = F.conv2d(x, self.conv.weight, self.conv.bias, stride, 1)
        return F.relu(x, inplace=True) if self.relu else x


@functools.singledispatch
def plain_block(block: nn.Module, level: int, set_index: int) -> nn.Module:
    """The plain form of a block at one level; other kinds of block join by registering."""
    raise TypeError(f"no plain form of a block of type {type(block).__name__}; register it with den.dense.plain_block")


class PlainShortcut(nn.Module):
    """A residual block at level 0."""

    def __init__(self, block: ResidualBlock):
        super().__init__()
        self.stride, self.out_channels = block.stride, block.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return shortcut(x, self.stride, self.out_channels)


class PlainResidualBlock(PlainShortcut):
    """A residual block at a level with channels."""

    pre_scale: Tensor | None
    pre_shift: Tensor | None

    def __init__(self, block: ResidualBlock, level: int, set_index: int):
        super().__init__(block)
        width, levels = block.widths[level], block.hierarchy.num_levels
        first, second = block.conv1.weight[:width], block.conv2.weight[:, :width]
        self.relu = not block.preactivation
        pre: tuple[Tensor | None, Tensor | None] = (None, None)
        if block.preactivation:
            scale, shift = tables(block.norm1)
            pre = scale[set_index, 0, :, None, None].contiguous(), shift[set_index, 0, :, None, None].contiguous()
            hidden, out = block.norm2, None
        else:
            hidden, out = block.norm1, block.norm2
        self.register_buffer("pre_scale", pre[0])
        self.register_buffer("pre_shift", pre[1])
        self.conv1 = plain_conv(*fold(first, *(table[set_index, 0, :width] for table in tables(hidden))), block.stride)
        if out is None:
            self.conv2 = plain_conv(second, None)
        else:
            self.conv2 = plain_conv(*fold(second, *(table[set_index, level] for table in tables(out, levels))))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        if self.pre_scale is not None and self.pre_shift is not None:
            h = F.relu(torch.addcmul(self.pre_shift, x, self.pre_scale), inplace=True)
        h = self.conv2(F.relu(self.conv1(h), inplace=True))
        h = h.add_(super().forward(x))
        return F.relu(h, inplace=True) if self.relu else h


@plain_block.register
def _(block: ResidualBlock, level: int, set_index: int) -> nn.Module:
    return PlainResidualBlock(block, level, set_index) if block.widths[level] else PlainShortcut(block)


class PlainConvPair(nn.Module):
    """A pair of convolutions at one level."""

    def __init__(self, block: ConvPairBlock, level: int, set_index: int):
        super().__init__()
        self.pools = block.pools
        width, levels = block.widths[level], block.hierarchy.num_levels
        first, second = block.conv1.weight[:width], block.conv2.weight[:, :width]
        self.conv1 = plain_conv(*fold(first, *(table[set_index, 0, :width] for table in tables(block.norm1))))
        self.conv2 = plain_conv(*fold(second, *(table[set_index, level] for table in tables(block.norm2, levels))))

    def forward(self, x: Tensor, entry_stride: int = 1) -> Tensor:
        h = F.relu(F.conv2d(x, self.conv1.weight, self.conv1.bias, entry_stride, 1), inplace=True)
        h = F.relu(self.conv2(pool(h, self.pools[0])), inplace=True)
        return pool(h, self.pools[1])


@plain_block.register
def _(block: ConvPairBlock, level: int, set_index: int) -> nn.Module:
    return PlainConvPair(block, level, set_index)

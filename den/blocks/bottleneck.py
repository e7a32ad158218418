"""The bottleneck block, 1x1, 3x3 and 1x1: of ResNet-50 and, with groups, of ResNeXt.

Suffixes: N samples, C channels, H W space, L levels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import den_kernels as dk
from den.blocks.base import Block, conv_out, shortcut
from den.blocks.forms import (
    FreezeOptions,
    PlainShortcut,
    fold,
    freeze_block,
    plain_block,
    plain_conv,
    tables,
)
from den.hierarchy import Hierarchy


class Projection(nn.Module):
    """The shortcut with weights, norm(1x1 convolution): the same at every level."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_sets: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.norm = dk.DENBatchNorm2d(out_channels, num_sets=num_sets)

    def forward(self, x: Tensor, set_index: int = 0) -> Tensor:
        """x [N, C, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return self.norm(self.conv(x), set_index=set_index)


class BottleneckBlock(Block):
    """Bottleneck residual block with elastic hidden channels or, with groups, elastic paths.

    `relu(shortcut(x) + norm3(conv3(relu(norm2(conv2(relu(norm1(conv1(x)))))))))`: conv1 is 1x1 into the hidden
    channels, conv2 3x3 among them with stride and groups, conv3 1x1 out of them. A level runs a prefix of the hidden
    channels in all three, in whole groups. At a level of width 0 the output is the shortcut, bitwise: no ReLU.

    norm1 and norm2 have one set of statistics over the samples that ran a channel; norm3, behind the contract
    convolution, one a level with `bn="per_level"` (see `ResidualBlock`).

    Args:
        in_channels, hidden_channels, out_channels: before, in and behind the block.
        hierarchy: level ratios; a first ratio of 0 is the shortcut alone.
        stride: of conv2 and the shortcut.
        groups: of conv2, the paths of ResNeXt.
        projection: the shortcut is a `Projection`, which runs and costs the same at every level; else it has no
            parameters.
        bn, num_sets, backend: as in `ResidualBlock`.

    Raises:
        ValueError: a parameter-free shortcut would have to drop channels, or the levels do not fit the groups.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        hierarchy: Hierarchy,
        *,
        stride: int = 1,
        groups: int = 1,
        projection: bool = False,
        bn: str = "per_level",
        num_sets: int = 1,
        backend: str = "auto",
    ):
        if out_channels < in_channels and not projection:
            raise ValueError(
                f"out_channels is {out_channels}, below in_channels {in_channels}; "
                "a parameter-free shortcut only adds channels: use projection=True"
            )
        hidden, widths = hidden_channels, hierarchy.widths(hidden_channels, groups)
        super().__init__(in_channels, out_channels, hierarchy, widths)
        self.stride, self.groups = stride, groups
        conv = functools.partial(dk.DENConv2d, bias=False, backend=backend)
        norm = functools.partial(dk.DENBatchNorm2d, num_sets=num_sets, backend=backend)
        self.conv1 = conv(in_channels, hidden, 1, out_widths=widths)
        self.norm1 = norm(hidden)
        self.conv2 = conv(hidden, hidden, 3, stride, 1, groups=groups, in_widths=widths, out_widths=widths)
        self.norm2 = norm(hidden)
        self.conv3 = conv(hidden, out_channels, 1, in_widths=widths)
        self.norm3 = norm(out_channels, hierarchy.num_levels if bn == "per_level" else 1)
        self.projection = Projection(in_channels, out_channels, stride, num_sets) if projection else None

    def forward(self, x: Tensor, level_N: Tensor, set_index: int = 0) -> Tensor:
        """x [N, C, H, W], level_N integer [N] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        hidden_N = self.width(level_N)
        ran_N = hidden_N > 0
        skipped = self.widths[0] == 0
        if self.projection is None:
            y = shortcut(x, self.stride, self.out_channels)
        else:
            y = self.projection(x, set_index)
        h = self.conv1.forward_widths(x, None, hidden_N)
        h = self.norm1(h, width=hidden_N, set_index=set_index, relu=True)
        h = self.conv2.forward_widths(h, hidden_N, hidden_N)
        h = self.norm2(h, width=hidden_N, set_index=set_index, relu=True)
        h = self.conv3.forward_widths(h, hidden_N, None)
        out_N = ran_N * self.out_channels if skipped else None
        z = F.relu(y + self.norm3(h, level_N, width=out_N, set_index=set_index))
        return torch.where(ran_N[:, None, None, None], z, y) if skipped else z

    def macs(self, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        size = conv_out(height, self.stride), conv_out(width, self.stride)
        before, behind = height * width, size[0] * size[1]
        counts = map(self._counts, self.widths)
        return tuple(expand * before + rest * behind for expand, rest in counts), size

    @property
    def param_counts(self) -> tuple[int, ...]:
        return tuple(sum(self._counts(width)) for width in self.widths)

    def _counts(self, width: int) -> tuple[int, int]:
        """Weights of conv1, whose map has the input's size, and of the others, whose maps have the output's."""
        group_in = width if self.groups == 1 else self.conv2.in_channels // self.groups
        fixed = 0 if self.projection is None else self.projection.conv.weight.numel()
        return self.in_channels * width, width * (9 * group_in + self.out_channels) + fixed


@freeze_block.register
def _(block: BottleneckBlock, options: FreezeOptions) -> nn.Module:
    levels, shortcut_path = block.hierarchy.num_levels, None
    if block.projection is not None:
        weight = block.projection.conv.weight.to(options.dtype)
        shortcut_path = weight, *tables(block.projection.norm, levels)
    norms = [tables(norm, levels) for norm in (block.norm1, block.norm2, block.norm3)]
    return dk.FusedResidualBlock(
        [conv.weight.to(options.dtype) for conv in (block.conv1, block.conv2, block.conv3)],
        [scale for scale, _ in norms],
        [shift for _, shift in norms],
        block.widths,
        strides=[1, block.stride, 1],
        groups=[1, block.groups, 1],
        projection=shortcut_path,
        relu=True,
        winograd=options.winograd,
        backend=options.backend,
    )


class PlainBottleneckBlock(nn.Module):
    """A bottleneck block at a level with channels."""

    def __init__(self, block: BottleneckBlock, level: int, set_index: int):
        super().__init__()
        width, levels = block.widths[level], block.hierarchy.num_levels
        groups = block.groups * width // block.conv2.in_channels if block.groups > 1 else 1
        inner = block.conv2.weight[:width] if block.groups > 1 else block.conv2.weight[:width, :width]
        row1, row2 = ([table[set_index, 0, :width] for table in tables(norm)] for norm in (block.norm1, block.norm2))
        row3 = [table[set_index, level] for table in tables(block.norm3, levels)]
        self.shortcut = _plain_shortcut(block, set_index)
        self.conv1 = plain_conv(*fold(block.conv1.weight[:width], *row1))
        self.conv2 = plain_conv(*fold(inner, *row2), block.stride, groups)
        self.conv3 = plain_conv(*fold(block.conv3.weight[:, :width], *row3))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        h = F.relu(self.conv1(x), inplace=True)
        h = F.relu(self.conv2(h), inplace=True)
        return F.relu(self.conv3(h).add_(self.shortcut(x)), inplace=True)


def _plain_shortcut(block: BottleneckBlock, set_index: int) -> nn.Module:
    if block.projection is None:
        return PlainShortcut(block.stride, block.out_channels)
    row = [table[set_index, 0] for table in tables(block.projection.norm)]
    return plain_conv(*fold(block.projection.conv.weight, *row), block.stride)


@plain_block.register
def _(block: BottleneckBlock, level: int, set_index: int) -> nn.Module:
    if block.widths[level] == 0:
        return _plain_shortcut(block, set_index)
    return PlainBottleneckBlock(block, level, set_index)

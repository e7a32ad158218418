"""Two consecutive convolutions without a shortcut, the block of SimpleConvNet and VGG.

Suffixes: N samples, C channels, H W space, L levels.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torch.nn import functional as F

import den_kernels as dk
from den.blocks.base import Block, check_has_channels, conv_out
from den.blocks.forms import (
    FreezeOptions,
    fold,
    freeze_block,
    plain_block,
    plain_conv,
    tables,
)
from den.hierarchy import Hierarchy


class ConvPairBlock(Block):
    """Two consecutive 3x3 convolutions without a shortcut, the block of SimpleConvNet and VGG (section 4.1).

    `conv1 - norm1 - relu [- pool] - conv2 - norm2 - relu [- pool]`; the channels between the two are elastic
    and never 0. norm1 has one set of statistics, over the samples that ran each channel; norm2, behind the
    contract convolution, one a level with `bn="per_level"`.

    Args:
        in_channels, hidden_channels, out_channels: channels before, between and behind the convolutions.
        hierarchy: level ratios, all above 0.
        pools: whether a 2x2 max pool of stride 2 follows the first and the second ReLU.
        bn, num_sets, backend: as in `ResidualBlock`.

    Raises:
        ValueError: the hierarchy has a level of width 0.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        hierarchy: Hierarchy,
        *,
        pools: tuple[bool, bool] = (False, False),
        bn: str = "per_level",
        num_sets: int = 1,
        backend: str = "auto",
    ):
        check_has_channels(hierarchy)
        widths = hierarchy.widths(hidden_channels)
        super().__init__(in_channels, out_channels, hierarchy, widths)
        self.pools = pools
        self.conv1 = dk.DENConv2d(in_channels, hidden_channels, 3, 1, 1, bias=False, out_widths=widths, backend=backend)
        self.norm1 = dk.DENBatchNorm2d(hidden_channels, num_sets=num_sets, backend=backend)
        self.conv2 = dk.DENConv2d(hidden_channels, out_channels, 3, 1, 1, bias=False, in_widths=widths, backend=backend)
        self.norm2 = dk.DENBatchNorm2d(
            out_channels, hierarchy.num_levels if bn == "per_level" else 1, num_sets=num_sets, backend=backend
        )

    def forward(self, x: Tensor, level_N: Tensor, set_index: int = 0, entry_stride: int = 1) -> Tensor:
        """x [N, C, H, W], level_N integer [N] -> [N, out_channels, H', W'].

        entry_stride: stride of the first convolution; above 1 only where the block is a network's entry and brings
            large images down to the size that the network was made for.
        """
        hidden_N = self.width(level_N)
        h = expand(self.conv1, x, hidden_N, entry_stride)
        h = self.norm1(h, width=hidden_N, set_index=set_index, relu=True)
        h = self.conv2.forward_widths(pool(h, self.pools[0]), hidden_N, None)
        h = self.norm2(h, level_N, set_index=set_index, relu=True)
        return pool(h, self.pools[1])

    def macs(self, height: int, width: int, entry_stride: int = 1) -> tuple[tuple[int, ...], tuple[int, int]]:
        first = conv_out(height, entry_stride), conv_out(width, entry_stride)
        second = (first[0] // 2, first[1] // 2) if self.pools[0] else first
        last = (second[0] // 2, second[1] // 2) if self.pools[1] else second
        per_width = self.in_channels * first[0] * first[1] + self.out_channels * second[0] * second[1]
        return tuple(9 * w * per_width for w in self.widths), last

    @property
    def param_counts(self) -> tuple[int, ...]:
        return tuple(9 * w * (self.in_channels + self.out_channels) for w in self.widths)


def expand(conv: dk.DENConv2d, x: Tensor, width_N: Tensor, stride: int) -> Tensor:
    """A 3x3 expand convolution at a stride that, in a network's entry, depends on the image size."""
    return dk.den_conv2d(x, conv.weight, conv.bias, None, width_N, stride=stride, padding=1, backend=conv.backend)


def pool(x: Tensor, wanted: bool) -> Tensor:
    """2x2 max pool of stride 2, if wanted."""
    return F.max_pool2d(x, 2) if wanted else x


class FrozenConvPair(nn.Module):
    """A `ConvPairBlock` as two fused convolutions."""

    def __init__(self, block: ConvPairBlock, options: FreezeOptions):
        super().__init__()
        dtype, levels, widths = options.dtype, block.hierarchy.num_levels, list(block.widths)
        self.pools = block.pools
        fused = functools.partial(dk.FusedConv2d, relu=True, winograd=options.winograd, backend=options.backend)
        self.conv1 = fused(block.conv1.weight.to(dtype), *tables(block.norm1, levels), out_widths=widths)
        self.conv2 = fused(block.conv2.weight.to(dtype), *tables(block.norm2, levels), in_widths=widths)

    def forward(
        self,
        x: Tensor,
        level_N: Tensor,
        order_N: Tensor,
        count_L: Tensor,
        set_index: int,
        entry_stride: int = 1,
    ) -> Tensor:
        """x [N, C, H, W], never overwritten -> [N, out_channels, H', W']; see `ConvPairBlock`."""
        h = self.conv1(x, level_N, order_N, set_index, entry_stride)
        h = self.conv2(pool(h, self.pools[0]), level_N, order_N, set_index)
        return pool(h, self.pools[1])


@freeze_block.register
def _(block: ConvPairBlock, options: FreezeOptions) -> nn.Module:
    return FrozenConvPair(block, options)


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

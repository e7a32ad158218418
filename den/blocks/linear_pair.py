"""Two hidden fully connected layers, the last block of VGG.

Suffixes: N samples, C channels, H W space.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import den_kernels as dk
from den.blocks.base import Block, check_has_channels, check_map
from den.blocks.forms import FreezeOptions, freeze_block, plain_block
from den.hierarchy import Hierarchy


class LinearPairBlock(Block):
    """Two fully connected layers, each with a ReLU; the features between the two are elastic and never 0.

    It reads the last map of the convolutions, flattened, and gives its features as a map of one pixel. As in VGG, and
    as in `HiddenTail`, there is no batch norm: over features it would have one value a sample to go by. Biases are not
    among its cost, as in the paper's printed sizes.

    Args:
        in_channels, size: of the map that it reads, [N, in_channels, *size].
        hidden_features, out_features: units of the two layers.
        hierarchy: level ratios, all above 0.
        backend: of `den_kernels`.

    Raises:
        ValueError: the hierarchy has a level of width 0.
    """

    def __init__(
        self,
        in_channels: int,
        size: tuple[int, int],
        hidden_features: int,
        out_features: int,
        hierarchy: Hierarchy,
        *,
        backend: str = "auto",
    ):
        check_has_channels(hierarchy)
        widths = hierarchy.widths(hidden_features)
        super().__init__(in_channels, out_features, hierarchy, widths)
        self.size = size
        features = in_channels * size[0] * size[1]
        self.linear1 = dk.DENLinear(features, hidden_features, out_widths=widths, backend=backend)
        self.linear2 = dk.DENLinear(hidden_features, out_features, in_widths=widths, backend=backend)

    def forward(self, x: Tensor, level_N: Tensor, set_index: int = 0) -> Tensor:
        """x [N, C, *size], level_N integer [N] -> [N, out_features, 1, 1]."""
        check_map(x, (self.in_channels, *self.size))
        hidden_N = self.width(level_N)
        h = F.relu(self.linear1.forward_widths(x.flatten(1), None, hidden_N))
        return F.relu(self.linear2.forward_widths(h, hidden_N, None))[:, :, None, None]

    def macs(self, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        return self.param_counts, (1, 1)

    @property
    def param_counts(self) -> tuple[int, ...]:
        return tuple(w * (self.linear1.in_features + self.linear2.out_features) for w in self.widths)


class FrozenLinearPair(nn.Module):
    """A `LinearPairBlock` as two fused convolutions of one pixel."""

    def __init__(self, block: LinearPairBlock, options: FreezeOptions):
        super().__init__()
        self.map_shape = (block.in_channels, *block.size)
        levels, widths = block.hierarchy.num_levels, list(block.widths)

        def fused(layer: dk.DENLinear, read: list[int] | None, made: list[int] | None) -> dk.FusedConv2d:
            weight = layer.weight.detach()[:, :, None, None].to(options.dtype)
            shift = layer.bias.detach().expand(1, levels, -1)
            form = functools.partial(dk.FusedConv2d, in_widths=read, out_widths=made, relu=True)
            return form(weight, torch.ones_like(shift), shift, backend=options.backend)

        self.linear1 = fused(block.linear1, None, widths)
        self.linear2 = fused(block.linear2, widths, None)

    def forward(
        self, x: Tensor, level_N: Tensor, order_N: Tensor, count_L: Tensor, set_index: int, entry_stride: int = 1
    ) -> Tensor:
        """x [N, C, *size], never overwritten -> [N, out_features, 1, 1]."""
        check_map(x, self.map_shape)
        h = self.linear1(x.flatten(1)[:, :, None, None], level_N, order_N)
        return self.linear2(h, level_N, order_N)


@freeze_block.register
def _(block: LinearPairBlock, options: FreezeOptions) -> nn.Module:
    return FrozenLinearPair(block, options)


class PlainLinearPair(nn.Module):
    """Two fully connected layers of one level's width."""

    def __init__(self, block: LinearPairBlock, level: int):
        super().__init__()
        width = block.widths[level]
        self.map_shape = (block.in_channels, *block.size)
        self.linear1 = plain_linear(block.linear1.weight[:width], block.linear1.bias[:width])
        self.linear2 = plain_linear(block.linear2.weight[:, :width], block.linear2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, *size] -> [N, out_features, 1, 1]."""
        check_map(x, self.map_shape)
        h = F.relu(self.linear1(x.flatten(1)), inplace=True)
        return F.relu(self.linear2(h), inplace=True)[:, :, None, None]


def plain_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with copies of these."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear


@plain_block.register
def _(block: LinearPairBlock, level: int, set_index: int) -> nn.Module:
    return PlainLinearPair(block, level)

"""Elastic blocks: a level switches on a prefix of the hidden channels (section 3.1 and A.1 of the paper).

A block's input and output channels never change; the first convolution *expands* into the level's hidden
channels, the second *contracts* them. Every other family's block joins by subclassing `Block`.

Suffixes: N samples, C channels, H W space, L levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import den_kernels as dk
from den.hierarchy import Hierarchy

BN_KINDS = ("per_level", "shared")


def shortcut(x: Tensor, stride: int, out_channels: int) -> Tensor:
    """Parameter-free shortcut: average pool of window and stride `stride`, then zero channels up to `out_channels`.

    A window cut by the border is divided by the elements inside. With stride 1 and equal channels it is x
    itself.
    x: [N, C, H, W]; returns [N, out_channels, ceil(H / stride), ceil(W / stride)].
    """
    if stride > 1:
        x = F.avg_pool2d(x, stride, stride, ceil_mode=True)
    if out_channels > x.shape[1]:
        x = F.pad(x, (0, 0, 0, 0, 0, out_channels - x.shape[1]))
    return x


def conv_out(size: int, stride: int) -> int:
    """Height or width behind a padded 3x3 convolution of this stride."""
    return (size - 1) // stride + 1


class Block(nn.Module, ABC):
    """What the estimator, the cost tables and `freeze` ask of a block.

    Attributes:
        in_channels, out_channels: channels of input and output, the same at every level.
        hierarchy: the level ratios.
        widths: hidden channels of each level, L integers.
        param_counts: convolution weights that each level runs, L integers (the paper's parameters).
    """

    level_width: Tensor

    def __init__(self, in_channels: int, out_channels: int, hierarchy: Hierarchy, widths: tuple[int, ...]):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.hierarchy = hierarchy
        self.widths = widths
        self.register_buffer("level_width", torch.tensor(widths, dtype=torch.int32), persistent=False)

    def width(self, level_N: Tensor) -> Tensor:
        """Hidden width of each sample, int32 [N], looked up on the levels' device."""
        return self.level_width.index_select(0, level_N)

    @abstractmethod
    def forward(self, x: Tensor, level_N: Tensor, set_index: int = 0) -> Tensor:
        """x [N, C, H, W] at integer levels [N]; set_index chooses the batch-norm statistics (a task's)."""

    @abstractmethod
    def macs(self, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Multiply-adds of each level for one map of this size, and the size of the output map."""

    @property
    @abstractmethod
    def param_counts(self) -> tuple[int, ...]: ...

    def extra_repr(self) -> str:
        return f"widths={self.widths}"


class ResidualBlock(Block):
    """Basic residual block, 3x3 and 3x3, with elastic hidden channels and a parameter-free shortcut.

    Pre-activation (wide residual networks): `shortcut(x) + conv2(relu(norm2(conv1(relu(norm1(x))))))`.
    Post-activation (residual networks): `relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x))))))`.
    At a level of width 0 the output is `shortcut(x)` bitwise: no norm, no ReLU.

    Batch norm. The statistics of a hidden channel, and of the map that a pre-activation block reads, do not
    depend on the block's own level: they have one set, over the samples that ran them. What a contract
    convolution puts out has another distribution at every level: behind it (post-activation only)
    `bn="per_level"` keeps a set for each.

    Args:
        in_channels, out_channels: the block's channels; out_channels is at least in_channels, and the hidden
            channels are out_channels.
        hierarchy: level ratios; a first ratio of 0 is the identity level.
        stride: of the first convolution and the shortcut.
        preactivation: see above.
        bn: "per_level" or "shared".
        num_sets: batch-norm sets, one a task or one for all.
        backend: of `den_kernels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hierarchy: Hierarchy,
        *,
        stride: int = 1,
        preactivation: bool = True,
        bn: str = "per_level",
        num_sets: int = 1,
        backend: str = "auto",
    ):
        if out_channels < in_channels:
            raise ValueError(
                f"out_channels is {out_channels}, below in_channels {in_channels}; "
                "a parameter-free shortcut only adds channels"
            )
        hidden = out_channels
        widths = hierarchy.widths(hidden)
        super().__init__(in_channels, out_channels, hierarchy, widths)
        self.stride, self.preactivation = stride, preactivation
        self.conv1 = dk.DENConv2d(in_channels, hidden, 3, stride, 1, bias=False, out_widths=widths, backend=backend)
        self.conv2 = dk.DENConv2d(hidden, out_channels, 3, 1, 1, bias=False, in_widths=widths, backend=backend)
        if preactivation:
            self.norm1 = dk.DENBatchNorm2d(in_channels, num_sets=num_sets, backend=backend)
            self.norm2 = dk.DENBatchNorm2d(hidden, num_sets=num_sets, backend=backend)
        else:
            self.norm1 = dk.DENBatchNorm2d(hidden, num_sets=num_sets, backend=backend)
            self.norm2 = dk.DENBatchNorm2d(
                out_channels, hierarchy.num_levels if bn == "per_level" else 1, num_sets=num_sets, backend=backend
            )

    def forward(self, x: Tensor, level_N: Tensor, set_index: int = 0) -> Tensor:
        """x [N, C, H, W], level_N integer [N] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        hidden_N = self.width(level_N)
        ran_N = hidden_N > 0
        skipped = self.widths[0] == 0
        y = shortcut(x, self.stride, self.out_channels)
        if self.preactivation:
            trunk_N = ran_N * self.in_channels if skipped else None
            h = self.norm1(x, width=trunk_N, set_index=set_index, relu=True)
            h = self.conv1.forward_widths(h, None, hidden_N)
            h = self.norm2(h, width=hidden_N, set_index=set_index, relu=True)
            return self.conv2.forward_widths(h, hidden_N, None, residual=y)  # y itself at width 0
        out_N = ran_N * self.out_channels if skipped else None
        h = self.conv1.forward_widths(x, None, hidden_N)
        h = self.norm1(h, width=hidden_N, set_index=set_index, relu=True)
        h = self.conv2.forward_widths(h, hidden_N, None)
        z = F.relu(y + self.norm2(h, level_N, width=out_N, set_index=set_index))
        return torch.where(ran_N[:, None, None, None], z, y) if skipped else z

    def macs(self, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        size = conv_out(height, self.stride), conv_out(width, self.stride)
        return tuple(count * size[0] * size[1] for count in self.param_counts), size

    @property
    def param_counts(self) -> tuple[int, ...]:
        return tuple(9 * w * (self.in_channels + self.out_channels) for w in self.widths)


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
        if hierarchy.has_identity:
            raise ValueError(
                f"ratios is {hierarchy.ratios}; the first must be above 0 here: a level without channels exists only "
                "in residual blocks, for a plain pair of convolutions has no shortcut to fall back on"
            )
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

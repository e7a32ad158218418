"""The basic residual block, of wide and of plain residual networks.

Suffixes: N samples, C channels, H W space, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import den_kernels as dk
from den.blocks.base import Block, conv_out, shortcut
from den.blocks.forms import FreezeOptions, PlainShortcut, fold, freeze_block, plain_block, plain_conv, tables
from den.hierarchy import Hierarchy


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


@freeze_block.register
def _(block: ResidualBlock, options: FreezeOptions) -> nn.Module:
    levels = block.hierarchy.num_levels
    weights = [block.conv1.weight.to(options.dtype), block.conv2.weight.to(options.dtype)]
    if block.preactivation:
        pre = [table[:, 0] for table in tables(block.norm1)]
        hidden = tables(block.norm2, levels)
        shape = (hidden[0].shape[0], levels, block.out_channels)
        out = hidden[0].new_ones(shape), hidden[0].new_zeros(shape)
    else:
        pre = []
        hidden, out = tables(block.norm1, levels), tables(block.norm2, levels)
    return dk.FusedResidualBlock(
        weights,
        [hidden[0], out[0]],
        [hidden[1], out[1]],
        block.widths,
        strides=[block.stride, 1],
        pre_scale=pre[0] if pre else None,
        pre_shift=pre[1] if pre else None,
        relu=not block.preactivation,
        winograd=options.winograd,
        backend=options.backend,
    )


class PlainResidualBlock(nn.Module):
    """A residual block at a level with channels."""

    pre_scale: Tensor | None
    pre_shift: Tensor | None

    def __init__(self, block: ResidualBlock, level: int, set_index: int):
        super().__init__()
        self.shortcut = PlainShortcut(block.stride, block.out_channels)
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
        h = h.add_(self.shortcut(x))
        return F.relu(h, inplace=True) if self.relu else h


@plain_block.register
def _(block: ResidualBlock, level: int, set_index: int) -> nn.Module:
    if block.widths[level] == 0:
        return PlainShortcut(block.stride, block.out_channels)
    return PlainResidualBlock(block, level, set_index)

"""The dense network with cuDNN's fused convolutions: bias, ReLU and residual in the epilogue, no pass of their own.

What PyTorch runs as it comes makes a pass over the map for the ReLU, and another to add the shortcut. A pre-activation
block's sum has no ReLU behind it, and stays as it is.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.worker import Unusable
from den.blocks import PlainBottleneckBlock, PlainResidualBlock
from den.dense import DenseNetwork


def fuse(net: DenseNetwork) -> DenseNetwork:
    """The network itself, its residual blocks in their fused form. Raises Unusable where it has none."""
    kinds = (PlainResidualBlock, PlainBottleneckBlock)
    if not any(isinstance(block, kinds) for block in net.blocks):
        raise Unusable("cuDNN's fused form is written for residual blocks, and this network has none")
    net.blocks = nn.ModuleList(FusedPlainBlock(block) if isinstance(block, kinds) else block for block in net.blocks)
    return net


class FusedPlainBlock(nn.Module):
    """A plain residual block, basic or bottleneck, in cuDNN's fused convolutions."""

    def __init__(self, block: PlainResidualBlock | PlainBottleneckBlock):
        super().__init__()
        self.block = block
        self.convs = [cast(nn.Conv2d, conv) for name, conv in block.named_children() if name.startswith("conv")]
        self.relu = getattr(block, "relu", True)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)], as the block's own."""
        h = x
        scale, shift = (getattr(self.block, name, None) for name in ("pre_scale", "pre_shift"))
        if scale is not None and shift is not None:
            h = F.relu(torch.addcmul(shift, x, scale), inplace=True)
        *inner, last = self.convs
        for conv in inner:
            h = torch.cudnn_convolution_relu(h, conv.weight, conv.bias, *_geometry(conv))
        y = self.block.shortcut(x)
        if not self.relu:
            return last(h).add_(y)
        return torch.cudnn_convolution_add_relu(h, last.weight, y, 1.0, last.bias, *_geometry(last))


def _geometry(conv: nn.Conv2d) -> tuple:
    return conv.stride, conv.padding, conv.dilation, conv.groups

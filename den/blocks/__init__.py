"""Elastic blocks: a level switches on a prefix of the hidden channels (section 3.1 and A.1 of the paper).

A block's input and output channels never change; its first layer *expands* into the level's hidden channels, its last
*contracts* them. One kind of block a file, with its training, frozen and plain form; another joins by subclassing
`Block` and registering its forms with `freeze_block` and `plain_block`.
"""

from den.blocks.base import BN_KINDS, Block, conv_out, shortcut
from den.blocks.bottleneck import BottleneckBlock, PlainBottleneckBlock
from den.blocks.conv_pair import ConvPairBlock
from den.blocks.forms import FreezeOptions, freeze_block, plain_block
from den.blocks.linear_pair import LinearPairBlock
from den.blocks.residual import PlainResidualBlock, ResidualBlock

__all__ = [
    "BN_KINDS",
    "Block",
    "BottleneckBlock",
    "ConvPairBlock",
    "FreezeOptions",
    "LinearPairBlock",
    "PlainBottleneckBlock",
    "PlainResidualBlock",
    "ResidualBlock",
    "conv_out",
    "freeze_block",
    "plain_block",
    "shortcut",
]

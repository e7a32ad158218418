"""VGG (Simonyan and Zisserman, 2015), a backbone of the paper's network compression, with batch norm.

3x3 convolutions with a 2x2 max pool behind each of five stages, then two hidden fully connected layers of 4096 units.
Blocks are two consecutive layers (section 4.1 of the paper), the channels between the two elastic.
"""

from __future__ import annotations

from den.backbones import register
from den.blocks import Block, ConvPairBlock, LinearPairBlock
from den.estimator import Estimator, EstimatorOptions, PoolTail, Stem, stem_stride

WIDTHS = (64, 128, 256, 512, 512)
PAPER = (2, 2, 4, 4, 4)  # configuration E
COMMON = (2, 2, 3, 3, 3)  # configuration D
HIDDEN = 4096


@register(r"vgg_16", names=("vgg_16",), ratios=(0.25, 0.5, 1))
def vgg_16(options: EstimatorOptions, *, image_size: int | None = None) -> Estimator:
    """The paper's "VGG-16": its printed size is that of 16 convolutions, configuration E, known as VGG-19.

    Eight pairs of convolutions and the pair of fully connected layers: 9 blocks, at 32x32 38,893,248 weights and
    417,005,568 multiply-adds. Every weight is elastic: a level runs its share of the whole network.

    Args:
        options: see `EstimatorOptions`.
        image_size: of the square images; default base_size, or 32.
    """
    return _vgg(options, PAPER, image_size)


@register(r"vgg_16d", names=("vgg_16d",), ratios=(0.25, 0.5, 1))
def vgg_16d(options: EstimatorOptions, *, image_size: int | None = None) -> Estimator:
    """The common VGG-16: 13 convolutions, configuration D.

    The first, 1,728 weights, is the stem; the other twelve and the fully connected layers are 7 blocks.
    At 32x32 33,584,832 weights; with base_size=224 images enter at that size, for 134,248,128.
    """
    return _vgg(options, COMMON, image_size)


def _vgg(options: EstimatorOptions, stages: tuple[int, ...], image_size: int | None) -> Estimator:
    size = image_size or options.base_size or 32
    # Output channels of each convolution, and whether a pool follows it.
    layers = [(width, i + 1 == count) for width, count in zip(WIDTHS, stages, strict=True) for i in range(count)]
    stem, channels = None, options.in_channels
    if len(layers) % 2:
        (channels, _), *layers = layers
        stem = Stem(options.in_channels, channels, norm=True, num_sets=options.num_sets)
    blocks: list[Block] = []
    stride = stem_stride(size, size, options.base_size)
    grid = -(-size // stride), -(-size // stride)
    for (hidden, pool1), (out, pool2) in zip(layers[::2], layers[1::2], strict=True):
        more = {"pools": (pool1, pool2), **options.block_options}
        blocks.append(ConvPairBlock(channels, hidden, out, options.hierarchy, **more))
        grid = blocks[-1].macs(*grid)[1]
        channels = out
    if min(grid) < 1:
        raise ValueError(f"image_size is {size}; VGG downsamples by 32 and needs at least 32")
    blocks.append(LinearPairBlock(channels, grid, HIDDEN, HIDDEN, options.hierarchy, backend=options.backend))
    return Estimator(blocks, PoolTail(HIDDEN, norm=False), options, stem=stem, image_size=size)

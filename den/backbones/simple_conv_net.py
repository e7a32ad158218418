"""SimpleConvNet (references [27, 29] of the paper), the backbone of the paper's second scenario.

Four 3x3 convolutions of 32 filters, a 2x2 max pool behind each, two hidden fully connected layers of 128
units. The paper splits the convolutions alone, in two levels of which the lower has half the parameters: two
blocks of two convolutions.
"""

from __future__ import annotations

from den.backbones import register
from den.blocks import ConvPairBlock
from den.estimator import Estimator, EstimatorOptions, HiddenTail, stem_stride


@register(
    r"simple_conv_net(?:_(84|224))?",
    names=("simple_conv_net", "simple_conv_net_84", "simple_conv_net_224"),
    ratios=(0.5, 1),
    base_size=84,
)
def simple_conv_net(options: EstimatorOptions, size: int | None = None, *, image_size: int | None = None) -> Estimator:
    """SimpleConvNet for square images of one size: 84 if neither the name nor `image_size` says.

    Images of twice base_size or more enter through a strided first convolution, and the last pool is left out:
    at 224 the network downsamples by 16, as the paper's parameter count tells. At 84: 147,552 parameters (hidden
    layers with their biases) and 27,458,048 multiply-adds; at 224: 847,968 and 49,590,272.

    Raises:
        ValueError: image_size contradicts the name or is too small for the pools.
    """
    if size is not None and image_size not in (None, size):
        raise ValueError(f"image_size is {image_size}, but the name is 'simple_conv_net_{size}'; leave one of them out")
    size = size or image_size or 84
    stride = stem_stride(size, size, options.base_size)
    more = {"pools": (True, True), **options.block_options}
    first = ConvPairBlock(options.in_channels, 32, 32, options.hierarchy, **more)
    second = ConvPairBlock(32, 32, 32, options.hierarchy, **{**more, "pools": (True, stride == 1)})
    _, grid = second.macs(*first.macs(size, size, stride)[1])
    if min(grid) < 1:
        raise ValueError(f"image_size is {size}; SimpleConvNet downsamples by 16 and needs at least 16")
    return Estimator([first, second], HiddenTail(32, grid, (128, 128)), options, image_size=size)

"""Residual networks, ResNet-l (He et al., 2016), as the paper's first scenario uses them on small images.

3x3 stem to 64 channels, four stages of (l - 2) / 8 basic post-activation blocks with 64, 128, 256 and 512 channels,
stride 2 at the start of all but the first, parameter-free shortcuts, global average pool.
"""

from __future__ import annotations

from den.backbones import register
from den.blocks import ResidualBlock
from den.estimator import Estimator, EstimatorOptions, PoolTail, Stem


# ResNet-50, 101 and 152 are the bottleneck networks of resnet_bottleneck.py.
@register(r"resnet_(?!(?:50|101|152)$)(\d+)", names=("resnet_10", "resnet_18", "resnet_26", "resnet_34", "resnet_42"))
def resnet(options: EstimatorOptions, layers: int) -> Estimator:
    """ResNet-l. ResNet-42 has 20 blocks, 29,787,840 convolution weights and 1,455,095,808 multiply-adds at 32x32.

    Raises:
        ValueError: layers is not 8n + 2 with n at least 1.
    """
    per_stage, rest = divmod(layers - 2, 8)
    if rest or per_stage < 1:
        raise ValueError(
            f"name is 'resnet_{layers}'; the layers must be 8n + 2 for n basic blocks a stage: 10, 18, 26, 34, 42, ... "
            "(or 50, 101, 152 for the bottleneck networks)"
        )
    blocks, channels = [], 64
    for stage in range(4):
        for index in range(per_stage):
            stride = 2 if stage > 0 and index == 0 else 1
            width = 64 * 2**stage
            more = {"stride": stride, "preactivation": False, **options.block_options}
            blocks.append(ResidualBlock(channels, width, options.hierarchy, **more))
            channels = width
    stem = Stem(options.in_channels, 64, norm=True, num_sets=options.num_sets)
    return Estimator(blocks, PoolTail(channels, norm=False), options, stem=stem)

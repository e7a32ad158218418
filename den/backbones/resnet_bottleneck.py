"""ResNet-50, 101 and 152 (He et al., 2016), the networks of 224x224 images: torchvision's, made elastic.

7x7 stem of stride 2 to 64 channels, 3x3 max pool of stride 2, four stages of bottleneck blocks with 64, 128, 256 and
512 hidden channels and four times as many outside. Stride 2, on the 3x3 convolution, at the start of all stages but
the first; a projection as the shortcut of every stage's first block, the identity elsewhere; global average pool.
"""

from __future__ import annotations

from den.backbones import register
from den.blocks import BottleneckBlock
from den.estimator import Estimator, EstimatorOptions, PoolTail, Stem

STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@register(r"resnet_(50|101|152)", names=("resnet_50", "resnet_101", "resnet_152"), base_size=224)
def resnet_bottleneck(options: EstimatorOptions, layers: int) -> Estimator:
    """ResNet-50 has 16 blocks, 23,454,912 convolution weights and 4,087,136,256 multiply-adds at 224x224.

    The projections are among them: they run at every level, also where their block is left out.
    """
    blocks, channels = [], 64
    for stage, count in enumerate(STAGES[layers]):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            hidden = 64 * 2**stage
            more = {"stride": stride, "projection": index == 0, **options.block_options}
            blocks.append(BottleneckBlock(channels, hidden, 4 * hidden, options.hierarchy, **more))
            channels = 4 * hidden
    stem = Stem(options.in_channels, 64, norm=True, num_sets=options.num_sets, kernel_size=7, stride=2, pool=True)
    return Estimator(blocks, PoolTail(channels, norm=False), options, stem=stem)

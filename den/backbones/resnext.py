"""ResNeXt-l (c x sd) (Xie et al., 2017), a backbone of the paper's network compression.

3x3 stem to 64 channels, three stages of (l - 2) / 9 bottleneck blocks of c paths, s, 2s and 4s channels a path, with
64, 128 and 256 output channels (a quarter of the original's, as the paper's printed sizes tell). Stride 2 at the start
of the second and third stage, parameter-free shortcuts, global average pool. A level runs whole paths.
"""

from __future__ import annotations

from den.backbones import register
from den.blocks import BottleneckBlock
from den.estimator import Estimator, EstimatorOptions, PoolTail, Stem


# Fewer than eight paths make three levels, after the paper's random selector: 5.6M parameters on average at 4x64d.
@register(r"resnext_(\d+)_([1-7])x(\d+)d", names=("resnext_29_2x64d", "resnext_29_4x64d"), ratios=(0, 0.5, 1))
@register(r"resnext_(\d+)_([89]|\d{2,})x(\d+)d", names=("resnext_29_8x64d", "resnext_29_16x64d"))
def resnext(options: EstimatorOptions, layers: int, paths: int, width: int) -> Estimator:
    """ResNeXt-l (c x sd).

    Of nine blocks, ResNeXt-29 8x64d has 22,382,272 convolution weights, 4x64d 11,192,000, 2x64d 5,596,864.

    Raises:
        ValueError: layers is not 9n + 2 with n at least 1, or a width is 0, or there are fewer paths than levels.
    """
    per_stage, rest = divmod(layers - 2, 9)
    name = f"resnext_{layers}_{paths}x{width}d"
    if rest or per_stage < 1:
        raise ValueError(f"name is {name!r}; the layers must be 9n + 2 for n blocks a stage: 11, 20, 29, 38, ...")
    if paths < 1 or width < 1:
        raise ValueError(f"name is {name!r}; paths and channels a path must be at least 1")
    blocks, channels = [], 64
    for stage in range(3):
        for index in range(per_stage):
            stride = 2 if stage > 0 and index == 0 else 1
            hidden, out = paths * width * 2**stage, 64 * 2**stage
            more = {"stride": stride, "groups": paths, **options.block_options}
            blocks.append(BottleneckBlock(channels, hidden, out, options.hierarchy, **more))
            channels = out
    stem = Stem(options.in_channels, 64, norm=True, num_sets=options.num_sets)
    return Estimator(blocks, PoolTail(channels, norm=False), options, stem=stem)

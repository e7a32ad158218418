"""Wide residual networks, WRN-l-r (Zagoruyko and Komodakis, 2016), the paper's backbone for small images.

3x3 stem to 16 channels, three stages of (l - 2) / 6 basic pre-activation blocks with 16r, 32r and 64r
channels, stride 2 at the start of the second and third, parameter-free shortcuts, norm, ReLU and global
average pool.
"""

from __future__ import annotations

from den.backbones import register
from den.blocks import ResidualBlock
from den.estimator import Estimator, EstimatorOptions, PoolTail, Stem


@register(
    r"wrn_(\d+)_(\d+)",
    names=(
        "wrn_8_1",
        "wrn_14_1",
        "wrn_14_2",
        "wrn_20_2",
        "wrn_20_4",
        "wrn_26_4",
        "wrn_32_1",
        "wrn_32_2",
        "wrn_32_4",
        "wrn_32_8",
    ),
)
def wrn(options: EstimatorOptions, layers: int, factor: int) -> Estimator:
    """WRN-l-r. WRN-32-4 has 15 blocks, 7,345,584 convolution weights and 1,066,844,160 multiply-adds at 32x32.

    Raises:
        ValueError: layers is not 6n + 2 with n at least 1, or factor is 0.
    """
    per_stage, rest = divmod(layers - 2, 6)
    if rest or per_stage < 1:
        raise ValueError(
            f"name is 'wrn_{layers}_{factor}'; the layers must be 6n + 2 for n blocks a stage: 8, 14, 20, 26, 32, ..."
        )
    if factor < 1:
        raise ValueError(f"name is 'wrn_{layers}_{factor}'; the widening factor must be at least 1")
    blocks, channels = [], 16
    for stage in range(3):
        for index in range(per_stage):
            stride = 2 if stage > 0 and index == 0 else 1
            width = 16 * factor * 2**stage
            blocks.append(ResidualBlock(channels, width, options.hierarchy, stride=stride, **options.block_options))
            channels = width
    stem = Stem(options.in_channels, 16, norm=False)
    return Estimator(blocks, PoolTail(channels, norm=True, num_sets=options.num_sets), options, stem=stem)

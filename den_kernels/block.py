"""The constants of fused residual blocks, and the shapes that they make.

L levels, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class BlockArguments(NamedTuple):
    """What a residual block computes with, behind its input and levels; see `reference.residual_block`.

    widths: int32 [L]. weight: packed by a backend, one a convolution, like scale and shift [L, C], kernel_size, stride
    and groups. pre_scale, pre_shift: [C], or None. projection: a packed 1x1 weight and its scale and shift [L, C], or
    nothing.
    """

    widths: Tensor
    weight: Sequence[Tensor]
    scale: Sequence[Tensor]
    shift: Sequence[Tensor]
    pre_scale: Tensor | None
    pre_shift: Tensor | None
    kernel_size: Sequence[int]
    stride: Sequence[int]
    groups: Sequence[int]
    projection: Sequence[Tensor]
    relu: bool

    @property
    def levels(self) -> int:
        return self.scale[0].shape[0]

    @property
    def output(self) -> tuple[int, int]:
        """Channels of the result, and by how much its map is smaller."""
        return self.scale[-1].shape[1], math.prod(self.stride)


def at_levels(widths: Tensor | None, level: Tensor) -> Tensor | None:
    """The width [N] of each sample of a level [N], from those of each level [L]; None: all channels."""
    return None if widths is None else widths.index_select(0, level)


def batch_class(tile_bounds: Sequence[int], shape: Sequence[int], stride: int) -> int:
    """Which form of its weights a layer of this stride takes for a batch [N, C, H, W]; see `den_kernels.backends`."""
    height, width = (-(-size // stride) for size in shape[2:])
    tiles = shape[0] * -(-height // 4) * -(-width // 4)
    below = sum(tiles < bound for bound in tile_bounds)
    # Tiles that are mostly empty are no reason for large ones.
    return max(below, min(1, len(tile_bounds))) if height <= 2 and width <= 2 else below


def output_shape(shape: Sequence[int], channels: int, stride: Sequence[int]) -> tuple[int, int, int, int]:
    """[N, C, H, W] behind a block of these output channels and strides that reads a map of this shape."""
    step = math.prod(stride)
    return shape[0], channels, (shape[2] + step - 1) // step, (shape[3] + step - 1) // step


def unmoved(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A backend's `gather` where it does not matter in which memory weights lie: the tensors themselves."""
    return list(tensors)

"""What every block shares: its interface, the parameter-free shortcut, sizes.

Suffixes: N samples, C channels, H W space, L levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from den.hierarchy import Hierarchy

BN_KINDS = ("per_level", "shared")


def shortcut(x: Tensor, stride: int, out_channels: int) -> Tensor:
    """Parameter-free shortcut: average pool of window and stride `stride`, then zero channels up to `out_channels`.

    A window cut by the border is divided by the elements inside. With stride 1 and equal channels it is x
    itself.
    x: [N, C, H, W]; returns [N, out_channels, ceil(H / stride), ceil(W / stride)].
    """
    if stride > 1:
        x = F.avg_pool2d(x, stride, stride, ceil_mode=True)
    if out_channels > x.shape[1]:
        x = F.pad(x, (0, 0, 0, 0, 0, out_channels - x.shape[1]))
    return x


def conv_out(size: int, stride: int) -> int:
    """Height or width behind a padded 3x3 convolution of this stride."""
    return (size - 1) // stride + 1


def check_map(x: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless x [N, C, H, W] is the map that the fully connected layers were made for."""
    if tuple(x.shape[1:]) != shape:
        raise ValueError(
            f"x gives a last map of {x.shape[2]}x{x.shape[3]}, but the hidden layers were made for "
            f"{shape[1]}x{shape[2]}; resize the images, or create the model with their image_size"
        )


def check_has_channels(hierarchy: Hierarchy) -> None:
    """Raise ValueError if the hierarchy has a level of width 0."""
    if hierarchy.has_identity:
        raise ValueError(
            f"ratios is {hierarchy.ratios}; the first must be above 0 here: a level without channels exists only in "
            "residual blocks, for a plain pair of layers has no shortcut to fall back on"
        )


class Block(nn.Module, ABC):
    """What the estimator, the cost tables and `freeze` ask of a block.

    Attributes:
        in_channels, out_channels: channels of input and output, the same at every level.
        hierarchy: the level ratios.
        widths: hidden channels of each level, L integers.
        param_counts: convolution weights that each level runs, L integers (the paper's parameters).
    """

    level_width: Tensor

    def __init__(self, in_channels: int, out_channels: int, hierarchy: Hierarchy, widths: tuple[int, ...]):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.hierarchy = hierarchy
        self.widths = widths
        self.register_buffer("level_width", torch.tensor(widths, dtype=torch.int32), persistent=False)

    def width(self, level_N: Tensor) -> Tensor:
        """Hidden width of each sample, int32 [N], looked up on the levels' device."""
        return self.level_width.index_select(0, level_N)

    @abstractmethod
    def forward(self, x: Tensor, level_N: Tensor, set_index: int = 0) -> Tensor:
        """x [N, C, H, W] at integer levels [N]; set_index chooses the batch-norm statistics (a task's)."""

    @abstractmethod
    def macs(self, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Multiply-adds of each level for one map of this size, and the size of the output map."""

    @property
    @abstractmethod
    def param_counts(self) -> tuple[int, ...]: ...

    def extra_repr(self) -> str:
        return f"widths={self.widths}"

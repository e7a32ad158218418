"""Batch norm over the samples that ran a channel: forward and backward, reading active channels alone.

Sums over a batch take two launches, without atomics. First each program sweeps the pixels of one sample and a few
channels, and keeps what it finds in a float32 table [N, C]; then each program adds up one row of statistics (a level)
for a few channels, over the samples of that row in their order. A third launch makes the result. Tiles of channels
beyond a sample's width are not read, only written as zeros.

N samples, C channels, P pixels, R rows of statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from den_kernels.backends.triton import configs
from den_kernels.backends.triton.launch import Launch, Sweep, check_indexable
from den_kernels.backends.triton.norm_kernels import (
    gradient_sums_kernel,
    input_gradient_kernel,
    moments_kernel,
    normalise_kernel,
    parameter_gradients_kernel,
    statistics_kernel,
)


class Norm(NamedTuple):
    """What a norm is told beside its maps, contiguous; see `ops.py`."""

    row: torch.Tensor | None
    width: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    relu: bool


class _Plan:
    """The sizes and tiles that the launches over one map x [N, C, H, W] (channels_last, not empty) share."""

    def __init__(self, x: torch.Tensor, norm: Norm, rows: int):
        self.samples, self.channels = x.shape[:2]
        self.pixels = x.shape[2] * x.shape[3]
        check_indexable(x[0], x)
        lanes = min(64, max(16, 1 << (self.channels - 1).bit_length()))
        self.tile = Sweep(min(64, max(16, 1 << (self.pixels - 1).bit_length())), lanes, 4)
        # A sum over the samples has few programs (rows by tiles of channels): narrow ones, so that there are more, and
        # many samples at a time, so that each waits for few loads.
        self.sum_tile = Sweep(min(256, max(16, 1 << (self.samples - 1).bit_length())), 16, 4)
        self.tiles = -(-self.channels // lanes)
        self.sum_tiles = -(-self.channels // 16)
        self.tiles_p = -(-self.pixels // self.tile.block_rows)
        self.granule = {"GRANULE": configs.granule(self.channels)}
        self.rows = rows
        self.members = {"row_ptr": norm.row, "width_ptr": norm.width}
        self.affine = {"weight_ptr": norm.weight, "bias_ptr": norm.bias, "eps": norm.eps}
        self.relu = {"RELU": norm.relu}

    def of_samples(self, kernel, arguments: dict, constants: dict) -> Launch:
        """A program a sample and tile of channels."""
        sizes = {"pixels": self.pixels, "channels": self.channels, "tiles": self.tiles}
        return Launch(kernel, self.samples * self.tiles, arguments | sizes, self.granule | constants, self.tile)

    def of_rows(self, kernel, arguments: dict) -> Launch:
        """A program a row of statistics and tile of channels."""
        sizes = {"samples": self.samples, "rows": self.rows, "channels": self.channels, "tiles": self.sum_tiles}
        return Launch(kernel, self.rows * self.sum_tiles, self.members | arguments | sizes, {}, self.sum_tile)

    def of_pixels(self, kernel, arguments: dict, constants: dict) -> Launch:
        """A program a sample, tile of pixels and tile of channels."""
        sizes = {"rows": self.rows, "pixels": self.pixels, "channels": self.channels}
        arguments = self.members | arguments | sizes | {"tiles_p": self.tiles_p, "tiles": self.tiles}
        programs = self.samples * self.tiles_p * self.tiles
        return Launch(kernel, programs, arguments, self.granule | constants, self.tile)


def plan_forward(
    x: torch.Tensor, norm: Norm, y: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor
) -> list[Launch]:
    """The launches of the forward, in order; ``x`` and ``y`` are channels_last and not empty, the rest contiguous."""
    plan = _Plan(x, norm, mean.shape[0])
    sample_mean, sample_square = (x.new_empty((plan.samples, plan.channels), dtype=torch.float32) for _ in range(2))
    moments = {"x_ptr": x, "width_ptr": norm.width, "mean_ptr": sample_mean, "square_ptr": sample_square}
    sums = {"sample_mean_ptr": sample_mean, "sample_square_ptr": sample_square}
    tables = {"mean_ptr": mean, "var_ptr": var}
    return [
        plan.of_samples(moments_kernel, moments, {}),
        plan.of_rows(statistics_kernel, sums | tables | {"count_ptr": count, "pixels": plan.pixels}),
        plan.of_pixels(normalise_kernel, {"x_ptr": x, "y_ptr": y} | tables | plan.affine, plan.relu),
    ]


def plan_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    mean: torch.Tensor,
    var: torch.Tensor,
    count: torch.Tensor,
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
) -> list[Launch]:
    """The launches of the backward, in order; maps are channels_last and not empty, the rest contiguous."""
    plan = _Plan(x, norm, mean.shape[0])
    sums, products = (x.new_empty((plan.samples, plan.channels), dtype=torch.float32) for _ in range(2))
    maps = {"grad_ptr": grad, "x_ptr": x}
    tables = {"mean_ptr": mean, "var_ptr": var} | plan.affine
    of_samples = {"sum_ptr": sums, "product_ptr": products}
    parameters = {"dweight_ptr": dweight, "dbias_ptr": dbias}
    return [
        plan.of_samples(
            gradient_sums_kernel, maps | plan.members | tables | of_samples | {"rows": plan.rows}, plan.relu
        ),
        plan.of_rows(parameter_gradients_kernel, of_samples | parameters | {"var_ptr": var, "eps": norm.eps}),
        plan.of_pixels(
            input_gradient_kernel, maps | tables | parameters | {"count_ptr": count, "dx_ptr": dx}, plan.relu
        ),
    ]

"""Batch norm over the samples that ran a channel, in plain PyTorch: the arithmetic of every backend without its own.

Any device and dtype; nothing waits for a device. Statistics are computed in float32 or better.

N samples, C channels, H W space, R rows of statistics (levels).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class _Members:
    """Which samples ran which channels, and sums and tables over them."""

    def __init__(
        self,
        x: Tensor,
        row: Tensor | None,
        width: Tensor | None,
        rows: int,
        total: Callable[[Tensor], Tensor] | None = None,
    ):
        n, channels = x.shape[:2]
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.row_N, self.taken_NC = row, None
        if row is None:
            share_RN = torch.ones((1, n), dtype=self.dtype, device=x.device)
        else:
            share_RN = (torch.arange(rows, device=x.device).view(-1, 1) == row).to(self.dtype)
        self.share_RN = share_RN
        if width is None:
            self.count_RC = share_RN.sum(1, keepdim=True).repeat(1, channels)
        else:
            self.taken_NC = torch.arange(channels, device=x.device) < width.view(-1, 1)
            self.count_RC = share_RN @ self.taken_NC.to(self.dtype)
        self.total = total
        if total is not None:
            self.count_RC = total(self.count_RC)
        self.elements_RC = (self.count_RC * (x.shape[2] * x.shape[3])).clamp(min=1)

    def sum(self, values: Tensor) -> Tensor:
        """[R, C]: over the pixels of the samples that ran each channel."""
        # Sums, not torch.var_mean, which takes a hundred times as long on a channels_last map on a CPU.
        sum_RC = self.share_RN @ values.sum((2, 3))
        return sum_RC if self.total is None else self.total(sum_RC)

    def of_samples(self, table_RC: Tensor) -> Tensor:
        """Each sample's row of a table, to broadcast over its pixels."""
        table_NC = table_RC if self.row_N is None else table_RC.index_select(0, self.row_N)
        return table_NC[:, :, None, None]

    def mask(self, values: Tensor) -> Tensor:
        """0 where a channel was not run."""
        return values if self.taken_NC is None else torch.where(self.taken_NC[:, :, None, None], values, 0)


def _scale(var_RC: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale_RC = torch.rsqrt(var_RC + eps)
    return scale_RC if weight is None else scale_RC * weight


def _normalise(centred: Tensor, members: _Members, scale_RC: Tensor, bias: Tensor | None) -> Tensor:
    y = centred * members.of_samples(scale_RC)
    return y if bias is None else y + members.of_samples(bias)


def batch_norm(
    x: Tensor,
    row: Tensor | None,
    width: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: int,
    eps: float,
    relu: bool,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x, and mean, biased variance and count of samples [R, C] of this batch; see `ops.py`.

    total: adds up a tensor over the processes that share the batch, and its gradient too; then autograd through this
    function gives the gradients.
    """
    members = _Members(x, row, width, rows, total)
    values = members.mask(x.to(members.dtype))
    mean_RC = members.sum(values) / members.elements_RC
    centred = members.mask(values - members.of_samples(mean_RC))
    var_RC = members.sum(centred.square()) / members.elements_RC
    y = members.mask(_normalise(centred, members, _scale(var_RC, weight, eps), bias))
    return (y.relu() if relu else y).to(x.dtype), mean_RC, var_RC, members.count_RC


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    row: Tensor | None,
    width: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, dweight and dbias [R, C], of what `batch_norm` computed."""
    members = _Members(x, row, width, mean.shape[0])
    centred = members.mask(members.mask(x.to(members.dtype)) - members.of_samples(mean))
    scale_RC = _scale(var, weight, eps)
    g = members.mask(grad.to(members.dtype))
    if relu:
        g = torch.where(_normalise(centred, members, scale_RC, bias) <= 0, 0, g)
    dbias_RC, product_RC = members.sum(g), members.sum(g * centred)
    by_x_RC = -scale_RC * product_RC / ((var + eps) * members.elements_RC)
    constant_RC = -scale_RC * dbias_RC / members.elements_RC
    dx = g * members.of_samples(scale_RC) + centred * members.of_samples(by_x_RC) + members.of_samples(constant_RC)
    return members.mask(dx).to(x.dtype), product_RC * torch.rsqrt(var + eps), dbias_RC

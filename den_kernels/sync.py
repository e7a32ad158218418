"""Batch norm over a batch that several processes share, on any device; PyTorch's own is for GPUs alone.

Sums over the samples that ran a channel are added up over the processes, so that the statistics, and with them the
training, are those of one process with the whole batch. Three small collectives a norm forward, and the same backward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from den_kernels.all_reduce import add_over_processes
from den_kernels.backends.batch_norm import batch_norm
from den_kernels.modules import DENBatchNorm2d


class SyncBatchNorm2d(nn.BatchNorm2d):
    """An `nn.BatchNorm2d` whose training statistics are those of all processes' batches together."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W]; every process has to call it alike."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        table = (None, None) if self.weight is None else (self.weight[None], self.bias[None])
        y, mean, var, count = batch_norm(x, None, None, *table, 1, self.eps, False, add_over_processes)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                elements = count[0] * x.shape[2] * x.shape[3]
                self.num_batches_tracked += 1
                step = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean[0].to(self.running_mean.dtype), step)
                unbiased = var[0] * elements / (elements - 1).clamp(min=1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), step)
        return y


def sync_batch_norm(module: nn.Module) -> nn.Module:
    """Let every batch norm inside a module take its statistics over all processes; in place, with the same parameters.

    Returns the module: `DENBatchNorm2d` with `sync` set, `nn.BatchNorm2d` replaced by `SyncBatchNorm2d`.
    """
    for part in list(module.modules()):
        if isinstance(part, DENBatchNorm2d):
            part.sync = True
        for name, child in part.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(part, name, _synchronised(child))
    return module


def _synchronised(norm: nn.BatchNorm2d) -> SyncBatchNorm2d:
    fresh = SyncBatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    fresh._parameters, fresh._buffers = norm._parameters, norm._buffers
    return fresh.train(norm.training)

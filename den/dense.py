"""One path of a DEN as an ordinary PyTorch network: the dense opponent of the benchmarks, and a static slim network.

Suffixes: N samples, C channels, H W space, B blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from den.blocks.base import Block
from den.blocks.forms import fold, plain_block, plain_conv, tables
from den.estimator import PoolTail, Stem, Tail, stem_pool, stem_stride
from den.freeze import freeze_tail
from den.model import DEN, check_level, check_task


def dense(
    model: DEN,
    task: str | None = None,
    level: Sequence[int] | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> DenseNetwork:
    """The sub-network of one path as plain PyTorch: `nn.Conv2d`s of the path's widths, channels_last, norms folded.

    A norm behind a convolution goes into its weight and bias; the one that a pre-activation block begins with stays a
    scale and shift. A residual block at level 0 is its shortcut. Weights are copies.

    Args:
        model: a DEN.
        task: whose statistics and head; may be left out if there is one.
        level: integers [B]; None: every block at its top level.
        dtype: of weights and activations; None: the model's.

    Returns: a module from images [N, C, H, W] to logits [N, classes], equal to `model.eval()(x, task, level).logits`.

    Raises:
        TypeError, ValueError: model is not a DEN, or task or level are none of its own.
    """
    if not isinstance(model, DEN):
        raise TypeError(f"model is a {type(model).__name__}; it must be a den.DEN")
    task = check_task(task, model.tasks)
    path = [model.num_levels - 1] * model.num_blocks if level is None else level
    path = path.cpu() if isinstance(path, Tensor) else path
    checked = check_level(path, torch.empty(1), model.num_blocks, model.num_levels)  # a batch of one
    with torch.no_grad():
        return DenseNetwork(model, task, checked[0].tolist(), dtype or next(model.estimator.parameters()).dtype)


class DenseNetwork(nn.Module):
    """Made by `dense`; see there."""

    def __init__(self, model: DEN, task: str, path: list[int], dtype: torch.dtype):
        super().__init__()
        estimator = model.estimator
        self.base_size, self.dtype = estimator.base_size, dtype
        self.set_index = set_index = estimator.set_index[task]
        self.stem = None if estimator.stem is None else PlainStem(estimator.stem, set_index)
        blocks = cast("list[Block]", list(estimator.blocks))
        self.blocks = nn.ModuleList(plain_block(block, l, set_index) for block, l in zip(blocks, path, strict=True))
        tail = cast(Tail, estimator.tail)
        self.tail = PlainPool(tail) if isinstance(tail, PoolTail) else freeze_tail(tail, dtype)
        self.head = copy.deepcopy(estimator.heads[task])
        self.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, classes]."""
        x = x.to(self.dtype, memory_format=torch.channels_last)
        stride = stem_stride(x.shape[2], x.shape[3], self.base_size)
        if self.stem is not None:
            x = self.stem(x, stride)
            stride = 1
        for block in self.blocks:
            x = block(x) if stride == 1 else block(x, stride)
            stride = 1
        return self.head(self.tail(x, self.set_index))


class PlainStem(nn.Module):
    """The stem with its norm, if any, folded."""

    def __init__(self, stem: Stem, set_index: int):
        super().__init__()
        self.pool, self.relu = stem.pool, stem.norm is not None
        if stem.norm is None:
            self.conv = plain_conv(stem.conv.weight, None, stem.stride)
        else:
            row = [table[set_index, 0] for table in tables(stem.norm)]
            self.conv = plain_conv(*fold(stem.conv.weight, *row), stem.stride)

    def forward(self, x: Tensor, stride: int) -> Tensor:
        x = F.conv2d(x, self.conv.weight, self.conv.bias, stride * self.conv.stride[0], self.conv.padding)
        return stem_pool(F.relu(x, inplace=True) if self.relu else x, self.pool)


class PlainPool(nn.Module):
    """The global average pool, behind a norm as a scale and shift and a ReLU if there is one."""

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, tail: PoolTail):
        super().__init__()
        folded = (None, None) if tail.norm is None else tables(tail.norm)
        for name, table in zip(("scale", "shift"), folded, strict=True):
            self.register_buffer(name, None if table is None else table[:, 0, :, None, None].clone())

    def forward(self, x: Tensor, set_index: int) -> Tensor:
        """x [N, C, H, W] -> [N, C]."""
        if self.scale is not None and self.shift is not None:
            x = torch.addcmul(self.shift[set_index], x, self.scale[set_index]).relu_()
        return x.mean((2, 3))

"""The estimator f(x; theta_est, z, t): stem, elastic blocks, tail and a head for each task (section 3.1 of the paper).

Suffixes: N samples, C channels, H W space, B blocks, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import den_kernels as dk
from den.blocks import Block, conv_out
from den.blocks.base import check_map
from den.hierarchy import Hierarchy


@dataclass(frozen=True)
class EstimatorOptions:
    """What every backbone family is built from, checked by `create_model`.

    base_size: image size that the network is made for; larger images are brought down to it by a stem stride of
        `min(H, W) // base_size`. None: the stride is always 1.
    """

    tasks: Mapping[str, int]
    hierarchy: Hierarchy
    in_channels: int = 3
    bn: str = "per_level"
    task_norm: str = "shared"
    base_size: int | None = 32
    backend: str = "auto"

    @property
    def num_sets(self) -> int:
        """Sets of batch-norm statistics: one a task, or one."""
        return len(self.tasks) if self.task_norm == "per_task" else 1

    @property
    def block_options(self) -> dict:
        """Keyword arguments that every block takes."""
        return {"bn": self.bn, "num_sets": self.num_sets, "backend": self.backend}


class Stem(nn.Module):
    """Convolution from image to trunk; with norm and ReLU in post-activation networks.

    Args:
        in_channels, out_channels: of the convolution.
        norm: whether norm and ReLU follow.
        num_sets: of the norm's statistics.
        kernel_size: odd; the padding is half of it.
        stride: of its own, times the one that a large image brings (`stem_stride`).
        pool: whether a 3x3 max pool of stride 2 comes last.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: bool,
        num_sets: int = 1,
        kernel_size: int = 3,
        stride: int = 1,
        pool: bool = False,
    ):
        super().__init__()
        self.stride, self.pool = stride, pool
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = dk.DENBatchNorm2d(out_channels, num_sets=num_sets) if norm else None

    def forward(self, x: Tensor, stride: int, set_index: int = 0) -> Tensor:
        """x [N, C, H, W] at an entry stride -> the trunk, [N, out_channels, H', W']."""
        x = F.conv2d(x, self.conv.weight, None, stride * self.stride, self.conv.padding)
        x = x if self.norm is None else self.norm(x, set_index=set_index, relu=True)
        return stem_pool(x, self.pool)

    def macs(self, height: int, width: int, stride: int) -> tuple[int, tuple[int, int]]:
        """Multiply-adds for one image of this size at an entry stride, and the size of the trunk's map."""
        size = conv_out(height, stride * self.stride), conv_out(width, stride * self.stride)
        trunk = (conv_out(size[0], 2), conv_out(size[1], 2)) if self.pool else size
        return self.conv.weight.numel() * size[0] * size[1], trunk


def stem_pool(x: Tensor, wanted: bool) -> Tensor:
    """3x3 max pool of stride 2, if wanted."""
    return F.max_pool2d(x, 3, 2, 1) if wanted else x


class Tail(nn.Module, ABC):
    """From the last block's map to the features that the heads read."""

    out_features: int
    param_count: int = 0
    macs: int = 0

    @abstractmethod
    def forward(self, x: Tensor, set_index: int = 0) -> Tensor:
        """x [N, C, H, W] -> [N, out_features]."""


class PoolTail(Tail):
    """Global average pool; behind norm and ReLU in pre-activation networks."""

    def __init__(self, channels: int, *, norm: bool, num_sets: int = 1):
        super().__init__()
        self.out_features = channels
        self.norm = dk.DENBatchNorm2d(channels, num_sets=num_sets) if norm else None

    def forward(self, x: Tensor, set_index: int = 0) -> Tensor:
        if self.norm is not None:
            x = self.norm(x, set_index=set_index, relu=True)
        return x.mean((2, 3))


class HiddenTail(Tail):
    """Flatten and hidden fully connected layers, each with a ReLU. The paper counts them.

    Args:
        channels, size: of the last block's map, [N, channels, *size].
        features: units of each layer.
    """

    def __init__(self, channels: int, size: tuple[int, int], features: Sequence[int]):
        super().__init__()
        self.map_shape = (channels, *size)
        widths = [channels * size[0] * size[1], *features]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, features, strict=False))
        self.out_features = features[-1]
        self.macs = sum(i * o for i, o in zip(widths, features, strict=False))
        self.param_count = self.macs + sum(features)

    def forward(self, x: Tensor, set_index: int = 0) -> Tensor:
        check_map(x, self.map_shape)
        x = x.flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


class Estimator(nn.Module):
    """The network whose sub-networks are chosen block by block.

    Made by the families in `den.backbones`. Convolutions and linear layers are initialised after Glorot
    ("Xavier", reference [8] and Algorithm 1 of the paper), biases with 0.

    Args:
        blocks: the elastic blocks.
        tail: from the last map to the features.
        options: see `EstimatorOptions`.
        stem: convolution before the blocks; None where the first block is the network's entry
            (`ConvPairBlock`).
        image_size: the image size that costs are told for when none is given; default base_size, or 32.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        tail: Tail,
        options: EstimatorOptions,
        *,
        stem: Stem | None = None,
        image_size: int | None = None,
    ):
        super().__init__()
        self.in_channels = options.in_channels
        self.base_size, self.hierarchy = options.base_size, options.hierarchy
        self.image_size = image_size or options.base_size or 32
        self.set_index = {task: index if options.num_sets > 1 else 0 for index, task in enumerate(options.tasks)}
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.tail = tail
        self.heads = nn.ModuleDict({task: nn.Linear(tail.out_features, c) for task, c in options.tasks.items()})
        self.apply(xavier)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters())).device

    @property
    def num_blocks(self) -> int:
        """B, the number of elastic blocks."""
        return len(self.blocks)

    @property
    def num_levels(self) -> int:
        """L, the number of levels of each block."""
        return self.hierarchy.num_levels

    @overload
    def forward(self, x: Tensor, level_NB: Tensor, task: str, gate_NBL: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, level_NB: Tensor, task: tuple[str, ...], gate_NBL: Tensor | None = None
    ) -> tuple[Tensor, ...]: ...

    def forward(self, x, level_NB, task, gate_NBL=None):
        """Logits of x [N, C, H, W] at integer levels [N, B], for a task's classes: [N, classes].

        task: a name; or a tuple of some that share statistics, for a tuple of what their heads give to one path.
        gate_NBL: the same levels as one-hot rows through which a gradient is wanted, in evaluation mode; see `gated`.
        """
        tasks = (task,) if isinstance(task, str) else task
        set_index = self.set_index[tasks[0]]
        stride = stem_stride(x.shape[2], x.shape[3], self.base_size)
        if self.stem is not None:
            x = self.stem(x, stride, set_index)
        for index, (block, level_N) in enumerate(zip(self.blocks, level_NB.unbind(1), strict=True)):
            entry = (stride,) if index == 0 and self.stem is None else ()
            if gate_NBL is None:
                x = block(x, level_N, set_index, *entry)
            else:
                x = gated(block, x, level_N, gate_NBL[:, index], set_index, *entry)
        features = self.tail(x, set_index)
        logits = tuple(self.heads[name](features) for name in tasks)
        return logits[0] if isinstance(task, str) else logits

    def entry(self, height: int, width: int) -> tuple[int, int, tuple[int, int]]:
        """For an image of this size: stem stride, stem multiply-adds, size of the map that the first block reads."""
        stride = stem_stride(height, width, self.base_size)
        if self.stem is None:
            return stride, 0, (height, width)
        return stride, *self.stem.macs(height, width, stride)


def gated(block: nn.Module, x: Tensor, level_N: Tensor, gate_NL: Tensor, *more: int) -> Tensor:
    """A block's output at integer levels, with a gradient for gates: the sum over levels of gate * output there.

    gate_NL: one-hot at level_N. The outputs at the other levels are constants, so that the input's gradient is that of
    the path taken. In evaluation mode alone: in training those levels would move the statistics.
    """
    num_levels = gate_NL.shape[1]
    out = block(x, level_N, *more)
    with torch.no_grad():
        every_N = torch.arange(num_levels, device=x.device).repeat_interleave(x.shape[0])
        every_LN = block(x.repeat(num_levels, 1, 1, 1), every_N, *more).unflatten(0, (num_levels, -1))
    return out + torch.einsum("nl,lnchw->nchw", gate_NL - gate_NL.detach(), every_LN.to(gate_NL.dtype)).to(out.dtype)


def stem_stride(height: int, width: int, base_size: int | None) -> int:
    """Stride that brings an image to the network's own scale: `min(H, W) // base_size`, at least 1.

    The paper gives native resolutions (32, 64, 96) and the FLOPs of a 32x32 first map for all: this is how
    both hold.
    """
    return 1 if base_size is None else max(1, min(height, width) // base_size)


@torch.no_grad()
def xavier(module: nn.Module) -> None:
    """Glorot's uniform initialisation of a convolution (of each group) or linear layer; others are left alone."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        for part in module.weight.chunk(module.groups if isinstance(module, nn.Conv2d) else 1):
            nn.init.xavier_uniform_(part)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

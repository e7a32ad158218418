"""The frozen DEN, and what it is compared with in PyTorch, for processes of `benchmarks.worker`.

Each function is given a job and the number of threads, and returns a function that runs the network once on the job's
images. Images are float32 for every engine; one that computes in another dtype converts them itself.

N samples, C channels, H W space, B blocks, L levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import den
import den_kernels as dk
from benchmarks.networks import network
from benchmarks.worker import Job, Unusable
from den.blocks import shortcut
from den.blocks.forms import fold, tables
from den.dense import DenseNetwork, dense

Run = Callable[[], np.ndarray]


def _engine(run: Callable[[], Tensor], threads: int) -> Run:
    torch.set_num_threads(threads)
    infer = torch.inference_mode()(run)
    return lambda: infer().float().numpy()


def _images(job: Job) -> Tensor:
    return torch.from_numpy(np.load(job.images)).contiguous(memory_format=torch.channels_last)


def _dtype(job: Job) -> torch.dtype:
    return getattr(torch, job.dtype)


def _levels(job: Job) -> Tensor:
    if job.level is None:
        raise ValueError("job.level is None; this engine needs the level of each sample and block")
    return torch.tensor(job.level)


# The DEN


@functools.cache
def _frozen(model: str, dtype: torch.dtype, backend: str, options: tuple[tuple[str, Any], ...]) -> den.FrozenDEN:
    """The product's inference form, on the backend that was asked for."""
    fast = den.freeze(network(model), dtype=dtype, backend=backend, **dict(options))
    check_backend(fast, backend)
    return fast


def check_backend(fast: den.FrozenDEN, backend: str) -> None:
    """Raise RuntimeError unless every fused layer, the selector's included, runs on the backend that was asked for."""
    ran = {m.backend for m in fast.modules() if isinstance(m, (dk.FusedResidualBlock, dk.FusedConv2d))}
    if ran != {backend}:
        raise RuntimeError(f"asked for backend {backend!r}, but the blocks run on {ran}")


def den_frozen(job: Job, threads: int) -> Run:
    """The frozen DEN at given levels. Options: backend, freeze (further arguments of `den.freeze`), selector: whether
    the selector's work is done in front; its choice is then set aside for the levels under test."""
    fast = _frozen(job.model, _dtype(job), job.options["backend"], tuple(job.options.get("freeze", {}).items()))
    x, level_NB = _images(job), _levels(job)

    def given() -> Tensor:
        return fast(x, level=level_NB).logits

    def chosen() -> Tensor:
        images = x.to(fast.dtype)
        fast.selector(images).float().softmax(2).argmax(2)
        return fast(images, level=level_NB).logits

    return _engine(chosen if job.options.get("selector") else given, threads)


# Dense engines


def _dense_network(job: Job, level: int | None = None) -> DenseNetwork:
    """A plain network of one level in every block; None: the top one, the dense opponent."""
    model = network(job.model)
    return dense(model, level=None if level is None else [level] * model.num_blocks, dtype=_dtype(job))


def eager(job: Job, threads: int) -> Run:
    """PyTorch as it comes: channels_last, norms folded into the convolutions."""
    net, x = _dense_network(job), _images(job)
    return _engine(lambda: net(x), threads)


def compiled(job: Job, threads: int) -> Run:
    """torch.compile with frozen weights; compiling takes its time when the engine is built."""
    torch.compiler.reset()
    net, x = torch.compile(_dense_network(job), options={"freezing": True}), _images(job)
    run = _engine(lambda: net(x), threads)
    run()
    return run


# The other ways to run a DEN


def slim(job: Job, threads: int) -> Run:
    """A static network of one level's widths, the option `level`: what it costs were it all that the network had."""
    net, x = _dense_network(job, job.options["level"]), _images(job)
    return _engine(lambda: net(x), threads)


def masked(job: Job, threads: int) -> Run:
    """What peers ship: every convolution in full, times a mask of the hidden channels; norms folded all the same."""
    net, x, level_NB = _dense_network(job), _images(job), _levels(job)
    blocks = network(job.model).estimator.blocks
    net.blocks = nn.ModuleList(
        MaskedBlock(block, level_NB[:, b], net.set_index, net.dtype) for b, block in enumerate(blocks)
    )
    return _engine(lambda: net(x), threads)


class MaskedBlock(nn.Module):
    """A residual block of any number of convolutions in its masked form, at one level a sample."""

    def __init__(self, block: Any, level_N: Tensor, set_index: int, dtype: torch.dtype):
        super().__init__()
        convs = [getattr(block, f"conv{i}", None) for i in (1, 2, 3)]
        norms = [getattr(block, f"norm{i}", None) for i in (1, 2, 3)]
        if convs[1] is None or norms[1] is None or getattr(block, "pools", None):
            raise Unusable(f"the masked form is written for residual blocks, not {type(block).__name__}")
        self.convs = [conv for conv in convs if conv is not None]
        self.level_N, self.dtype, self.out_channels, self.stride = level_N, dtype, block.out_channels, block.stride
        self.preactivation = getattr(block, "preactivation", False)
        device = level_N.device
        width_L1 = torch.tensor(block.widths, device=device)[:, None]
        self.masks_LC = [
            (torch.arange(conv.out_channels, device=device) < width_L1).to(dtype) for conv in self.convs[:-1]
        ]
        self.ran_N111 = (width_L1[level_N] > 0)[:, :, None, None]

        levels = block.hierarchy.num_levels
        rows = [[table[set_index] for table in tables(norm, levels)] for norm in norms if norm is not None]
        self.pre = [table[:1].to(dtype) for table in rows.pop(0)] if self.preactivation else None
        # A norm behind an inner convolution is the same at each level and folds; the last one's is not.
        self.folded = [
            self._folded(conv.weight, *(table[0] for table in row))
            for conv, row in zip(self.convs[:-1], rows, strict=False)
        ]
        self.last = _nhwc(self.convs[-1].weight.detach().to(dtype))
        self.post = None if self.preactivation else [table.to(dtype) for table in rows[-1]]
        projection = getattr(block, "projection", None)
        self.projection = None
        if projection is not None:
            row = [table[set_index, 0] for table in tables(projection.norm)]
            self.projection = self._folded(projection.conv.weight, *row)

    def _folded(self, weight: Tensor, scale_C: Tensor, shift_C: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = fold(weight, scale_C, shift_C)
        return _nhwc(weight.to(self.dtype)), bias.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, out_channels, H', W']."""
        h = x
        if self.pre is not None:
            scale, shift = (table[:, :, None, None] for table in self.pre)
            h = F.relu_(torch.addcmul(shift, x, scale))
        for conv, (weight, bias), mask_LC in zip(self.convs, self.folded, self.masks_LC, strict=False):
            h = F.conv2d(h, weight, bias, conv.stride, conv.padding, 1, conv.groups)
            h = F.relu_(h).mul_(mask_LC[self.level_N][:, :, None, None])
        h = F.conv2d(h, self.last, None, self.convs[-1].stride, self.convs[-1].padding)
        if self.projection is None:
            y = shortcut(x, self.stride, self.out_channels)
        else:
            y = F.conv2d(x, *self.projection, self.stride)
        if self.post is None:
            return h.add_(y)
        scale, shift = (table[self.level_N][:, :, None, None] for table in self.post)
        return torch.where(self.ran_N111, F.relu_(torch.addcmul(shift, h, scale).add_(y)), y)


def _nhwc(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def loop(job: Job, threads: int) -> Run:
    """An image at a time through weights that were sliced for each level beforehand."""
    nets = [_dense_network(job, level) for level in range(network(job.model).num_levels)]
    net, x, level_NB = nets[0], _images(job), _levels(job)
    paths = [nn.ModuleList(nets[l].blocks[b] for b, l in enumerate(path)) for path in level_NB.tolist()]

    def run() -> Tensor:
        logits = []
        for n, path in enumerate(paths):
            net.blocks = path
            logits.append(net(x[n : n + 1]))
        return torch.cat(logits)

    return _engine(run, threads)

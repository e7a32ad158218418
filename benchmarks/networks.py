"""The network under test and its opponents, all from one set of weights.

N samples, B blocks, L levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import den
import den_kernels as dk
from benchmarks.cases import RATIOS, TASK, ModelCase
from benchmarks.engines import InProcess
from den.blocks import PlainResidualBlock
from den.dense import DenseNetwork, PlainStem, dense

REFERENCE_SAMPLES = 4


@functools.cache
def network(name: str) -> den.DEN:
    """A model whose weights and norms are random: every folded number counts in the check."""
    torch.manual_seed(0)
    model = den.create_model(name, tasks=TASK, ratios=RATIOS)
    for module in model.modules():
        if isinstance(module, (dk.DENBatchNorm2d, nn.BatchNorm2d)):
            for positive in (module.weight, module.running_var):
                nn.init.uniform_(cast(Tensor, positive), 0.5, 1.5)
            for signed in (module.bias, module.running_mean):
                nn.init.normal_(cast(Tensor, signed), std=0.1)
    return model.eval().requires_grad_(False)


def images(case: ModelCase, batch: int) -> Tensor:
    """Random images [N, 3, H, W], channels_last, as every engine reads them best."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, case.image_size, case.image_size, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


@functools.cache
def _reference_network(name: str) -> den.DEN:
    model = network(name)
    exact = den.create_model(**model.config, backend="reference")
    exact.load_state_dict(model.state_dict())
    return exact.double().eval().requires_grad_(False)


def checked_rows(batch: int) -> Tensor:
    """The samples compared with the reference: all, or as many as it can do in time, evenly spread."""
    return torch.linspace(0, batch - 1, min(batch, REFERENCE_SAMPLES)).round().long().unique()


@torch.inference_mode()
def reference_logits(name: str, x: Tensor, level_NB: Tensor) -> Tensor:
    """Float64 logits of den_kernels' specification, a sample at a time over sliced weights."""
    return _reference_network(name)(x.double(), level=level_NB).logits


@functools.cache
def static_reference(case: ModelCase, batch: int, level: int) -> Tensor:
    """The same for the checked rows of a batch at one level in every block."""
    rows = checked_rows(batch)
    blocks = network(case.name).num_blocks
    return reference_logits(case.name, images(case, batch)[rows], torch.full((len(rows), blocks), level))


@functools.cache
def frozen(name: str, backend: str) -> den.FrozenDEN:
    """The product's inference form; every block of it is asserted to run on the backend that was asked for."""
    fast = den.freeze(network(name), backend=backend)
    ran = {block.backend for block in fast.blocks}
    assert ran == {backend}, f"asked for backend {backend!r}, but the blocks run on {ran}"
    return fast


@functools.cache
def dense_network(name: str, level: int | None = None) -> DenseNetwork:
    """A plain network of one level in every block; None: the top one, the dense opponent."""
    model = network(name)
    return dense(model, level=None if level is None else [level] * model.num_blocks)


# Engines


def den_engine(name: str, x: Tensor, level_NB: Tensor, backend: str) -> InProcess:
    """The frozen DEN at given levels."""
    fast = frozen(name, backend)
    return InProcess(f"den[{backend}]", lambda: fast(x, level=level_NB).logits)


def den_selector_engine(name: str, x: Tensor, level_NB: Tensor, backend: str) -> InProcess:
    """The same with the selector's work in front, whose choice is then set aside for the mix under test."""
    fast = frozen(name, backend)

    def run() -> Tensor:
        fast.selector(x).float().softmax(2).argmax(2)
        return fast(x, level=level_NB).logits

    return InProcess(f"den[{backend}]+selector", run)


def eager_engine(name: str, x: Tensor) -> InProcess:
    """PyTorch as it comes: channels_last, norms folded into the convolutions."""
    net = dense_network(name)
    return InProcess("torch eager", lambda: net(x), dense=True)


def compiled_engine(name: str, x: Tensor) -> InProcess:
    """torch.compile with frozen weights; compiling takes its time at the first call."""
    net = torch.compile(dense_network(name), options={"freezing": True})
    return InProcess("torch.compile", lambda: net(x), dense=True)


def slim_engine(name: str, x: Tensor, level: int) -> InProcess:
    """A static network of one level's widths: what a level would cost were it all that the network had."""
    net = dense_network(name, level)
    return InProcess(f"static slim {RATIOS[level]:g}", lambda: net(x))


def masked_engine(name: str, x: Tensor, level_NB: Tensor) -> InProcess:
    """What peers ship: every convolution in full, times a mask of the hidden channels."""
    net = dense_network(name)
    stem, blocks = _stem(net), [_preactivation(block) for block in net.blocks]
    widths = torch.tensor([block.widths for block in network(name).estimator.blocks])

    def run() -> Tensor:
        h = stem(x, 1)
        for b, (block, pre_scale, pre_shift) in enumerate(blocks):
            width_N = widths[b][level_NB[:, b]]
            mask = (torch.arange(block.conv1.out_channels) < width_N[:, None])[:, :, None, None].to(h.dtype)
            a = F.relu(torch.addcmul(pre_shift, h, pre_scale), inplace=True)
            a = F.relu(block.conv1(a), inplace=True).mul_(mask)
            h = block.conv2(a).add_(block.shortcut(h))
        return net.head(net.tail(h, 0))

    return InProcess("masked dense", run)


def _stem(net: DenseNetwork) -> PlainStem:
    if net.stem is None:
        raise TypeError("this opponent is written for networks with a stem")
    return net.stem


def _preactivation(block: nn.Module) -> tuple[PlainResidualBlock, Tensor, Tensor]:
    """A block with its first norm's scale and shift; in such a block every other norm folds whatever the level."""
    if not isinstance(block, PlainResidualBlock) or block.pre_scale is None or block.pre_shift is None:
        raise TypeError(f"the masked form is written for pre-activation residual blocks, not {type(block).__name__}")
    return block, block.pre_scale, block.pre_shift


def loop_engine(name: str, x: Tensor, level_NB: Tensor) -> InProcess:
    """An image at a time through weights that were sliced for each level beforehand."""
    nets = [dense_network(name, level) for level in range(len(RATIOS))]
    stem, tail, head = _stem(nets[0]), nets[0].tail, nets[0].head
    paths = level_NB.tolist()
    singles = [x[n : n + 1] for n in range(len(paths))]

    def run() -> Tensor:
        logits = []
        for single, path in zip(singles, paths, strict=True):
            h = stem(single, 1)
            for b, level in enumerate(path):
                h = nets[level].blocks[b](h)
            logits.append(head(tail(h, 0)))
        return torch.cat(logits)

    return InProcess("batch-1 loop", run)


# The dense opponents, by the name that --engines takes. A process-backed engine (see `Engine`) joins here.
DENSE: dict[str, Callable[[str, Tensor], InProcess]] = {"eager": eager_engine, "compile": compiled_engine}

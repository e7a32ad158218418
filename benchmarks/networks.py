"""The network under test and its reference, from one set of random weights that every process makes alike.

N samples, B blocks.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import den
import den_kernels as dk
from benchmarks.cases import RATIOS, RATIOS_OF, TASK, ModelCase

REFERENCE_SAMPLES = 4
# Made for an interpreter to run, with a selector to match.
SMALLEST = "wrn_8_1"
SMALLEST_SELECTOR = {"widths": (4,), "blocks_per_stage": 1, "pool": 2}


@functools.cache
def network(name: str) -> den.DEN:
    """A model whose weights and norms are random: every folded number counts in the check."""
    torch.manual_seed(0)
    selector = SMALLEST_SELECTOR if name == SMALLEST else "paper"
    model = den.create_model(name, tasks=TASK, ratios=RATIOS_OF.get(name, RATIOS), selector=selector)
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


def write_onnx(net: nn.Module, x: Tensor, path: Path) -> None:
    """A plain network as ONNX, from `images` [N, 3, H, W] to `logits`, with N free."""
    with warnings.catch_warnings():
        # The exporter by tracing needs no package; the network's Python decides by shapes alone, which are fixed.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (x,),
            str(path),
            dynamo=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "N"}, "logits": {0: "N"}},
        )

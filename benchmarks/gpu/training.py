"""A training step (forward, backward, SGD) of the DEN at given levels against the dense network, both under autocast.

Timed as PyTorch runs it, and as one CUDA graph where that can be: a step that waits for the GPU cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import den
from benchmarks import networks, training
from benchmarks.cases import FULL, MIXES
from benchmarks.gpu.context import Context, OnDevice, take_turns
from benchmarks.test_training import TOLERANCE

STEP_S = 12.0
ELASTIC, PLAIN = "den[triton]", "dense eager"


def run(context: Context) -> bool:
    """A finding for each batch and mix. Whether nothing is left."""
    torch.backends.cudnn.benchmark = True
    for batch in (2,) if context.dry else (256, 64):
        for mix in ("top1-of-4",) if context.dry else ("uniform", "paper", "full"):
            key = f"{context.models[0].name}, batch {batch}, {mix}"
            if key in context.results.stage("training"):
                continue
            if context.out_of_time(STEP_S):
                return False
            context.results.put("training", key, measure(context, batch, mix))
    return True


def measure(context: Context, batch: int, mix: str) -> dict[str, Any]:
    """Times of a step, with levels given; {"wrong": ...} where gradients are not those of the per-level loops."""
    case = context.models[0]
    net = networks.network(case.name)
    level_NB = MIXES[mix].levels(batch, net.num_blocks, case.ratios)
    wrong = _worst_gradient(context, min(batch, 8))
    if wrong:
        return {"wrong": wrong}
    x = networks.images(case, batch).to(context.device)
    steps = {
        ELASTIC: training.elastic_step(case.name, x, level_NB.to(context.device), "triton"),
        PLAIN: training.dense_step(case.name, x, "triton"),
    }
    for step in steps.values():
        _under_autocast(step, context)
    cost = den.flops(net, level_NB, case.image_size).double().sum()
    full = den.flops(net, FULL.levels(batch, net.num_blocks, case.ratios), case.image_size).double().sum()
    found: dict[str, Any] = {"flop_ratio": (full / cost).item()}
    for kind, graph in (("as it runs", False), ("in a CUDA graph", True)):
        if graph and context.dry:
            continue
        try:
            engines = [OnDevice(name, step, context, graph=graph) for name, step in steps.items()]
        except RuntimeError as error:
            found[kind] = {"left_out": str(error)[:500]}
            continue
        times = take_turns(engines, context, cold=False)
        found[kind] = {
            "ms": times[ELASTIC].ms,
            "dense_ms": times[PLAIN].ms,
            "speedup": times[PLAIN].ms / times[ELASTIC].ms,
        }
    return found


def _under_autocast(step: training.Step, context: Context) -> None:
    """Forward in the half precision of the run; a cache of cast weights would outlive a capture."""
    forward = step.forward

    def cast() -> Tensor:
        with torch.autocast(context.device.type, context.dtype, enabled=not context.dry, cache_enabled=False):
            return forward()

    step.forward = cast


def _worst_gradient(context: Context, batch: int) -> str | None:
    """The first parameter whose gradient in float32 is off, in words; None when none is."""
    case = context.models[0]
    x = networks.images(case, batch).to(context.device)
    mix = MIXES["top1-of-4" if context.dry else "uniform"]  # cheap, where an interpreter takes seconds for a step
    level_NB = mix.levels(batch, networks.network(case.name).num_blocks).to(context.device)
    ours, theirs = (training.elastic_step(case.name, x, level_NB, backend) for backend in ("triton", "grouped"))
    names = [name for name, _ in ours.network.named_parameters()]
    for name, got, wanted in zip(names, ours.gradients(), theirs.gradients(), strict=True):
        if not wanted.any():
            if got.any():
                return f"gradient of {name}, which no sample ran, is not exactly 0"
            continue
        error = ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
        if not error <= TOLERANCE:
            return f"gradient of {name} off by {error:.1e}, allowed {TOLERANCE:.0e}"
    return None

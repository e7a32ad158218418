"""A training step (forward, backward, SGD) of the DEN at given levels against the dense network, both under autocast.

Timed as PyTorch runs it, and as one CUDA graph where that can be: a step that waits for the GPU cannot.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import den
from benchmarks import networks, training
from benchmarks.cases import FULL, MIXES, ModelCase
from benchmarks.gpu.context import Context, OnDevice, compile_kernels, exact_convolutions, take_turns
from benchmarks.test_training import TOLERANCE

STEP_S = 12.0
ELASTIC, PLAIN = "den[triton]", "dense eager"


def run(context: Context) -> bool:
    """A finding for each batch and mix. Whether nothing is left."""
    torch.backends.cudnn.benchmark = True
    cases = {
        f"{context.models[0].name}, batch {batch}, {mix}": functools.partial(measure, context, batch, mix)
        for batch in ((2,) if context.dry else (256, 64))
        for mix in (("top1-of-4",) if context.dry else ("uniform", "paper", "full"))
    }
    return context.each("training", cases, lambda key: STEP_S)


def measure(context: Context, batch: int, mix: str) -> dict[str, Any]:
    """Times of a step, with levels given; {"wrong": ...} where gradients are not those of the per-level loops."""
    case = context.models[0]
    net = networks.network(case.name)
    level_NB = MIXES[mix].levels(batch, net.num_blocks, case.ratios)
    # Cheap in a dry run, where an interpreter takes seconds for a step.
    wrong = _worst_gradient(case, 2 if context.dry else 8, "top1-of-4" if context.dry else "uniform", context.device)
    if wrong:
        return {"wrong": wrong}
    x, level = networks.images(case, batch).to(context.device), level_NB.to(context.device)

    def elastic() -> training.Step:
        return _under_autocast(training.elastic_step(case.name, x, level, "triton"), context)

    compile_kernels(elastic().gradients)
    steps = {ELASTIC: elastic(), PLAIN: _under_autocast(training.dense_step(case.name, x, "triton"), context)}
    cost = den.flops(net, level_NB, case.image_size).double().sum()
    full = den.flops(net, FULL.levels(batch, net.num_blocks, case.ratios), case.image_size).double().sum()
    found: dict[str, Any] = {"flop_ratio": (full / cost).item()}
    for kind, graph in (("as it runs", False), ("in a CUDA graph", True)):
        if graph and context.dry:
            continue
        try:
            engines = [OnDevice(name, step, context, graph=graph) for name, step in steps.items()]
        except RuntimeError as error:
            context.synchronize()
            found[kind] = {"left_out": str(error)[:500]}
            continue
        times = take_turns(engines, context, cold=False)
        found[kind] = {
            "ms": times[ELASTIC].ms,
            "dense_ms": times[PLAIN].ms,
            "speedup": times[PLAIN].ms / times[ELASTIC].ms,
        }
    return found


def _under_autocast(step: training.Step, context: Context) -> training.Step:
    """The same step, its forward in the half precision of the run; a cache of cast weights would outlive a capture."""
    forward = step.forward

    def cast() -> Tensor:
        with torch.autocast(context.device.type, context.dtype, enabled=not context.dry, cache_enabled=False):
            return forward()

    step.forward = cast
    return step


@functools.cache
def _worst_gradient(case: ModelCase, batch: int, mix: str, device: torch.device) -> str | None:
    """The first parameter whose gradient in float32 is off, in words; None when none is."""
    x = networks.images(case, batch).to(device)
    level_NB = MIXES[mix].levels(batch, networks.network(case.name).num_blocks).to(device)
    compile_kernels(training.elastic_step(case.name, x, level_NB, "triton").gradients)
    ours, theirs = (training.elastic_step(case.name, x, level_NB, backend) for backend in ("triton", "grouped"))
    names = [name for name, _ in ours.network.named_parameters()]
    with exact_convolutions():
        gradients = ours.gradients(), theirs.gradients()
    for name, got, wanted in zip(names, *gradients, strict=True):
        if not wanted.any():
            if got.any():
                return f"gradient of {name}, which no sample ran, is not exactly 0"
            continue
        error = ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
        if not error <= TOLERANCE:
            return f"gradient of {name} off by {error:.1e}, allowed {TOLERANCE:.0e}"
    return None

"""Where the time of a block goes: each launch of the fused block by itself, and the block against cuDNN's.

TFLOP/s count the work of the levels; GB/s the least traffic of a block: its input, hidden maps and output once each
way, and its weights. A launch that is far from both ceilings is where to look next.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import den_kernels as dk
from benchmarks import test_block as blocks
from benchmarks.cases import MIXES, RATIOS, TOLERANCE, BlockCase
from benchmarks.gpu.context import Context, OnDevice, compile_kernels, take_turns

if TYPE_CHECKING:
    from den_kernels.backends.triton.launch import Launch

MIX_NAMES = ("full", "level2", "uniform")
CASE_S = 3.0
REPEATS = 20  # of a launch in one capture, so that the replay's own time does not show


def run(context: Context) -> bool:
    """A finding for each block shape, batch and mix. Whether nothing is left."""
    cases = {
        f"{case.name}, batch {batch}, {mix}": functools.partial(measure, case, batch, mix, context)
        for batch in ((2,) if context.dry else (256, 64, 8))
        for case in context.blocks
        for mix in (MIX_NAMES[:1] if context.dry else MIX_NAMES)
    }
    return context.each("layers", cases, lambda key: CASE_S)


def measure(case: BlockCase, batch: int, mix: str, context: Context) -> dict[str, Any]:
    """Times of the block, of its launches, and of the dense block, with the rates that they come to."""
    from den_kernels.backends.triton import launch

    device, dtype = context.device, context.dtype
    w = blocks.Weights(case)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, case.channels[0], case.size, case.size, generator=generator)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    level = MIXES[mix].levels(batch, 1)
    own = _block(case, w, dtype, device)
    x_device, level_device = x.to(device), level.to(device)
    compile_kernels(lambda: own(x_device, *dk.plan_levels(level_device, len(RATIOS)).block(0)))
    plan = dk.plan_levels(level_device, len(RATIOS)).block(0)

    def call() -> Tensor:
        return own(x_device, *plan)

    planned = _planned(own, x_device, plan, call())

    def run_planned() -> None:
        for one in planned:
            launch.run(one, device)

    compile_kernels(run_planned)

    some = slice(0, None, max(1, batch // 4))
    # The reference has the weights that the kernels have, rounded to their dtype.
    w.weight = [weight.to(dtype).float() for weight in w.weight]
    wanted = blocks.reference(case, w, x[some], level[some, 0])
    found = call()[some].double().cpu()
    error = float(((found - wanted).abs().max() / wanted.abs().max()).nan_to_num(float("inf")))
    if error > TOLERANCE[dtype]:
        return {"wrong": error}
    engines = [OnDevice("den", call, context), OnDevice("dense", _dense(case, w, x_device), context, dense=True)]
    times = take_turns(engines, context, cold=False)
    macs = torch.tensor(case.macs(), dtype=torch.float64)
    flops = 2 * macs[level[:, 0]].sum().item()
    ms = times["den"].ms
    return {
        "ms": ms,
        "dense_ms": times["dense"].ms,
        "flop_ratio": (macs[-1] * batch / macs[level[:, 0]].sum()).item() if flops else None,
        "tflops": flops / ms * 1e-9,
        "dense_tflops": 2 * macs[-1].item() * batch / times["dense"].ms * 1e-9,
        "gbps": _traffic(case, level[:, 0], dtype) / ms * 1e-6,
        "error": error,
        "launches": _launches(planned, context),
    }


def _block(case: BlockCase, w: blocks.Weights, dtype: torch.dtype, device: torch.device) -> dk.FusedResidualBlock:
    pre = [None if t is None else t[None].to(device) for t in (w.pre_scale, w.pre_shift)]
    return dk.FusedResidualBlock(
        [weight.to(device, dtype) for weight in w.weight],
        [scale[None].to(device) for scale in w.scale],
        [shift[None].to(device) for shift in w.shift],
        case.widths,
        strides=case.strides,
        groups=case.groups,
        pre_scale=pre[0],
        pre_shift=pre[1],
        relu=not case.preactivation,
        backend="triton",
    )


def _dense(case: BlockCase, w: blocks.Weights, x: Tensor) -> Callable[[], Tensor]:
    """The top level in plain PyTorch, norms folded, on x's device and in its dtype."""
    moved = blocks.Weights(case)
    for name in ("weight", "scale", "shift"):
        setattr(moved, name, [t.to(x.device, x.dtype) for t in getattr(w, name)])
    for name in ("pre_scale", "pre_shift"):
        table = getattr(w, name)
        setattr(moved, name, None if table is None else table.to(x.device, x.dtype))
    return blocks.dense_engine(case, moved, x, "wall").run


def _traffic(case: BlockCase, level: Tensor, dtype: torch.dtype) -> float:
    """Least bytes of the block at these levels."""
    inside, _, outside = case.channels
    width = torch.tensor(case.widths, dtype=torch.float64)[level]
    ran, size, elements = (width > 0).double(), case.size, 0.0
    pixels = size * size
    elements += ran.sum().item() * inside * pixels
    for stride in case.strides[:-1]:
        pixels = (-(-size // stride)) ** 2
        size = -(-size // stride)
        elements += 2 * width.sum().item() * pixels
    size = -(-size // case.strides[-1])
    # The output is written, and read before as the shortcut.
    elements += 2 * ran.sum().item() * outside * size * size
    elements += sum(math.prod(shape) for shape in case.weight_shapes)
    return elements * dtype.itemsize


def _planned(block: dk.FusedResidualBlock, x: Tensor, plan: tuple[Tensor, Tensor, Tensor], out: Tensor) -> list[Launch]:
    """The launches of a block; of a pre-activation block as between two of its kind: what it reads is activated, and it
    activates what it writes."""
    from den_kernels.backends.triton.block import plan_block
    from den_kernels.backends.triton.chain import Readers

    arguments = block.arguments(0, block.batch_class(x.shape))
    scale, shift = arguments.pre_scale, arguments.pre_shift
    if scale is None or shift is None or x.shape != out.shape:
        return plan_block(x, out, *plan, arguments, in_place=False)
    rows = plan[0], arguments.widths, torch.stack([scale, shift])
    readers = Readers(torch.empty_like(out), *rows, blocks=1, levels=arguments.levels, fresh=False)
    return plan_block(x, out, *plan, arguments, in_place=False, activated=x, readers=readers)


def _launches(planned: Sequence[Launch], context: Context) -> list[dict[str, Any]]:
    """Each launch of a block by itself: kernel, tile, grid and median time. They come in the order of a call, so that
    each has what the one before it left."""
    from den_kernels.backends.triton import launch

    found = []
    for one in planned:
        repeats = 1 if context.dry else REPEATS

        def again(one=one, repeats=repeats) -> Tensor:
            for _ in range(repeats):
                launch.run(one, context.device)
            return next(t for t in one.arguments.values() if isinstance(t, Tensor))

        engine = OnDevice("launch", again, context)
        times = sorted(engine.seconds(cold=False, rep_ms=20))
        found.append(
            {
                "kernel": getattr(one.kernel, "__name__", str(one.kernel)),
                "tile": list(one.tile),
                "programs": one.programs,
                "ms": 1e3 * times[len(times) // 2] / repeats,
            }
        )
    return found

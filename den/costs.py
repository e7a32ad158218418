"""What a path costs in S(z) of equation 5: parameters (the paper), FLOPs, or milliseconds measured on this machine.

A table [B, L] is used through `losses.path_cost`, the mean over blocks; its last column has mean 1, so that the full
path costs 1 in every unit. With parameters each block counts alike (equation 5); with FLOPs and time, by its own share.

B blocks, L levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import den_kernels as dk
from den.flops import block_macs, cost_ratios
from den.freeze import freeze
from den.model import DEN
from den.tasks import Task
from den.timing import hardware, interleaved
from den.trunk import Trunk


def cost_table(model: DEN, unit: str, image_size: tuple[int, int], ms_BL: Tensor | None = None) -> Tensor:
    """Cost of each block at each level, float32 [B, L]; see the head of this file.

    unit: "parameters", "flops" or "latency"; the last takes ms_BL, of `measure_blocks`.
    """
    if unit == "parameters":
        return cost_ratios(model)
    if unit == "flops":
        amount_BL = block_macs(model, image_size).double()
    elif unit == "latency" and ms_BL is not None:
        amount_BL = ms_BL.double()
    else:
        raise ValueError(f"unit is {unit!r}; it must be 'parameters', 'flops', or 'latency' with measured times")
    return (amount_BL / amount_BL[:, -1].mean()).float()


@torch.inference_mode()
def measure_blocks(
    model: DEN, image_size: tuple[int, int], *, batch: int = 32, seconds: float = 0.2, seed: int = 0
) -> Tensor:
    """Milliseconds that an image takes in each block at each level, the frozen block alone: float64 [B, L].

    A block reads what the full path brings it, of random images. Times are made to ascend with the level: that a dearer
    one was measured faster is noise.

    batch: images at once. seconds: about how long each block takes.
    """
    frozen = freeze(model)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, model.estimator.in_channels, *image_size), generator=generator)
    h = x.to(frozen.device, frozen.dtype).contiguous(memory_format=torch.channels_last)
    stride, _, _ = model.estimator.entry(*image_size)
    if frozen.stem is not None:
        h, stride = Trunk(frozen.stem, [])(h, None, 0, stride), 1
    wait = torch.cuda.synchronize if h.device.type == "cuda" else None
    rows = []
    for block in frozen.blocks:
        runs = {str(level): _at_level(block, model.num_levels, level, h, stride) for level in range(model.num_levels)}
        times = interleaved(runs, [h], seconds=seconds, synchronize=wait)
        row = torch.tensor([1000 * times[str(level)][0] / batch for level in range(model.num_levels)])
        rows.append(row.double().cummax(0).values)
        h = runs[str(model.num_levels - 1)](h)
        stride = 1
    return torch.stack(rows)


def _at_level(block: nn.Module, num_levels: int, level: int, h: Tensor, stride: int):
    """A frozen block by itself, on maps like h, all at one level."""
    plan = dk.plan_levels(torch.full((h.shape[0], 1), level, device=h.device), num_levels)
    trunk = Trunk(None, [block])
    return lambda x: trunk(x, plan, 0, stride)


def measure(model: DEN, tasks: list[Task]) -> dict[str, Any]:
    """`measure_blocks` for each task's images, with the machine, as JSON holds it."""
    ms = {task.name: measure_blocks(model, task.image_size).tolist() for task in tasks}
    return {"unit": "milliseconds an image, block by level", "hardware": hardware(model.estimator.device), "ms": ms}

"""The ceilings of the device: matrix products, copies through memory, copies inside L2."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch

from benchmarks.gpu.context import Context, OnDevice

COPIES = 20  # in one capture, so that launches do not show


def run(context: Context) -> bool:
    """TFLOP/s of products and GB/s of copies (read and written bytes)."""
    size = 64 if context.dry else 8192
    for dtype in dict.fromkeys((context.dtype, torch.float32)):
        key = f"matmul {size} {str(dtype).removeprefix('torch.')} TFLOP/s"
        a, b = (torch.randn(size, size, device=context.device, dtype=dtype) for _ in range(2))
        _keep(context, key, functools.partial(torch.matmul, a, b), 2 * size**3 * 1e-12)
    for name, mib in (("memory", 0.25 if context.dry else 1024), ("L2", 0.25 if context.dry else 8)):
        elements = int(mib * 2**20 / 4)
        source, target = (torch.ones(elements, device=context.device) for _ in range(2))

        def copies(source=source, target=target):
            for _ in range(COPIES):
                target.copy_(source)
            return target

        _keep(context, f"copy in {name}, {mib:g} MiB, GB/s", copies, COPIES * 8 * elements * 1e-9)
    return True


def _keep(context: Context, key: str, work: Callable[[], torch.Tensor], amount: float) -> None:
    if key not in context.results.stage("ceilings"):
        engine = OnDevice(key, work, context)
        context.results.put("ceilings", key, amount / statistics.median(engine.seconds(cold=False, rep_ms=100)))

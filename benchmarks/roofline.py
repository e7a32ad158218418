"""How near the CPU convolution comes to what one core can do: `python -m benchmarks.roofline [part of a name ...]`.

For each shape, the time that its multiply-adds take at the arithmetic peak and the time that its bytes take at the
memory's speed (x, weights and output once each, the output also read before it is written); the larger is the floor.
The share is floor over measured time; products with the zeros of the padding count as work, and an engine that skips
them may pass 1. All widths full, weights packed in each call; one thread, CPU time, best of many.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks import machine
from den_kernels.backends import cpu


class Shape(NamedTuple):
    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    batch: int = 8

    def __str__(self) -> str:
        of_groups = f", {self.groups} groups" if self.groups > 1 else ""
        stride = f" / {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel} {self.channels} -> {self.outputs} @ {self.size}{stride}{of_groups}"


SHAPES = (
    # ResNet-50
    Shape(256, 64, 56, 1, batch=4),
    Shape(64, 256, 56, 1, batch=4),
    Shape(256, 512, 56, 1, 2, batch=4),
    Shape(1024, 256, 14, 1),
    Shape(256, 1024, 14, 1),
    Shape(1024, 2048, 14, 1, 2),
    Shape(2048, 512, 7, 1),
    Shape(512, 2048, 7, 1),
    Shape(64, 64, 56, 3, batch=4),
    Shape(128, 128, 28, 3),
    Shape(256, 256, 14, 3),
    Shape(512, 512, 7, 3),
    Shape(3, 64, 224, 7, 2, batch=2),
    # CIFAR networks
    Shape(3, 32, 32, 3),
    Shape(16, 16, 32, 3),
    Shape(32, 32, 32, 3),
    Shape(64, 64, 8, 3),
    Shape(64, 128, 32, 3, 2),
    Shape(128, 256, 16, 3, 2),
    # ResNeXt
    Shape(256, 256, 32, 3, groups=4),
    Shape(128, 128, 14, 3, groups=32),
)


def fastest(run: Callable[[], object], repeats: int = 30) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        run()
        best = min(best, time.thread_time() - start)
    return best


def row(shape: Shape, dtype: torch.dtype, flops_a_second: float, bytes_a_second: float) -> str:
    """One line of the table. Raises RuntimeError when the result is not oneDNN's."""
    channels, outputs, size, kernel, stride, groups, batch = shape
    x = torch.randn(batch, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels // groups, kernel, kernel) / (channels // groups * kernel**2) ** 0.5
    weight, padding = weight.to(dtype), kernel // 2
    weight_CL = weight.contiguous(memory_format=torch.channels_last)
    geometry = ((stride, stride), (padding, padding), (1, 1), groups)
    y = cpu.conv2d(x, weight, None, None, None, *geometry)
    expected = F.conv2d(x, weight_CL, None, *geometry)
    if (y - expected).abs().max() > (2e-2 if dtype == torch.bfloat16 else 1e-4) * expected.abs().max():
        raise RuntimeError(f"{shape} in {dtype}: the results differ by more than rounding")
    flops = 2.0 * y.numel() * weight[0].numel()
    traffic = float(x.element_size() * (x.numel() + weight.numel() + 2 * y.numel()))
    floor = max(flops / flops_a_second, traffic / bytes_a_second)
    ours = fastest(lambda: cpu.conv2d(x, weight, None, None, None, *geometry))
    onednn = fastest(lambda: F.conv2d(x, weight_CL, None, *geometry))
    return (
        f"| {shape}, batch {batch} | {str(dtype)[6:]} | {flops * 1e-9:.2f} | {traffic * 1e-6:.1f} "
        f"| {flops / flops_a_second * 1e3:.2f} | {traffic / bytes_a_second * 1e3:.2f} | {ours * 1e3:.2f} "
        f"| {floor / ours:.2f} | {floor / onednn:.2f} |"
    )


def main() -> None:
    torch.set_num_threads(1)
    rates = machine.measure()
    peaks = {
        dtype: max(rate for name, rate in rates.items() if name.startswith(kind)) * 1e9
        for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
        if any(name.startswith(kind) for name in rates)
    }
    print(", ".join(f"{name} {rate}" for name, rate in rates.items()))
    print("| shape | dtype | GFLOP | MB | arithmetic, ms | memory, ms | measured, ms | share | oneDNN's |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for dtype, peak in peaks.items():
            if all(part in str(shape) for part in sys.argv[1:]):
                print(row(shape, dtype, peak, rates["read 256 MiB GB/s"] * 1e9), flush=True)


if __name__ == "__main__":
    main()

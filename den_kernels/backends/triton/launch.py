"""Launches as values: what runs on a device is, argument for argument, what the offline compile checks.

A planner returns `Launch` objects from tensors on any device (also "meta"); `run` enqueues one, and
`offline.compile_launch` compiles one for a GPU that is not there.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch

from den_kernels.backends.triton.configs import TileConfig

# What tiles are chosen for where there is no GPU to ask: an A100 in an offline compile ("meta" tensors), one processor
# in the interpreter, where each program costs milliseconds.
_ASSUMED_MULTIPROCESSORS = {"meta": 108, "cpu": 1}
_INT32_MAX = 2**31 - 1


class Sweep(NamedTuple):
    """The tile of a kernel without a matrix product: rows (pixels, samples) by channels, or rows alone."""

    block_rows: int
    block_channels: int | None
    num_warps: int
    num_stages: int = 2

    @property
    def blocks(self) -> dict[str, int]:
        rows = {"BLOCK_ROWS": self.block_rows}
        return rows if self.block_channels is None else rows | {"BLOCK_CHANNELS": self.block_channels}


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: TileConfig | Sweep

    @property
    def blocks(self) -> dict[str, int]:
        return self.tile.blocks

    @property
    def options(self) -> dict[str, Any]:
        # Fusion is named because its default differs between versions of Triton, and with it the last bit.
        return {
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            "enable_fp_fusion": True,
        }


def run(launch: Launch, device: torch.device) -> None:
    """Enqueue on ``device``'s current stream; never waits for it."""
    if launch.programs > _INT32_MAX:
        raise RuntimeError(
            f"the triton backend would need {launch.programs} programs, more than the {_INT32_MAX} of a CUDA grid: "
            "split the batch"
        )
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        launch.kernel[(launch.programs,)](**launch.arguments, **launch.constants, **launch.blocks, **launch.options)


@functools.cache
def _cuda_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _ASSUMED_MULTIPROCESSORS[device.type]
    return _cuda_multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user allowed less with ``torch.set_float32_matmul_precision``."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def check_indexable(weight_OHWI: torch.Tensor, *maps: torch.Tensor) -> None:
    """Offsets inside one sample, and inside a weight, are 32-bit in the kernels (offsets of samples are 64-bit)."""
    for tensor, elements in [(weight_OHWI, weight_OHWI.numel())] + [(m, m[:1].numel()) for m in maps]:
        if elements > _INT32_MAX:
            raise RuntimeError(
                f"the triton backend indexes a sample or a weight with 32 bits, which {elements} elements exceed "
                f"(shape {tuple(tensor.shape)}): use backend='grouped'"
            )

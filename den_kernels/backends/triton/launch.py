"""Launches as values: what runs on a device is, argument for argument, what the offline compile checks.

A planner returns `Launch` objects from tensors on any device (also "meta"); `run` enqueues one, and
`offline.compile_launch` compiles one for a GPU that is not there.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    if _collected is not None and not _interpreted(launch.kernel):
        _collected.append((_without_tensors(launch), device))
        return
    with _on(device):
        launch.kernel[(launch.programs,)](**_keywords(launch))


def _keywords(launch: Launch) -> dict[str, Any]:
    return {**launch.arguments, **launch.constants, **launch.blocks, **launch.options}


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# Not a context variable: autograd runs the backward of CUDA tensors in a thread of its own, which inherits none.
_collected: list[tuple[Launch, torch.device]] | None = None


@contextlib.contextmanager
def compiling(workers: int) -> Iterator[None]:
    """Within, launches do not run, and what they leave in their outputs is garbage: for a throw-away pass.

    On leaving, their kernels are compiled by ``workers`` threads, as the same launches will need them. One at a time,
    not to be nested; after an exception nothing is compiled. In the interpreter launches run as ever.
    """
    global _collected
    if _collected is not None:
        raise RuntimeError("launch.compiling is already active: leave it before it is entered again")
    collected: list[tuple[Launch, torch.device]] = []
    _collected = collected
    try:
        yield
    finally:
        _collected = None
    with ThreadPoolExecutor(workers) as pool, _async_compile(pool):
        for launch, device in collected:
            with _on(device):
                launch.kernel.warmup(grid=(launch.programs,), **_keywords(launch))


def _async_compile(pool: ThreadPoolExecutor) -> contextlib.AbstractContextManager:
    """Within, Triton compiles on the pool; where it cannot, one kernel after the other."""
    import triton

    mode = getattr(triton, "AsyncCompileMode", None)
    return contextlib.nullcontext() if mode is None else mode(pool)


@functools.cache
def _interpreted(kernel: Any) -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel, InterpretedFunction)


class _Pointer:
    """What a compile needs to know of a tensor, without its memory."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype, self._offset = tensor.dtype, tensor.data_ptr() % 16

    def data_ptr(self) -> int:
        return self._offset


def _without_tensors(launch: Launch) -> Launch:
    kept = {name: _Pointer(a) if isinstance(a, torch.Tensor) else a for name, a in launch.arguments.items()}
    return launch._replace(arguments=kept)


@functools.cache
def _cuda_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _ASSUMED_MULTIPROCESSORS[device.type]
    return _cuda_multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user allowed TF32, by the old setting of torch or the new one."""
    return "tf32" if dtype == torch.float32 and _tf32_allowed() else "ieee"


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # the old setting shows here too, and raises once the new one was used
        return matmul.fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def check_indexable(weight_OHWI: torch.Tensor, *maps: torch.Tensor) -> None:
    """Offsets inside one sample, and inside a weight, are 32-bit in the kernels (offsets of samples are 64-bit)."""
    for tensor, elements in [(weight_OHWI, weight_OHWI.numel())] + [(m, math.prod(m.shape[1:])) for m in maps]:
        if elements > _INT32_MAX:
            raise RuntimeError(
                f"the triton backend indexes a sample or a weight with 32 bits, which {elements} elements exceed "
                f"(shape {tuple(tensor.shape)}): use backend='grouped'"
            )

"""Chains of fused layers on the native kernels: a whole network in one call.

Symbols: N samples, C channels, H W space, B blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from den_kernels.backends.cpu.native import DTYPES, address, extension
from den_kernels.block import BlockArguments
from den_kernels.chain import empty_output, flatten, read_spec


def residual_block(x: Tensor, out: Tensor, level: Tensor, order: Tensor, count: Tensor, *block) -> None:
    """One residual block for inference, written to `out`, which may be `x` itself when the shapes agree.

    level, order [N]: int32, contiguous. For the rest see `residual_chain`.
    """
    arguments = BlockArguments(*block)
    check_plan(level, order, x.shape[0])
    if arguments.levels == 1 and level.any():
        raise ValueError(f"level is {level.tolist()}; the block has one level, which is 0")
    residual_chain(x, out, level, order, count, *flatten([arguments]))


def residual_chain(
    x: Tensor,
    out: Tensor,
    level: Tensor | None,
    order: Tensor | None,
    count: Tensor | None,
    tensors: Sequence[Tensor],
    spec: str,
) -> None:
    """A chain of layers in one call; the maps between them are scratch memory of the extension.

    x, out: float32 or bfloat16; out may be x when there is one block and the shapes agree. level, order: int32 [B, N]
    (or [N] for one block), contiguous, of the layers that have more than one level; None where none has. Without an
    order, level is int64 [N, B], contiguous, and the extension makes the plan. tensors, spec:
    from `den_kernels.chain.flatten`, with weights from `pack_weight`, scales and shifts float32, contiguous. Raises
    ValueError for a level, an order or widths out of range, or packed weights of another shape.
    """
    N, C, H, W = x.shape
    chain = _native(DTYPES[x.dtype], tuple(t.data_ptr() for t in tensors), spec)
    if level is not None and order is None:
        _check_levels(level, (N, chain.choices))
    else:
        check_plan(level, order, N, chain.choices)
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    in_layout = out.dim() == 2 or out.is_contiguous(memory_format=torch.channels_last)
    written = out if in_layout else torch.empty_like(out, memory_format=torch.channels_last)
    chain.run(x.data_ptr(), written.data_ptr(), address(level), address(order), (N, C, H, W), torch.get_num_threads())
    if not in_layout:
        out.copy_(written)


class BoundChain:
    """`residual_chain` for batches of one shape and dtype, on tensors that stay: what each call would look up, kept.

    A network's weights push most of Python out of the caches, so that all that is looked up beside them is read from
    memory.

    Args:
        shape, dtype: of x.
        tensors, spec: as in `residual_chain`.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, tensors: Sequence[Tensor], spec: str) -> None:
        self._sizes, self._dtype, self._tensors, self._spec = tuple(shape), dtype, tensors, spec
        self._empty_output = empty_output(shape, dtype, torch.device("cpu"), spec)
        self._bind()

    def _bind(self) -> None:
        self._chain = _native(DTYPES[self._dtype], tuple(t.data_ptr() for t in self._tensors), self._spec)
        self._levels = self._sizes[0], self._chain.choices
        # Weights belong to layers, whose memory can be moved (into shared memory, say): all of a storage at once.
        # A layer that gets other tensors reports that.
        one_of_each = {t.untyped_storage().data_ptr(): t for t in self._tensors[2:]}
        self._places = [(t, t.data_ptr()) for t in one_of_each.values()]

    def __call__(self, x: Tensor, level: Tensor | None) -> Tensor:
        """x of the shape and dtype, level int64 [N, B] or None -> the chain's result. Raises ValueError as
        `residual_chain` does."""
        for tensor, place in self._places:
            if tensor.data_ptr() != place:
                self._bind()
                break
        if level is not None or self._levels[1]:
            _check_levels(level, self._levels)
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        out = self._empty_output()
        self._chain.run(x.data_ptr(), out.data_ptr(), address(level), 0, self._sizes, torch.get_num_threads())
        return out


def bind_chain(x: Tensor, tensors: Sequence[Tensor], spec: str) -> BoundChain | None:
    """The chain for batches like x; None where it has to run as an operator."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or not x.shape[0]:
        return None
    return BoundChain(x.shape, x.dtype, tensors, spec)


def check_plan(level: Tensor | None, order: Tensor | None, samples: int, blocks: int = 1) -> None:
    """Raise ValueError unless level and order are those of so many blocks of a `LevelPlan`."""
    if blocks == 0:
        return
    for name, value in (("level", level), ("order", order)):
        if (
            value is None
            or value.dtype != torch.int32
            or value.numel() != blocks * samples
            or not value.is_contiguous()
        ):
            given = "None" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(
                f"{name} is {given}; it must be contiguous torch.int32 of shape ({samples},), one entry a sample, for "
                f"each of {blocks} blocks: use plan_levels(...)"
            )


def _check_levels(level: Tensor | None, shape: tuple[int, int]) -> None:
    if (
        level is None
        or level.dtype != torch.int64
        or level.shape != shape
        or not level.is_contiguous()
        or not level.is_cpu
    ):
        given = "None" if level is None else f"{level.dtype} of shape {tuple(level.shape)}, on {level.device}"
        raise ValueError(
            f"level is {given}; without an order it must be contiguous torch.int64 of shape {shape}, samples by "
            "blocks, on a CPU"
        )


@functools.lru_cache(maxsize=256)
def _native(dtype: str, addresses: tuple[int, ...], spec: str) -> Any:
    """The native form of a chain, which these numbers determine: it holds addresses, no values."""
    return extension().Chain(dtype, addresses, read_spec(spec))

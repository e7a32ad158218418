"""The plan of a batch: every block's order and counts in one launch, from the levels on the device.

A program serves one block with a stable counting sort, level descending: it counts the levels, then gives every sample
the next place of its level. Both passes walk the samples tile by tile, so any number of samples will do.

N samples, L levels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from den_kernels.backends.triton.launch import Launch, Sweep

_TILE = 1024  # samples that a program takes at a time


@triton.jit
def level_tile(level_ptr, sample_N, samples, stride, LEVELS: tl.constexpr):
    """The levels [N], a bad one taken as the nearest; LEVELS, which no level is, where there is no sample."""
    level_N = tl.load(level_ptr + sample_N.to(tl.int64) * stride, mask=sample_N < samples, other=0)
    level_N = tl.minimum(tl.maximum(level_N, 0), LEVELS - 1).to(tl.int32)
    return tl.where(sample_N < samples, level_N, LEVELS)


@triton.jit(do_not_specialize=["samples", "stride_n", "stride_b"], do_not_specialize_on_alignment=["level_ptr"])
def plan_kernel(
    level_ptr,  # [N, B], integers of any strides
    level_out_ptr,  # [B, N] int32
    order_ptr,  # [B, N] int32
    count_ptr,  # [B, LEVELS] int32
    samples,
    stride_n,
    stride_b,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,  # LEVELS rounded up to a power of two
    BLOCK_ROWS: tl.constexpr,
):
    block = tl.program_id(0)
    level_ptr += block.to(tl.int64) * stride_b
    level_out_ptr += block.to(tl.int64) * samples
    order_ptr += block.to(tl.int64) * samples
    n = tl.arange(0, BLOCK_ROWS)
    l = tl.arange(0, COLUMNS)

    above_L = tl.zeros((COLUMNS,), tl.int32)  # samples whose level is higher
    for start in range(0, samples, BLOCK_ROWS):
        level_N = level_tile(level_ptr, start + n, samples, stride_n, LEVELS)
        higher_NL = (level_N[:, None] > l[None, :]) & (level_N < LEVELS)[:, None]
        above_L += tl.sum(higher_NL.to(tl.int32), axis=0)

    next_L = above_L
    for start in range(0, samples, BLOCK_ROWS):
        level_N = level_tile(level_ptr, start + n, samples, stride_n, LEVELS)
        mine_NL = (level_N[:, None] == l[None, :]).to(tl.int32)
        place_NL = next_L[None, :] + tl.cumsum(mine_NL, axis=0) - 1
        place_N = tl.sum(place_NL * mine_NL, axis=1)
        exists_N = start + n < samples
        tl.store(order_ptr + place_N, start + n, mask=exists_N)
        tl.store(level_out_ptr + start + n, level_N, mask=exists_N)
        next_L += tl.sum(mine_NL, axis=0)
    # Behind the last sample of a level begins the level below: there, the samples of this level and higher are counted.
    tl.store(count_ptr + block.to(tl.int64) * LEVELS + l, next_L, mask=l < LEVELS)


def plan_plan(level_NB: torch.Tensor, level_BN: torch.Tensor, order_BN: torch.Tensor, count_BL: torch.Tensor) -> Launch:
    """The one launch of the plan; ``level_NB`` has any strides, the results are contiguous."""
    samples, blocks = level_NB.shape
    levels = count_BL.shape[1]
    rows = min(_TILE, max(16, 1 << (samples - 1).bit_length()))
    return Launch(
        kernel=plan_kernel,
        programs=blocks,
        arguments={
            "level_ptr": level_NB,
            "level_out_ptr": level_BN,
            "order_ptr": order_BN,
            "count_ptr": count_BL,
            "samples": samples,
            "stride_n": level_NB.stride(0),
            "stride_b": level_NB.stride(1),
        },
        constants={"LEVELS": levels, "COLUMNS": 1 << (levels - 1).bit_length()},
        tile=Sweep(rows, None, 4),
    )

"""The shortcut of a residual block as a 1x1 convolution with a folded norm: the same for every sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from den_kernels.backends.triton import configs
from den_kernels.backends.triton.implicit_gemm import accumulate_forward, clamp_width
from den_kernels.backends.triton.launch import Launch, check_indexable, dot_precision, multiprocessors


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"], do_not_specialize_on_alignment=["level_ptr"])
def projection_kernel(
    x_ptr,  # [N, H, W, C]
    weight_ptr,  # [O, 1, 1, C]
    scale_ptr,  # [LEVELS, O] float32
    shift_ptr,
    level_ptr,  # [N] int32
    out_ptr,  # [N, out_h, out_w, O]
    in_channels,
    out_channels,
    in_h,
    in_w,
    out_w,
    out_pixels,
    tiles_m,
    tiles_n,
    LEVELS: tl.constexpr,
    STRIDE: tl.constexpr,
    GRANULE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tile_m = (pid // tiles_n) % tiles_m
    sample = (pid // (tiles_n * tiles_m)).to(tl.int64)
    row_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok_N = col_N < out_channels
    acc_MN = accumulate_forward(
        x_ptr + sample * (in_h * in_w * in_channels),
        weight_ptr,
        None,
        None,
        row_M,
        col_N,
        col_N,
        col_ok_N,
        out_w,
        out_pixels,
        in_h,
        in_w,
        in_channels,
        in_channels,
        out_channels,
        in_channels,
        0,
        1,
        1,
        1,
        STRIDE,
        STRIDE,
        0,
        0,
        1,
        1,
        1,
        GRANULE,
        False,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    row = clamp_width(tl.load(level_ptr + sample), LEVELS - 1) * out_channels
    scale_N = tl.load(scale_ptr + row + col_N, mask=col_ok_N, other=0.0)
    shift_N = tl.load(shift_ptr + row + col_N, mask=col_ok_N, other=0.0)
    acc_MN = acc_MN * scale_N[None, :] + shift_N[None, :]
    out_MN = out_ptr + sample * (out_pixels * out_channels) + row_M[:, None] * out_channels + col_N[None, :]
    tl.store(out_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=(row_M < out_pixels)[:, None] & col_ok_N[None, :])


def plan_projection(
    x: torch.Tensor,
    weight_OHWI: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    level: torch.Tensor,
    out: torch.Tensor,
    stride: int,
) -> Launch:
    """The launch that fills ``out`` with the shortcut; maps are channels_last, not empty, and do not overlap."""
    samples, in_channels, in_h, in_w = x.shape
    _, out_channels, out_h, out_w = out.shape
    check_indexable(weight_OHWI, x, out)
    precision = dot_precision(x.dtype)
    granule = configs.granule(in_channels)
    tile = configs.choose(
        configs.kind(x.dtype, precision),
        samples=samples,
        rows=out_h * out_w,
        reduction=in_channels,
        columns=out_channels,
        elastic_in=False,
        elastic_out=False,
        through_registers=False,
        vectors=granule > 1,
        multiprocessors=multiprocessors(x.device),
    )
    tiles_m, tiles_n = -(-(out_h * out_w) // tile.block_m), -(-out_channels // tile.block_n)
    return Launch(
        kernel=projection_kernel,
        programs=samples * tiles_m * tiles_n,
        arguments={
            "x_ptr": x,
            "weight_ptr": weight_OHWI,
            "scale_ptr": scale,
            "shift_ptr": shift,
            "level_ptr": level,
            "out_ptr": out,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "in_h": in_h,
            "in_w": in_w,
            "out_w": out_w,
            "out_pixels": out_h * out_w,
            "tiles_m": tiles_m,
            "tiles_n": tiles_n,
        },
        constants={
            "LEVELS": scale.shape[0],
            "STRIDE": stride,
            "GRANULE": granule,
            "PRECISION": precision,
        },
        tile=tile,
    )

"""The primitive: a convolution with run-time input and output widths for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from den_kernels.backends.triton import configs
from den_kernels.backends.triton.implicit_gemm import accumulate_forward, clamp_width, relu
from den_kernels.backends.triton.launch import Launch, check_indexable, dot_precision, multiprocessors
from den_kernels.backends.triton.tile_tables import Problem, batch_class


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"], do_not_specialize_on_alignment=["in_width_ptr", "out_width_ptr"])
def conv2d_kernel(
    x_ptr,  # [N, H, W, C]
    weight_ptr,  # [O, KERNEL_H, KERNEL_W, group_in]
    bias_ptr,  # [O] or None
    in_width_ptr,  # [N] or None
    out_width_ptr,  # [N] or None
    residual_ptr,  # [N, out_h, out_w, O] or None
    level_ptr,  # [N], the row of scale and shift
    scale_ptr,  # float32 [L, O] or None
    shift_ptr,
    out_ptr,  # [N, out_h, out_w, O]
    in_channels,
    out_channels,
    in_h,
    in_w,
    out_w,
    out_pixels,
    group_in,
    group_out,
    tiles_m,
    tiles_n,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPAN: tl.constexpr,
    GRANULE: tl.constexpr,
    PRECISION: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Channel tiles vary fastest: the programs that share an activation tile run together and find it in L2.
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    chunk = (pid // tiles_n) % CHUNKS
    tile_m = (pid // (tiles_n * CHUNKS)) % tiles_m
    sample = pid // (tiles_n * CHUNKS * tiles_m)

    row_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    local_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_N = chunk * (SPAN * group_out) + local_N
    col_ok_N = local_N < SPAN * group_out
    ok_MN = (row_M < out_pixels)[:, None] & col_ok_N[None, :]
    place_MN = row_M[:, None] * out_channels + col_N[None, :]
    out_ptr += sample.to(tl.int64) * (out_pixels * out_channels)

    out_limit = out_channels
    if out_width_ptr is not None:
        out_limit = clamp_width(tl.load(out_width_ptr + sample), out_channels)
        if chunk * (SPAN * group_out) + tile_n * BLOCK_N >= out_limit:
            tl.store(out_ptr + place_MN, tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty), mask=ok_MN)
            return

    limit = SPAN * group_in
    if in_width_ptr is not None:
        in_limit = clamp_width(tl.load(in_width_ptr + sample), in_channels)
        limit = tl.minimum(tl.maximum(in_limit - chunk * (SPAN * group_in), 0), SPAN * group_in)

    acc_MN = accumulate_forward(
        x_ptr + sample.to(tl.int64) * (in_h * in_w * in_channels) + chunk * (SPAN * group_in),
        weight_ptr,
        None,
        None,
        row_M,
        col_N,
        local_N,
        col_ok_N,
        out_w,
        out_pixels,
        in_h,
        in_w,
        in_channels,
        group_in,
        group_out,
        limit,
        0,
        1,
        KERNEL_H,
        KERNEL_W,
        STRIDE_H,
        STRIDE_W,
        PAD_H,
        PAD_W,
        DILATION_H,
        DILATION_W,
        SPAN,
        GRANULE,
        in_width_ptr is not None,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if bias_ptr is not None:
        acc_MN += tl.load(bias_ptr + col_N, mask=col_ok_N, other=0.0).to(tl.float32)[None, :]
    if scale_ptr is not None:
        row_N = tl.load(level_ptr + sample) * out_channels + col_N
        acc_MN *= tl.load(scale_ptr + row_N, mask=col_ok_N, other=0.0)[None, :]
        acc_MN += tl.load(shift_ptr + row_N, mask=col_ok_N, other=0.0)[None, :]
    if RELU:
        acc_MN = relu(acc_MN)
    acc_MN = tl.where((col_N < out_limit)[None, :], acc_MN, 0.0)
    if residual_ptr is not None:
        residual_ptr += sample.to(tl.int64) * (out_pixels * out_channels)
        residual_MN = tl.load(residual_ptr + place_MN, mask=ok_MN, other=0.0).to(tl.float32)
        acc_MN += residual_MN
        if in_width_ptr is not None:
            acc_MN = tl.where(in_limit > 0, acc_MN, residual_MN)  # bit for bit, -0.0 included
    tl.store(out_ptr + place_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=ok_MN)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def empty_map(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


class Norm(NamedTuple):
    """What stands behind a fused convolution: level [N]; scale, shift float32 [L, O]; whether a ReLU follows."""

    level: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    relu: bool


def plan_conv2d(
    x: torch.Tensor,
    weight_OHWI: torch.Tensor,
    bias: torch.Tensor | None,
    in_width: torch.Tensor | None,
    out_width: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    norm: Norm | None = None,
) -> Launch:
    """The one launch of the primitive; ``x``, ``residual`` and ``out`` are channels_last and ``out`` is not empty.

    norm: comes before the addition of the residual.
    """
    samples, in_channels, in_h, in_w = x.shape
    out_channels, kernel_h, kernel_w, group_in = weight_OHWI.shape
    _, _, out_h, out_w = out.shape
    check_indexable(weight_OHWI, x, out)
    group_out = out_channels // groups
    span = configs.group_span(group_in, group_out, groups)
    precision = dot_precision(x.dtype)
    granule = configs.granule(span * group_in)
    kind = configs.kind(x.dtype, precision)
    elastic = ("-in" if in_width is not None else "") + ("-out" if out_width is not None else "")
    shape = (in_channels, out_channels, in_h, in_w, (kernel_h, kernel_w), stride, groups)
    tile = configs.tile(
        Problem(f"conv2d{elastic}", kind, *shape, batch_class(samples)),
        x.device,
        configs.Facts(
            kind=kind,
            samples=samples * (groups // span),
            rows=out_h * out_w,
            reduction=span * group_in,
            columns=span * group_out,
            elastic_in=in_width is not None,
            elastic_out=out_width is not None,
            through_registers=False,
            vectors=granule > 1,
            multiprocessors=multiprocessors(x.device),
        ),
    )
    tiles_m, tiles_n = -(-(out_h * out_w) // tile.block_m), -(-(span * group_out) // tile.block_n)
    return Launch(
        kernel=conv2d_kernel,
        programs=samples * tiles_m * (groups // span) * tiles_n,
        arguments={
            "x_ptr": x,
            "weight_ptr": weight_OHWI,
            "bias_ptr": bias,
            "in_width_ptr": in_width,
            "out_width_ptr": out_width,
            "residual_ptr": residual,
            "level_ptr": None if norm is None else norm.level,
            "scale_ptr": None if norm is None else norm.scale,
            "shift_ptr": None if norm is None else norm.shift,
            "out_ptr": out,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "in_h": in_h,
            "in_w": in_w,
            "out_w": out_w,
            "out_pixels": out_h * out_w,
            "group_in": group_in,
            "group_out": group_out,
            "tiles_m": tiles_m,
            "tiles_n": tiles_n,
        },
        constants={
            "KERNEL_H": kernel_h,
            "KERNEL_W": kernel_w,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PAD_H": padding[0],
            "PAD_W": padding[1],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
            "CHUNKS": groups // span,
            "SPAN": span,
            "GRANULE": granule,
            "PRECISION": precision,
            "RELU": norm is not None and norm.relu,
        },
        tile=tile,
    )

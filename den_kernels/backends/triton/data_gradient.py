"""The gradient of the primitive's input: the forward's loop, with grad and input in each other's place.

    dx[y, x, ci] = sum over taps (i, j) and co of grad[(y + P - i D) / S, (x + P - j D) / S, co] * weight[co, i, j, ci]

where the divisions are exact. It gathers, so that nothing is added twice to one place, and needs no atomics. The
reduction stops at the sample's output width, and tiles of input channels beyond its input width are zeros at once.

With a stride, input pixels fall into stride_h x stride_w phases, and a phase meets only the taps that divide: each
phase is a convolution of its own with those, so that no tap is walked for nothing.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from den_kernels.backends.triton import configs
from den_kernels.backends.triton.implicit_gemm import accumulate, clamp_width
from den_kernels.backends.triton.launch import Launch, check_indexable, dot_precision, multiprocessors


@triton.jit
def phase_taps(offset, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TAP_STEP: tl.constexpr):
    """The taps i with (offset - i * DILATION) divisible by STRIDE: the first, their number, and its quotient.

    They are TAP_STEP = STRIDE / gcd(STRIDE, DILATION) apart.
    """
    first = KERNEL
    for i in tl.static_range(KERNEL):
        first = tl.where((first == KERNEL) & ((offset - i * DILATION) % STRIDE == 0), i, first)
    taps = (KERNEL - first + TAP_STEP - 1) // TAP_STEP
    return first, taps, (offset - first * DILATION) // STRIDE


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"], do_not_specialize_on_alignment=["in_width_ptr", "out_width_ptr"])
def data_gradient_kernel(
    grad_ptr,  # [N, out_h, out_w, O]
    weight_ptr,  # [O, KERNEL_H, KERNEL_W, group_in]
    in_width_ptr,  # [N] or None
    out_width_ptr,  # [N] or None
    dx_ptr,  # [N, in_h, in_w, C]
    in_channels,
    out_channels,
    in_h,
    in_w,
    out_h,
    out_w,
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
    TAP_STEP_H: tl.constexpr,
    TAP_STEP_W: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPAN: tl.constexpr,
    GRANULE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    chunk = (pid // tiles_n) % CHUNKS
    tile_m = (pid // (tiles_n * CHUNKS)) % tiles_m
    phase = (pid // (tiles_n * CHUNKS * tiles_m)) % (STRIDE_H * STRIDE_W)
    sample = pid // (tiles_n * CHUNKS * tiles_m * (STRIDE_H * STRIDE_W))
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W

    # The phase's pixels: every STRIDE-th row and column of the input.
    columns = tl.maximum((in_w - phase_w + STRIDE_W - 1) // STRIDE_W, 1)
    row_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    y_M = row_M // columns
    x_M = row_M % columns
    pixel_M = (phase_h + y_M * STRIDE_H) * in_w + phase_w + x_M * STRIDE_W
    row_ok_M = (phase_h + y_M * STRIDE_H < in_h) & (phase_w + x_M * STRIDE_W < in_w)

    local_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_N = chunk * (SPAN * group_in) + local_N
    col_ok_N = local_N < SPAN * group_in
    ok_MN = row_ok_M[:, None] & col_ok_N[None, :]
    dx_MN = dx_ptr + sample.to(tl.int64) * (in_h * in_w * in_channels) + pixel_M[:, None] * in_channels + col_N[None, :]

    in_limit = in_channels
    if in_width_ptr is not None:
        in_limit = clamp_width(tl.load(in_width_ptr + sample), in_channels)
        if chunk * (SPAN * group_in) + tile_n * BLOCK_N >= in_limit:
            tl.store(dx_MN, tl.zeros((BLOCK_M, BLOCK_N), dx_ptr.dtype.element_ty), mask=ok_MN)
            return

    limit = SPAN * group_out
    if out_width_ptr is not None:
        out_limit = clamp_width(tl.load(out_width_ptr + sample), out_channels)
        limit = tl.minimum(tl.maximum(out_limit - chunk * (SPAN * group_out), 0), SPAN * group_out)

    first_h, taps_h, top = phase_taps(phase_h + PAD_H, KERNEL_H, STRIDE_H, DILATION_H, TAP_STEP_H)
    first_w, taps_w, left = phase_taps(phase_w + PAD_W, KERNEL_W, STRIDE_W, DILATION_W, TAP_STEP_W)
    acc_MN = accumulate(
        grad_ptr + sample.to(tl.int64) * (out_h * out_w * out_channels) + chunk * (SPAN * group_out),
        weight_ptr,
        None,
        None,
        top + y_M,
        left + x_M,
        row_ok_M,
        col_N,
        local_N,
        col_ok_N,
        out_h,
        out_w,
        out_channels,
        chunk * (SPAN * group_out),
        group_in,
        group_out,
        limit,
        taps_h,
        taps_w,
        -(TAP_STEP_H * DILATION_H // STRIDE_H),
        -(TAP_STEP_W * DILATION_W // STRIDE_W),
        first_h * KERNEL_W + first_w,
        TAP_STEP_H * KERNEL_W,
        TAP_STEP_W,
        0,
        1,
        KERNEL_H,
        KERNEL_W,
        True,
        SPAN,
        GRANULE,
        out_width_ptr is not None,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    acc_MN = tl.where((col_N < in_limit)[None, :], acc_MN, 0.0)
    tl.store(dx_MN, acc_MN.to(dx_ptr.dtype.element_ty), mask=ok_MN)


def plan_data_gradient(
    grad: torch.Tensor,
    weight_OHWI: torch.Tensor,
    in_width: torch.Tensor | None,
    out_width: torch.Tensor | None,
    dx: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Launch:
    """The one launch of the data gradient; ``grad`` and ``dx`` are channels_last and not empty."""
    samples, in_channels, in_h, in_w = dx.shape
    out_channels, kernel_h, kernel_w, group_in = weight_OHWI.shape
    _, _, out_h, out_w = grad.shape
    check_indexable(weight_OHWI, grad, dx)
    group_out = out_channels // groups
    span = configs.group_span(group_in, group_out, groups)
    precision = dot_precision(dx.dtype)
    granule = configs.granule(span * group_out)
    phases = stride[0] * stride[1]
    rows = -(-in_h // stride[0]) * -(-in_w // stride[1])
    tile = configs.choose(
        configs.kind(dx.dtype, precision),
        samples=samples * phases * (groups // span),
        rows=rows,
        reduction=span * group_out,
        columns=span * group_in,
        elastic_in=out_width is not None,
        elastic_out=in_width is not None,
        through_registers=False,
        vectors=granule > 1 and group_in % 16 == 0,
        multiprocessors=multiprocessors(dx.device),
    )
    tiles_m, tiles_n = -(-rows // tile.block_m), -(-(span * group_in) // tile.block_n)
    return Launch(
        kernel=data_gradient_kernel,
        programs=samples * phases * tiles_m * (groups // span) * tiles_n,
        arguments={
            "grad_ptr": grad,
            "weight_ptr": weight_OHWI,
            "in_width_ptr": in_width,
            "out_width_ptr": out_width,
            "dx_ptr": dx,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "in_h": in_h,
            "in_w": in_w,
            "out_h": out_h,
            "out_w": out_w,
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
            "TAP_STEP_H": stride[0] // math.gcd(stride[0], dilation[0]),
            "TAP_STEP_W": stride[1] // math.gcd(stride[1], dilation[1]),
            "CHUNKS": groups // span,
            "SPAN": span,
            "GRANULE": granule,
            "PRECISION": precision,
        },
        tile=tile,
    )

"""The inner loop that every kernel of this backend shares: a convolution tile as a matrix product.

A tile is BLOCK_M output pixels of one sample by BLOCK_N output channels. The reduction walks the taps of the kernel
and, inside a tap, the input channels below a run-time limit: a sample of a narrow level does fewer steps, not masked
ones.

Shape suffixes: M output pixels of the tile, N its output channels, K the input channels of a step.

"Chunk" is the part of the channels that a tile can see: all of them without groups, one group with them. Groups
narrower than a tensor-core operand (16) are taken SPAN at a time as one block-diagonal product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp_width(width, full):
    """A width from device memory, brought into [0, full]: a bad one must not read or write out of bounds."""
    return tl.minimum(tl.maximum(width, 0), full).to(tl.int32)


@triton.jit
def accumulate(
    x_ptr,  # first channel of the chunk, at pixel (0, 0) of the sample
    weight_ptr,  # [O, KERNEL_H, KERNEL_W, group_in]
    pre_scale_ptr,  # float32, first channel of the chunk; None without pre-activation
    pre_shift_ptr,
    row_M,  # output pixel, and whether it exists
    col_N,  # output channel within the whole tensor
    local_N,  # output channel within the chunk
    col_ok_N,
    out_w,
    out_pixels,
    in_h,
    in_w,
    in_stride,  # elements from one input pixel to the next
    group_in,
    group_out,
    limit,  # the reduction reads channels [0, limit) of the chunk
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SPAN: tl.constexpr,
    GRANULE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc[M, N] in float32 of the convolution of one sample, before bias or scale.

    GRANULE: masks are per 16-byte vector, or the compiler falls back to one element a load and loses cp.async, so the
    limit is rounded up to GRANULE channels. What is read beyond the limit must then be finite zeros (the hidden buffer
    of a block guarantees it), or EXACT must be set: it zeroes the activations in registers, whatever they hold. Weights
    between the limit and the next multiple of GRANULE meet those zeros, so they must be finite.
    """
    top_M = (row_M // out_w) * STRIDE_H - PAD_H
    left_M = (row_M % out_w) * STRIDE_W - PAD_W
    origin_M = (top_M * in_w + left_M) * in_stride
    row_ok_M = row_M < out_pixels
    k = tl.arange(0, BLOCK_K)
    bound = ((limit + GRANULE - 1) // GRANULE) * GRANULE
    blocks = (limit + BLOCK_K - 1) // BLOCK_K
    filter_N = col_N * (KERNEL_H * KERNEL_W * group_in)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One flat loop, because only an innermost loop is software-pipelined. `blocks` is 0 only when the loop is empty.
    for step in range(KERNEL_H * KERNEL_W * blocks):
        tap = step // blocks
        c_K = (step - tap * blocks) * BLOCK_K + k
        kh = tap // KERNEL_W
        kw = tap - kh * KERNEL_W
        y_M = top_M + kh * DILATION_H
        x_M = left_M + kw * DILATION_W
        inside_M = row_ok_M & (y_M >= 0) & (y_M < in_h) & (x_M >= 0) & (x_M < in_w)
        ok_MK = inside_M[:, None] & (c_K < bound)[None, :]
        shift_M = origin_M + (kh * DILATION_H * in_w + kw * DILATION_W) * in_stride
        x_MK = tl.load(x_ptr + shift_M[:, None] + c_K[None, :], mask=ok_MK, other=0.0)
        if pre_scale_ptr is not None:
            # The padding is zero after the activation, so the mask is applied again.
            scale_K = tl.load(pre_scale_ptr + c_K, mask=c_K < bound, other=0.0)
            offset_K = tl.load(pre_shift_ptr + c_K, mask=c_K < bound, other=0.0)
            active_MK = relu(x_MK.to(tl.float32) * scale_K[None, :] + offset_K[None, :])
            x_MK = tl.where(ok_MK, active_MK, 0.0).to(x_MK.dtype)
        if EXACT:
            x_MK = tl.where((c_K < limit)[None, :], x_MK, 0.0)
        if SPAN == 1:
            w_NK = tl.load(
                weight_ptr + filter_N[:, None] + (tap * group_in + c_K)[None, :],
                mask=col_ok_N[:, None] & (c_K < bound)[None, :],
                other=0.0,
            )
        else:
            own_NK = c_K[None, :] - ((local_N // group_out) * group_in)[:, None]
            w_NK = tl.load(
                weight_ptr + filter_N[:, None] + tap * group_in + own_NK,
                mask=col_ok_N[:, None] & (own_NK >= 0) & (own_NK < group_in) & (c_K < bound)[None, :],
                other=0.0,
            )
        acc_MN = tl.dot(x_MK, tl.trans(w_NK), acc_MN, input_precision=PRECISION)
    return acc_MN

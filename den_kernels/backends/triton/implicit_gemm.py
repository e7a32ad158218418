"""The inner loop that every kernel of this backend shares: a convolution tile as a matrix product.

A tile is BLOCK_M pixels of one sample by BLOCK_N channels. The reduction walks the taps of the kernel and, inside a
tap, the channels below a run-time limit: a sample of a narrow level does fewer steps, not masked ones.

Shape suffixes: M rows (pixels) of the tile, N its columns (channels), K the channels of a step.

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
def corner(row_M, out_w, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr):
    """The source pixel that the first tap of each output pixel reads; it may lie in the padding."""
    return (row_M // out_w) * STRIDE_H - PAD_H, (row_M % out_w) * STRIDE_W - PAD_W


@triton.jit
def taps_inside(
    top_M, left_M, row_ok_M, in_h, in_w, taps_h, taps_w, step_h, step_w, MOST_H: tl.constexpr, MOST_W: tl.constexpr
):
    """Bit i * taps_w + j of each row: whether it exists and its tap (i, j) is inside the map. At most 31 taps."""
    columns_M = tl.zeros_like(left_M)
    for j in tl.static_range(MOST_W):
        x_M = left_M + j * step_w
        columns_M |= tl.where((j < taps_w) & (x_M >= 0) & (x_M < in_w), 1 << j, 0)
    columns_M = tl.where(row_ok_M, columns_M, 0)
    bits_M = tl.zeros_like(top_M)
    for i in tl.static_range(MOST_H):
        y_M = top_M + i * step_h
        bits_M |= tl.where((i < taps_h) & (y_M >= 0) & (y_M < in_h), columns_M << (i * taps_w), 0)
    return bits_M


@triton.jit
def filter_tile(
    weight_ptr,
    tap,
    first_c,
    k,
    bound,
    col_N,
    local_N,
    col_ok_N,
    first_filter,
    group_in,
    group_out,
    FILTER: tl.constexpr,
    SPAN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Weights [K, N] of one tap and the channels first_c + k, of [O, FILTER taps, group_in]; 0 beyond the bound and off
    the diagonal of a span.

    The reduction runs over a filter's inputs, or (TRANSPOSED) over the filters, `first_filter` being the chunk's first:
    the columns are then input channels. Either way the innermost dimension of the tile is that of the memory.
    """
    # What changes from step to step is a scalar: the offsets of the tile are worked out once.
    ok_K = k < bound - first_c
    if TRANSPOSED:
        filter_size = FILTER * group_in
        place_KN = (k * filter_size)[:, None] + local_N[None, :]
        ok_KN = ok_K[:, None] & col_ok_N[None, :]
        if SPAN > 1:
            diagonal_K = ((first_c + k) // group_out) * group_in
            place_KN -= diagonal_K[:, None]
            in_KN = local_N[None, :] - diagonal_K[:, None]
            ok_KN = ok_KN & (in_KN >= 0) & (in_KN < group_in)
        step = (first_filter + first_c) * filter_size + tap * group_in
        return tl.load(weight_ptr + (place_KN + step), mask=ok_KN, other=0.0)
    else:
        place_NK = (col_N * (FILTER * group_in))[:, None] + k[None, :]
        ok_NK = col_ok_N[:, None] & ok_K[None, :]
        if SPAN > 1:
            diagonal_N = (local_N // group_out) * group_in
            place_NK -= diagonal_N[:, None]
            in_NK = (first_c + k)[None, :] - diagonal_N[:, None]
            ok_NK = ok_NK & (in_NK >= 0) & (in_NK < group_in)
        return tl.trans(tl.load(weight_ptr + (place_NK + (tap * group_in + first_c)), mask=ok_NK, other=0.0))


@triton.jit
def accumulate(
    x_ptr,  # first channel of the chunk, at pixel (0, 0) of the sample
    weight_ptr,  # [O, FILTER_H * FILTER_W taps, group_in]
    pre_scale_ptr,  # float32, first channel of the chunk; None without pre-activation
    pre_shift_ptr,
    top_M,  # the source pixel that the first tap reads for each row, and whether the row exists
    left_M,
    row_ok_M,
    col_N,  # column's channel within the whole tensor
    local_N,  # within the chunk
    col_ok_N,
    in_h,
    in_w,
    in_stride,  # elements from one source pixel to the next
    first_filter,  # of the chunk; read when TRANSPOSED
    group_in,
    group_out,
    limit,  # the reduction reads channels [0, limit) of the chunk
    taps_h,  # taps to walk, constant or not
    taps_w,
    step_h,  # source pixels from one tap to the next
    step_w,
    first_tap,  # where the weights of a tap are: first_tap + i * tap_step_h + j * tap_step_w
    tap_step_h,
    tap_step_w,
    split,  # of the steps of the reduction, this part of SPLITS
    SPLITS: tl.constexpr,
    FILTER_H: tl.constexpr,
    FILTER_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
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
    k = tl.arange(0, BLOCK_K)
    bound = ((limit + GRANULE - 1) // GRANULE) * GRANULE
    taps = taps_h * taps_w
    first = 0
    last = taps * ((limit + BLOCK_K - 1) // BLOCK_K)
    if SPLITS > 1:
        share = (last + SPLITS - 1) // SPLITS
        first = split * share
        last = tl.minimum(first + share, last)
    source_MK = x_ptr + (((top_M * in_w + left_M) * in_stride)[:, None] + k[None, :])
    # One bit a tap, if they fit: then a step tests that bit, whatever the shape of the kernel.
    BITS: tl.constexpr = FILTER_H * FILTER_W < 32
    if BITS:
        inside_M = taps_inside(top_M, left_M, row_ok_M, in_h, in_w, taps_h, taps_w, step_h, step_w, FILTER_H, FILTER_W)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Values go from memory to shared memory past the registers, but for channels that a limit cuts inside a GRANULE:
    # those, the last BLOCK_K, take a loop of their own.
    CUT: tl.constexpr = EXACT and GRANULE > 1
    whole = last
    if CUT:
        whole = tl.where(limit % GRANULE == 0, last, tl.minimum(tl.maximum(taps * (limit // BLOCK_K), first), last))
    for cut in tl.static_range(2 if CUT else 1):
        # One flat loop, because only an innermost loop is software-pipelined. Taps vary fastest: what one reads of a
        # map the next ones read again, soon enough to find it in the first cache. `taps` is 0 only when the loop is
        # empty.
        for step in range(whole if cut else first, last if cut else whole):
            block = step // taps
            tap = step - block * taps
            first_c = block * BLOCK_K
            kh = tap // taps_w
            kw = tap - kh * taps_w
            ok_K = k < bound - first_c
            if BITS:
                ok_MK = (inside_M[:, None] & tl.where(ok_K, 1 << tap, 0)[None, :]) != 0
            else:
                y_M = top_M + kh * step_h
                x_M = left_M + kw * step_w
                ok_M = row_ok_M & (y_M >= 0) & (y_M < in_h) & (x_M >= 0) & (x_M < in_w)
                ok_MK = ok_M[:, None] & ok_K[None, :]
            move = (kh * step_h * in_w + kw * step_w) * in_stride + first_c
            x_MK = tl.load(source_MK + move, mask=ok_MK, other=0.0, cache_modifier=".ca")
            if pre_scale_ptr is not None:
                # The padding is zero after the activation, so the mask is applied again.
                scale_K = tl.load(pre_scale_ptr + first_c + k, mask=ok_K, other=0.0)
                offset_K = tl.load(pre_shift_ptr + first_c + k, mask=ok_K, other=0.0)
                active_MK = relu(x_MK.to(tl.float32) * scale_K[None, :] + offset_K[None, :])
                x_MK = tl.where(ok_MK, active_MK, 0.0).to(x_MK.dtype)
            if cut:
                x_MK = tl.where((k < limit - first_c)[None, :], x_MK, 0.0)
            w_KN = filter_tile(
                weight_ptr,
                first_tap + kh * tap_step_h + kw * tap_step_w,
                first_c,
                k,
                bound,
                col_N,
                local_N,
                col_ok_N,
                first_filter,
                group_in,
                group_out,
                FILTER_H * FILTER_W,
                SPAN,
                TRANSPOSED,
            )
            acc_MN = tl.dot(x_MK, w_KN, acc_MN, input_precision=PRECISION)
    return acc_MN


@triton.jit
def accumulate_forward(
    x_ptr,
    weight_ptr,
    pre_scale_ptr,
    pre_shift_ptr,
    row_M,
    col_N,
    local_N,
    col_ok_N,
    out_w,
    out_pixels,
    in_h,
    in_w,
    in_stride,
    group_in,
    group_out,
    limit,
    split,
    SPLITS: tl.constexpr,
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
    """`accumulate` over every tap of a convolution, weights [O, KERNEL_H, KERNEL_W, group_in]."""
    top_M, left_M = corner(row_M, out_w, STRIDE_H, STRIDE_W, PAD_H, PAD_W)
    return accumulate(
        x_ptr,
        weight_ptr,
        pre_scale_ptr,
        pre_shift_ptr,
        top_M,
        left_M,
        row_M < out_pixels,
        col_N,
        local_N,
        col_ok_N,
        in_h,
        in_w,
        in_stride,
        0,
        group_in,
        group_out,
        limit,
        KERNEL_H,
        KERNEL_W,
        DILATION_H,
        DILATION_W,
        0,
        KERNEL_W,
        1,
        split,
        SPLITS,
        KERNEL_H,
        KERNEL_W,
        False,
        SPAN,
        GRANULE,
        EXACT,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

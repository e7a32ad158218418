"""The kernels of the fused residual block: one a convolution, levels and widths on the device.

Both have three forms: the whole convolution; one of PARTS parts of its reduction, kept in a float32 workspace; and the
sum of those parts (SUM_OF of them) in their order, with what follows the convolution. See `block.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from den_kernels.backends.triton.implicit_gemm import accumulate_forward, clamp_width, relu

# Not worth a compilation for each value: the batch size, and whether a row of the plan happens to be aligned.
_VARYING = ["samples", "tiles_m", "tiles_n", "readers"]
_ROWS = ["order_ptr", "count_ptr", "widths_ptr", "reader_level_ptr", "reader_widths_ptr"]


@triton.jit
def slot_level(count_ptr, slot, LEVELS: tl.constexpr):
    """The level of a slot of the plan: count[l] samples have level >= l, so independent loads find it."""
    level = 0
    for l in tl.static_range(1, LEVELS):
        level += (tl.load(count_ptr + l) > slot).to(tl.int32)
    return level


@triton.jit
def pooled_shortcut(x_ptr, row_M, col_N, ok_MN, out_w, in_h, in_w, in_channels, POOL: tl.constexpr):
    """Average over POOL x POOL windows (one cut by the edge divides by what is inside); zeros above x's channels."""
    top_M = (row_M // out_w) * POOL
    left_M = (row_M % out_w) * POOL
    ok_MN = ok_MN & (col_N < in_channels)[None, :]
    sum_MN = tl.zeros((row_M.shape[0], col_N.shape[0]), tl.float32)
    # A real loop: unrolled, the loads of all taps are in flight at once and the epilogue spills.
    for tap in tl.range(POOL * POOL, num_stages=1):
        y_M = top_M + tap // POOL
        x_M = left_M + tap % POOL
        inside_M = (y_M < in_h) & (x_M < in_w)
        offset_MN = ((y_M * in_w + x_M) * in_channels)[:, None] + col_N[None, :]
        sum_MN += tl.load(x_ptr + offset_MN, mask=ok_MN & inside_M[:, None], other=0.0).to(tl.float32)
    size_M = tl.minimum(in_h - top_M, POOL) * tl.minimum(in_w - left_M, POOL)
    return tl.div_rn(sum_MN, tl.maximum(size_M, 1).to(tl.float32)[:, None])


@triton.jit
def shortcut(x_ptr, row_M, col_N, ok_MN, out_w, in_h, in_w, in_channels, POOL: tl.constexpr):
    if POOL == 1:
        ok_MN = ok_MN & (col_N < in_channels)[None, :]
        return tl.load(x_ptr + row_M[:, None] * in_channels + col_N[None, :], mask=ok_MN, other=0.0)
    else:
        return pooled_shortcut(x_ptr, row_M, col_N, ok_MN, out_w, in_h, in_w, in_channels, POOL)


@triton.jit
def part_offset(split, slot, samples, out_pixels, out_channels, row_M, col_N):
    """Offsets [M, N] of one part of one slot's tile in the workspace [parts, N, out_pixels, out_channels]."""
    start = (split * samples + slot).to(tl.int64) * (out_pixels * out_channels)
    return start + row_M[:, None] * out_channels + col_N[None, :]


@triton.jit
def sum_of_parts(
    workspace_ptr,
    slot,
    samples,
    out_pixels,
    out_channels,
    row_M,
    col_N,
    ok_MN,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.static_range(PARTS):
        part_MN = part_offset(split, slot, samples, out_pixels, out_channels, row_M, col_N)
        acc_MN += tl.load(workspace_ptr + part_MN, mask=ok_MN, other=0.0)
    return acc_MN


@triton.jit
def next_reader(level_ptr, widths_ptr, sample, samples, readers, LEVELS: tl.constexpr):
    """The first of the blocks behind this one at which a sample has channels; `readers` where there is none."""
    found = readers
    for i in tl.range(readers, num_stages=1):
        reader = readers - 1 - i
        level = clamp_width(tl.load(level_ptr + reader * samples + sample), LEVELS - 1)
        found = tl.where(tl.load(widths_ptr + reader * LEVELS + level) > 0, reader, found)
    return found


@triton.jit
def hand_on(
    y_MN,
    activated_MN,  # pointers
    level_ptr,
    widths_ptr,
    norm_ptr,
    sample,
    samples,
    readers,
    out_channels,
    col_N,
    col_ok_N,
    ok_MN,
    LEVELS: tl.constexpr,
):
    """relu(scale * y + shift) of the block that reads a sample's y next, if one does."""
    reader = next_reader(level_ptr, widths_ptr, sample, samples, readers, LEVELS)
    if reader < readers:
        norm_ptr += reader * (2 * out_channels)
        scale_N = tl.load(norm_ptr + col_N, mask=col_ok_N, other=0.0)
        shift_N = tl.load(norm_ptr + out_channels + col_N, mask=col_ok_N, other=0.0)
        value_MN = relu(y_MN.to(tl.float32) * scale_N[None, :] + shift_N[None, :])
        tl.store(activated_MN, value_MN.to(y_MN.dtype), mask=ok_MN)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ROWS)
def hidden_kernel(
    x_ptr,  # [N, H, W, C]: the block's input by sample (FIRST), or hidden activations by slot
    weight_ptr,  # [C_hidden, KERNEL, KERNEL, group_in]
    scale_ptr,  # [LEVELS, C_hidden] float32
    shift_ptr,
    pre_scale_ptr,  # [C] float32, or None
    pre_shift_ptr,
    order_ptr,  # [N] int32
    count_ptr,  # [LEVELS] int32
    widths_ptr,  # [LEVELS] int32
    out_ptr,  # [N, out_h, out_w, C_hidden], by slot
    workspace_ptr,  # [parts, N, out_h, out_w, out_channels] float32, by slot; None when not split
    samples,
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
    LEVELS: tl.constexpr,
    PARTS: tl.constexpr,  # of the reduction, in this launch
    SUM_OF: tl.constexpr,  # parts that this launch adds; 0 for one that multiplies
    FIRST: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
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
    split = (pid // (tiles_n * CHUNKS * tiles_m)) % PARTS
    slot = pid // (tiles_n * CHUNKS * tiles_m * PARTS)

    level = slot_level(count_ptr, slot, LEVELS)
    width = clamp_width(tl.load(widths_ptr + level), out_channels)
    if chunk * (SPAN * group_out) + tile_n * BLOCK_N >= width:
        return

    if FIRST:
        source = clamp_width(tl.load(order_ptr + slot), samples - 1)
        limit = SPAN * group_in
    else:
        source = slot
        limit = tl.minimum(tl.maximum(width - chunk * (SPAN * group_in), 0), SPAN * group_in)
    row_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    local_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_N = chunk * (SPAN * group_out) + local_N
    col_ok_N = local_N < SPAN * group_out

    ok_MN = (row_M < out_pixels)[:, None] & col_ok_N[None, :]
    if SUM_OF > 0:
        acc_MN = sum_of_parts(
            workspace_ptr, slot, samples, out_pixels, out_channels, row_M, col_N, ok_MN, SUM_OF, BLOCK_M, BLOCK_N
        )
    else:
        if pre_scale_ptr is not None:
            pre_scale_ptr += chunk * (SPAN * group_in)
            pre_shift_ptr += chunk * (SPAN * group_in)
        acc_MN = accumulate_forward(
            x_ptr + source.to(tl.int64) * (in_h * in_w * in_channels) + chunk * (SPAN * group_in),
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
            in_channels,
            group_in,
            group_out,
            limit,
            split,
            PARTS,
            KERNEL,
            KERNEL,
            STRIDE,
            STRIDE,
            KERNEL // 2,
            KERNEL // 2,
            1,
            1,
            SPAN,
            GRANULE,
            False,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    if PARTS > 1:
        part_MN = part_offset(split, slot, samples, out_pixels, out_channels, row_M, col_N)
        tl.store(workspace_ptr + part_MN, acc_MN, mask=ok_MN)
        return

    scale_N = tl.load(scale_ptr + level * out_channels + col_N, mask=col_ok_N, other=0.0)
    shift_N = tl.load(shift_ptr + level * out_channels + col_N, mask=col_ok_N, other=0.0)
    acc_MN = relu(acc_MN * scale_N[None, :] + shift_N[None, :])
    acc_MN = tl.where((col_N < width)[None, :], acc_MN, 0.0)
    written_N = col_ok_N & (col_N < ((width + 15) // 16) * 16)
    out_MN = out_ptr + slot.to(tl.int64) * (out_pixels * out_channels) + row_M[:, None] * out_channels + col_N[None, :]
    ok_MN = (row_M < out_pixels)[:, None] & written_N[None, :]
    tl.store(out_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=ok_MN)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ROWS)
def last_kernel(
    hidden_ptr,  # [N, H, W, C_hidden], by slot
    weight_ptr,  # [O, KERNEL, KERNEL, group_in]
    scale_ptr,  # [LEVELS, O] float32
    shift_ptr,
    order_ptr,
    count_ptr,
    widths_ptr,
    x_ptr,  # [N, x_h, x_w, x_channels], the block's input; may be out_ptr
    out_ptr,  # [N, out_h, out_w, O]
    activated_ptr,  # like out_ptr, what its readers convolve; None when nothing is handed on
    reader_level_ptr,  # [readers, N] int32
    reader_widths_ptr,  # [readers, READER_LEVELS] int32
    reader_norm_ptr,  # [readers, 2, O] float32
    workspace_ptr,  # [parts, N, out_h, out_w, out_channels] float32, by slot; None when not split
    samples,
    readers,
    hidden_channels,
    out_channels,
    in_h,
    in_w,
    out_w,
    out_pixels,
    x_channels,
    x_h,
    x_w,
    group_in,
    group_out,
    tiles_m,
    tiles_n,
    LEVELS: tl.constexpr,
    PARTS: tl.constexpr,  # of the reduction, in this launch
    SUM_OF: tl.constexpr,  # parts that this launch adds; 0 for one that multiplies
    IN_PLACE: tl.constexpr,
    FRESH: tl.constexpr,  # samples at level 0 are activated too
    READER_LEVELS: tl.constexpr,
    POOL: tl.constexpr,
    RELU: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
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
    split = (pid // (tiles_n * CHUNKS * tiles_m)) % PARTS
    slot = pid // (tiles_n * CHUNKS * tiles_m * PARTS)

    level = slot_level(count_ptr, slot, LEVELS)
    width = clamp_width(tl.load(widths_ptr + level), hidden_channels)
    ACTIVATES: tl.constexpr = activated_ptr is not None
    if IN_PLACE and not (ACTIVATES and FRESH):  # noqa: SIM102 - the outer condition is known at compile time
        if width == 0:
            return

    sample = clamp_width(tl.load(order_ptr + slot), samples - 1).to(tl.int64)
    row_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    local_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_N = chunk * (SPAN * group_out) + local_N
    col_ok_N = local_N < SPAN * group_out
    ok_MN = (row_M < out_pixels)[:, None] & col_ok_N[None, :]
    x_ptr += sample * (x_h * x_w * x_channels)
    place_MN = row_M[:, None] * out_channels + col_N[None, :]
    out_ptr += sample * (out_pixels * out_channels)
    if ACTIVATES:
        activated_ptr += sample * (out_pixels * out_channels)

    if not IN_PLACE or (ACTIVATES and FRESH):  # noqa: SIM102
        if width == 0:
            if PARTS > 1:  # the last launch copies it
                return
            same_MN = shortcut(x_ptr, row_M, col_N, ok_MN, out_w, x_h, x_w, x_channels, POOL)
            same_MN = same_MN.to(out_ptr.dtype.element_ty)
            if not IN_PLACE:
                tl.store(out_ptr + place_MN, same_MN, mask=ok_MN)
            if ACTIVATES:
                hand_on(
                    same_MN, activated_ptr + place_MN, reader_level_ptr, reader_widths_ptr, reader_norm_ptr, sample,
                    samples, readers, out_channels, col_N, col_ok_N, ok_MN, READER_LEVELS,
                )  # fmt: skip
            return

    if SUM_OF > 0:
        acc_MN = sum_of_parts(
            workspace_ptr, slot, samples, out_pixels, out_channels, row_M, col_N, ok_MN, SUM_OF, BLOCK_M, BLOCK_N
        )
    else:
        limit = tl.minimum(tl.maximum(width - chunk * (SPAN * group_in), 0), SPAN * group_in)
        acc_MN = accumulate_forward(
            hidden_ptr + slot.to(tl.int64) * (in_h * in_w * hidden_channels) + chunk * (SPAN * group_in),
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
            hidden_channels,
            group_in,
            group_out,
            limit,
            split,
            PARTS,
            KERNEL,
            KERNEL,
            STRIDE,
            STRIDE,
            KERNEL // 2,
            KERNEL // 2,
            1,
            1,
            SPAN,
            GRANULE,
            False,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    if PARTS > 1:
        part_MN = part_offset(split, slot, samples, out_pixels, out_channels, row_M, col_N)
        tl.store(workspace_ptr + part_MN, acc_MN, mask=ok_MN)
        return

    scale_N = tl.load(scale_ptr + level * out_channels + col_N, mask=col_ok_N, other=0.0)
    shift_N = tl.load(shift_ptr + level * out_channels + col_N, mask=col_ok_N, other=0.0)
    same_MN = shortcut(x_ptr, row_M, col_N, ok_MN, out_w, x_h, x_w, x_channels, POOL).to(tl.float32)
    acc_MN = same_MN + (acc_MN * scale_N[None, :] + shift_N[None, :])
    if RELU:
        acc_MN = relu(acc_MN)
    out = acc_MN.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place_MN, out, mask=ok_MN)
    if ACTIVATES:
        hand_on(
            out, activated_ptr + place_MN, reader_level_ptr, reader_widths_ptr, reader_norm_ptr, sample, samples,
            readers, out_channels, col_N, col_ok_N, ok_MN, READER_LEVELS,
        )  # fmt: skip

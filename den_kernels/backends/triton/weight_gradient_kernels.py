"""The kernels of the weight's and the bias's gradient: members of each tile, products in parts, their sum. See
`weight_gradient.py`.

Shape suffixes: M output channels of the tile, N its input channels, K the pixels of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from den_kernels.backends.triton.implicit_gemm import clamp_width


@triton.jit(
    do_not_specialize=["samples", "tiles_m", "tiles_n"],
    do_not_specialize_on_alignment=["in_width_ptr", "out_width_ptr"],
)
def members_kernel(
    in_width_ptr,  # [N] or None
    out_width_ptr,  # [N] or None
    count_ptr,  # [tiles, 2] int32: members, and members whose width ends inside a vector
    record_ptr,  # [tiles, N] int64: the members in batch order, see `unpack`
    samples,
    in_channels,
    out_channels,
    chunk_in,  # channels of a chunk
    chunk_out,
    tiles_m,
    tiles_n,
    GRANULE_IN: tl.constexpr,
    GRANULE_OUT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    tile_n = tile % tiles_n
    tile_m = (tile // tiles_n) % tiles_m
    chunk = tile // (tiles_n * tiles_m)
    first_out = chunk * chunk_out + tile_m * TILE_M
    first_in = chunk * chunk_in + tile_n * TILE_N
    most_out = tl.minimum(chunk_out - tile_m * TILE_M, TILE_M)
    most_in = tl.minimum(chunk_in - tile_n * TILE_N, TILE_N)
    n = tl.arange(0, BLOCK_ROWS)
    members = 0
    uneven = 0
    for start in range(0, samples, BLOCK_ROWS):
        sample_N = start + n
        exists_N = sample_N < samples
        out_N = tl.zeros((BLOCK_ROWS,), tl.int32) + out_channels
        in_N = tl.zeros((BLOCK_ROWS,), tl.int32) + in_channels
        if out_width_ptr is not None:
            out_N = clamp_width(tl.load(out_width_ptr + sample_N, mask=exists_N, other=0), out_channels)
        if in_width_ptr is not None:
            in_N = clamp_width(tl.load(in_width_ptr + sample_N, mask=exists_N, other=0), in_channels)
        out_N = tl.minimum(out_N - first_out, most_out)
        in_N = tl.minimum(in_N - first_in, most_in)
        runs_N = (exists_N & (out_N > 0) & (in_N > 0)).to(tl.int32)
        place_N = members + tl.cumsum(runs_N, axis=0) - 1
        record_N = (sample_N.to(tl.int64) << 32) | (out_N << 16) | in_N
        tl.store(record_ptr + tile.to(tl.int64) * samples + place_N, record_N, mask=runs_N > 0)
        ends_N = (out_N % GRANULE_OUT != 0) | (in_N % GRANULE_IN != 0)
        members += tl.sum(runs_N, axis=0)
        uneven += tl.sum(runs_N * ends_N.to(tl.int32), axis=0)
    tl.store(count_ptr + tile * 2, members)
    tl.store(count_ptr + tile * 2 + 1, uneven)


@triton.jit
def channel_limit(width_ptr, sample, first, channels):
    """How many channels from `first` on a sample runs; all where there are no widths."""
    limit = sample * 0 + (channels - first)
    if width_ptr is not None:
        limit = clamp_width(tl.load(width_ptr + sample), channels) - first
    return limit


@triton.jit
def unpack(record):
    """Which sample a member is, and how many channels of the tile it runs: of the output, and of the input.

    One load tells all three. A record of 0 runs none.
    """
    return record.to(tl.uint64) >> 32, ((record >> 16) & 0xFFFF).to(tl.int32), (record & 0xFFFF).to(tl.int32)


@triton.jit
def load_bound(limit, GRANULE: tl.constexpr, EXACT: tl.constexpr):
    """Channels to load: up to the limit, in whole vectors. Where it is of whole vectors already (not EXACT), this only
    says so to the compiler.
    """
    if EXACT:
        limit += GRANULE - 1
    return (limit // GRANULE) * GRANULE


@triton.jit
def places(
    pixel_K,
    m,
    n,
    in_h,
    in_w,
    in_channels,
    out_w,
    out_pixels,
    out_channels,
    shift_h,
    shift_w,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Of output pixels: whether their source is inside the map; their gradients' and sources' elements in a sample."""
    if PACKED:
        # Exact, because the pixel times the width is below 2^16: only small maps are packed.
        y_K = (pixel_K * ((65535 + out_w) // out_w)) >> 16
    else:
        y_K = (pixel_K.to(tl.uint32) // tl.cast(out_w, tl.uint32)).to(tl.int32)
    source_y_K = y_K * STRIDE_H + shift_h
    source_x_K = (pixel_K - y_K * out_w) * STRIDE_W + shift_w
    inside_K = (y_K < out_pixels // out_w) & (source_y_K.to(tl.uint32) < in_h) & (source_x_K.to(tl.uint32) < in_w)
    grad_KM = (pixel_K * out_channels)[:, None] + m[None, :]
    x_KN = ((source_y_K * in_w + source_x_K) * in_channels)[:, None] + n[None, :]
    return inside_K, grad_KM, x_KN


@triton.jit
def products(
    grad_ptr,  # first channel of the tile
    x_ptr,
    record_ptr,  # of the tile
    in_channels,
    out_channels,
    in_h,
    in_w,
    out_w,
    out_pixels,
    shift_h,  # source pixel of the tap at output pixel (0, 0)
    shift_w,
    begin,
    end,
    members,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    GRANULE_IN: tl.constexpr,
    GRANULE_OUT: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc[M, N] of steps [begin, end). A step is BLOCK_K pixels of one sample, or (PACKED) of all members in a row.

    Steps of one sample each go through the members, then to the next pixels: what follows from the pixels alone is
    worked out once for all members. A step's record is loaded by the step before it: a load that another load waits for
    would take a stage of the pipeline.
    """
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if PACKED:
        row_K = begin * BLOCK_K + k
        slot = row_K // out_pixels
        pixel_K = row_K - slot * out_pixels
        skip_slots = BLOCK_K // out_pixels
        skip_pixels = BLOCK_K - skip_slots * out_pixels
    else:
        block = begin // tl.maximum(members, 1)
        slot = begin - block * members
        first = block * BLOCK_K
        pixel_K = first + k
        inside_K, grad_KM, x_KN = places(
            pixel_K, m, n, in_h, in_w, in_channels, out_w, out_pixels, out_channels, shift_h, shift_w, STRIDE_H,
            STRIDE_W, PACKED,
        )  # fmt: skip
    # Without a sign, the product of these with a sample is one instruction.
    grad_size = tl.cast(out_pixels * out_channels, tl.uint32)
    x_size = tl.cast(in_h * in_w * in_channels, tl.uint32)
    record = tl.load(record_ptr + slot, mask=slot < members, other=0)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(begin, end):
        if PACKED:
            inside_K, grad_KM, x_KN = places(
                pixel_K, m, n, in_h, in_w, in_channels, out_w, out_pixels, out_channels, shift_h, shift_w, STRIDE_H,
                STRIDE_W, PACKED,
            )  # fmt: skip
        elif slot == members:
            slot = 0
            first += BLOCK_K
            pixel_K = first + k
            inside_K, grad_KM, x_KN = places(
                pixel_K, m, n, in_h, in_w, in_channels, out_w, out_pixels, out_channels, shift_h, shift_w, STRIDE_H,
                STRIDE_W, PACKED,
            )  # fmt: skip
        sample, out_limit, in_limit = unpack(record)
        if PACKED:
            sample, out_limit, in_limit = sample[:, None], out_limit[:, None], in_limit[:, None]
            pixel_K += skip_pixels
            wraps_K = pixel_K >= out_pixels
            pixel_K = tl.where(wraps_K, pixel_K - out_pixels, pixel_K)
            slot += skip_slots + wraps_K.to(tl.int32)
            record = tl.load(record_ptr + slot, mask=slot < members, other=0)
        else:
            slot += 1
            record = tl.load(record_ptr + tl.where(slot == members, 0, slot))
        # A pixel that meets padding adds nothing: neither of its operands is loaded. The addresses are transposed, not
        # what was loaded: for mma.sync that would go through the registers.
        out_ok_KM = inside_K[:, None] & (m[None, :] < load_bound(out_limit, GRANULE_OUT, EXACT))
        in_ok_KN = inside_K[:, None] & (n[None, :] < load_bound(in_limit, GRANULE_IN, EXACT))
        values_KN = tl.load(x_ptr + sample * x_size + x_KN, mask=in_ok_KN, other=0.0)
        grad_source_KM = grad_ptr + sample * grad_size + grad_KM
        grad_MK = tl.load(tl.trans(grad_source_KM), mask=tl.trans(out_ok_KM), other=0.0)
        if EXACT:
            grad_MK = tl.where(tl.trans(m[None, :] < out_limit), grad_MK, 0.0)
            values_KN = tl.where(n[None, :] < in_limit, values_KN, 0.0)
        acc_MN = tl.dot(grad_MK, values_KN, acc_MN, input_precision=PRECISION)
    return acc_MN


@triton.jit(
    do_not_specialize=["samples", "tiles_m", "tiles_n", "splits"],
    do_not_specialize_on_alignment=["record_ptr"],
)
def weight_gradient_kernel(
    grad_ptr,  # [N, out_h, out_w, O]
    x_ptr,  # [N, in_h, in_w, C]
    count_ptr,
    record_ptr,
    workspace_ptr,  # [splits, O, KERNEL_H, KERNEL_W, group_in] float32
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
    splits,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SPAN: tl.constexpr,
    GRANULE_IN: tl.constexpr,
    GRANULE_OUT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles vary fastest, the split slowest: programs that run together read the same samples, from L2.
    pid = tl.program_id(0)
    tap = pid % (KERNEL_H * KERNEL_W)
    tile_n = (pid // (KERNEL_H * KERNEL_W)) % tiles_n
    tile_m = (pid // (KERNEL_H * KERNEL_W * tiles_n)) % tiles_m
    rest = pid // (KERNEL_H * KERNEL_W * tiles_n * tiles_m)
    chunks = out_channels // (SPAN * group_out)
    chunk = rest % chunks
    split = rest // chunks
    tile = (chunk * tiles_m + tile_m) * tiles_n + tile_n

    members = tl.load(count_ptr + tile * 2)
    uneven = tl.load(count_ptr + tile * 2 + 1)
    if PACKED:
        steps = (members * out_pixels + BLOCK_K - 1) // BLOCK_K
    else:
        steps = members * ((out_pixels + BLOCK_K - 1) // BLOCK_K)
    share = (steps + splits - 1) // splits
    begin = split * share
    end = tl.minimum(begin + share, steps)

    chunk_out = SPAN * group_out
    chunk_in = SPAN * group_in
    shift_h = (tap // KERNEL_W) * DILATION_H - PAD_H
    shift_w = (tap % KERNEL_W) * DILATION_W - PAD_W
    grad_ptr += chunk * chunk_out + tile_m * BLOCK_M
    x_ptr += chunk * chunk_in + tile_n * BLOCK_N
    record_ptr += tile.to(tl.int64) * samples
    if uneven > 0:
        acc_MN = products(
            grad_ptr, x_ptr, record_ptr, in_channels, out_channels, in_h, in_w, out_w, out_pixels, shift_h, shift_w,
            begin, end, members, STRIDE_H, STRIDE_W, GRANULE_IN, GRANULE_OUT, PACKED, True, PRECISION, BLOCK_M,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        acc_MN = products(
            grad_ptr, x_ptr, record_ptr, in_channels, out_channels, in_h, in_w, out_w, out_pixels, shift_h, shift_w,
            begin, end, members, STRIDE_H, STRIDE_W, GRANULE_IN, GRANULE_OUT, PACKED, False, PRECISION, BLOCK_M,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip

    local_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    local_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    own_MN = local_N[None, :] - ((local_M // group_out) * group_in)[:, None]  # the diagonal blocks of a span
    if SPAN == 1:
        own_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.int32) + local_N[None, :]
    filter_M = (chunk * chunk_out + local_M) * (KERNEL_H * KERNEL_W * group_in) + tap * group_in
    ok_MN = (local_M < chunk_out)[:, None] & (own_MN >= 0) & (own_MN < group_in)
    part = split.to(tl.int64) * (out_channels * (KERNEL_H * KERNEL_W) * group_in)
    tl.store(workspace_ptr + part + filter_M[:, None] + own_MN, acc_MN, mask=ok_MN)


@triton.jit(do_not_specialize=["elements", "splits"])
def sum_kernel(
    workspace_ptr,  # [splits, elements] float32
    out_ptr,  # [elements]
    elements,
    splits,
    BLOCK_ROWS: tl.constexpr,
):
    """The parts added in their order."""
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok = place < elements
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for _ in range(splits):
        total += tl.load(workspace_ptr + place, mask=ok, other=0.0)
        workspace_ptr += elements
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["samples", "share"], do_not_specialize_on_alignment=["out_width_ptr"])
def bias_gradient_kernel(
    grad_ptr,  # [N, pixels, O]
    out_width_ptr,  # [N] or None
    workspace_ptr,  # [splits, O] float32
    samples,
    share,  # samples a split
    out_channels,
    pixels,
    tiles,
    GRANULE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    pid = tl.program_id(0)
    split = pid // tiles
    channel = (pid % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    grad_ptr += (split * share).to(tl.int64) * (pixels * out_channels)
    for sample in range(split * share, tl.minimum((split + 1) * share, samples)):
        limit = channel_limit(out_width_ptr, sample, 0, out_channels)
        if (pid % tiles) * BLOCK_CHANNELS < limit:
            bound = ((limit + GRANULE - 1) // GRANULE) * GRANULE
            for start in range(0, pixels, BLOCK_ROWS):
                pixel = start + row
                values = tl.load(
                    grad_ptr + (pixel * out_channels)[:, None] + channel[None, :],
                    mask=(pixel < pixels)[:, None] & ((channel < bound) & (channel < out_channels))[None, :],
                    other=0.0,
                )
                values = tl.where((channel < limit)[None, :], values.to(tl.float32), 0.0)
                total += tl.sum(values, axis=0)
        grad_ptr += pixels * out_channels
    tl.store(workspace_ptr + split * out_channels + channel, total, mask=channel < out_channels)

"""The kernels of batch norm over the samples that ran each channel: sums, statistics, what follows. See `norm.py`.

N samples, C channels, P pixels, R rows of statistics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from den_kernels.backends.triton.implicit_gemm import clamp_width, relu

_UNALIGNED = ["row_ptr", "width_ptr"]


@triton.jit
def sample_limit(width_ptr, sample, channels):
    limit = channels
    if width_ptr is not None:
        limit = clamp_width(tl.load(width_ptr + sample), channels)
    return limit


@triton.jit
def load_active(ptr, pixel_P, channel_C, limit, pixels, channels, GRANULE: tl.constexpr):
    """Values [P, C] in float32, 0 beyond the limit; loaded in whole vectors, which may hold more."""
    bound = ((limit + GRANULE - 1) // GRANULE) * GRANULE
    ok_PC = (pixel_P < pixels)[:, None] & ((channel_C < bound) & (channel_C < channels))[None, :]
    values_PC = tl.load(ptr + (pixel_P * channels)[:, None] + channel_C[None, :], mask=ok_PC, other=0.0)
    return tl.where((channel_C < limit)[None, :], values_PC.to(tl.float32), 0.0)


@triton.jit
def table_row(ptr, row, channel_C, channels, DEFAULT: tl.constexpr):
    """One row [C] of a table [R, C], in float32; DEFAULT where there is no table."""
    values_C = tl.zeros(channel_C.shape, tl.float32) + DEFAULT
    if ptr is not None:
        values_C = tl.load(ptr + row * channels + channel_C, mask=channel_C < channels, other=0.0).to(tl.float32)
    return values_C


@triton.jit
def sample_row(row_ptr, sample, rows):
    row = 0
    if row_ptr is not None:
        row = tl.minimum(tl.maximum(tl.load(row_ptr + sample), 0), rows - 1).to(tl.int32)
    return row


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=_UNALIGNED)
def moments_kernel(
    x_ptr,  # [N, P, C]
    width_ptr,  # [N] or None
    mean_ptr,  # [N, C] float32: of each sample
    square_ptr,  # [N, C] float32: sum of squares about that mean
    pixels,
    channels,
    tiles,
    GRANULE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Chan's update, a tile of pixels at a time: one read, and no cancellation."""
    sample = tl.program_id(0) // tiles
    channel_C = (tl.program_id(0) % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    limit = sample_limit(width_ptr, sample, channels)
    if (tl.program_id(0) % tiles) * BLOCK_CHANNELS >= limit:
        return
    x_ptr += sample.to(tl.int64) * (pixels * channels)
    mean_C = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    square_C = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for start in tl.range(0, pixels, BLOCK_ROWS, num_stages=3):  # without a dot, pipelined only if told
        pixel_P = start + tl.arange(0, BLOCK_ROWS)
        x_PC = load_active(x_ptr, pixel_P, channel_C, limit, pixels, channels, GRANULE)
        here = tl.minimum(pixels - start, BLOCK_ROWS).to(tl.float32)
        mine_C = tl.sum(x_PC, axis=0) / here
        centred_PC = tl.where((pixel_P < pixels)[:, None], x_PC - mine_C[None, :], 0.0)
        share = here / (start + here)
        delta_C = mine_C - mean_C
        square_C += tl.sum(centred_PC * centred_PC, axis=0) + delta_C * delta_C * (share * start)
        mean_C += delta_C * share
    place = sample.to(tl.int64) * channels + channel_C
    tl.store(mean_ptr + place, mean_C, mask=channel_C < limit)
    tl.store(square_ptr + place, square_C, mask=channel_C < limit)


@triton.jit
def members(row_ptr, width_ptr, n_N, samples, row, rows, channel_C, channels):
    """Which of these samples [N] ran which channels [C] in this row."""
    exists_N = n_N < samples
    if row_ptr is not None:
        row_N = tl.load(row_ptr + n_N, mask=exists_N, other=0)
        exists_N = exists_N & (tl.minimum(tl.maximum(row_N, 0), rows - 1) == row)
    width_N = tl.zeros(n_N.shape, tl.int32) + channels
    if width_ptr is not None:
        width_N = clamp_width(tl.load(width_ptr + n_N, mask=exists_N, other=0), channels)
    return exists_N[:, None] & (channel_C[None, :] < width_N[:, None])


@triton.jit(do_not_specialize=["samples", "tiles"], do_not_specialize_on_alignment=_UNALIGNED)
def statistics_kernel(
    row_ptr,
    width_ptr,
    sample_mean_ptr,
    sample_square_ptr,
    mean_ptr,  # [R, C] float32
    var_ptr,  # biased
    count_ptr,  # of samples
    samples,
    rows,
    pixels,
    channels,
    tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) // tiles
    channel_C = (tl.program_id(0) % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    count_C = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    mean_C = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    square_C = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for start in range(0, samples, BLOCK_ROWS):
        n_N = start + tl.arange(0, BLOCK_ROWS)
        ran_NC = members(row_ptr, width_ptr, n_N, samples, row, rows, channel_C, channels)
        place_NC = (n_N * channels)[:, None] + channel_C[None, :]
        count_C += tl.sum(ran_NC.to(tl.float32), axis=0)
        mean_C += tl.sum(tl.load(sample_mean_ptr + place_NC, mask=ran_NC, other=0.0), axis=0)
    mean_C = mean_C / tl.maximum(count_C, 1.0)
    for start in range(0, samples, BLOCK_ROWS):
        n_N = start + tl.arange(0, BLOCK_ROWS)
        ran_NC = members(row_ptr, width_ptr, n_N, samples, row, rows, channel_C, channels)
        place_NC = (n_N * channels)[:, None] + channel_C[None, :]
        apart_NC = tl.load(sample_mean_ptr + place_NC, mask=ran_NC, other=0.0) - mean_C[None, :]
        inside_NC = tl.load(sample_square_ptr + place_NC, mask=ran_NC, other=0.0)
        square_C += tl.sum(tl.where(ran_NC, inside_NC + apart_NC * apart_NC * pixels, 0.0), axis=0)
    place_C = row * channels + channel_C
    tl.store(mean_ptr + place_C, mean_C, mask=channel_C < channels)
    tl.store(var_ptr + place_C, square_C / tl.maximum(count_C * pixels, 1.0), mask=channel_C < channels)
    tl.store(count_ptr + place_C, count_C, mask=channel_C < channels)


@triton.jit(do_not_specialize=["tiles_p", "tiles"], do_not_specialize_on_alignment=_UNALIGNED)
def normalise_kernel(
    x_ptr,
    row_ptr,
    width_ptr,
    weight_ptr,  # [R, C] or None
    bias_ptr,
    mean_ptr,
    var_ptr,
    y_ptr,  # [N, P, C]
    rows,
    pixels,
    channels,
    tiles_p,
    tiles,
    eps,
    RELU: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = pid // (tiles * tiles_p)
    channel_C = (pid % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pixel_P = ((pid // tiles) % tiles_p) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok_PC = (pixel_P < pixels)[:, None] & (channel_C < channels)[None, :]
    start = sample.to(tl.int64) * (pixels * channels)
    y_PC = y_ptr + start + (pixel_P * channels)[:, None] + channel_C[None, :]
    limit = sample_limit(width_ptr, sample, channels)
    if (pid % tiles) * BLOCK_CHANNELS >= limit:
        tl.store(y_PC, tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), y_ptr.dtype.element_ty), mask=ok_PC)
        return
    row = sample_row(row_ptr, sample, rows)
    mean_C = table_row(mean_ptr, row, channel_C, channels, 0.0)
    scale_C = tl.rsqrt(table_row(var_ptr, row, channel_C, channels, 0.0) + eps)
    scale_C *= table_row(weight_ptr, row, channel_C, channels, 1.0)
    bias_C = table_row(bias_ptr, row, channel_C, channels, 0.0)
    x_PC = load_active(x_ptr + start, pixel_P, channel_C, limit, pixels, channels, GRANULE)
    values_PC = (x_PC - mean_C[None, :]) * scale_C[None, :] + bias_C[None, :]
    if RELU:
        values_PC = relu(values_PC)
    values_PC = tl.where((channel_C < limit)[None, :], values_PC, 0.0)
    tl.store(y_PC, values_PC.to(y_ptr.dtype.element_ty), mask=ok_PC)


@triton.jit
def masked_gradient(
    grad_ptr, x_ptr, pixel_P, channel_C, limit, pixels, channels, mean_C, scale_C, bias_C,
    RELU: tl.constexpr, GRANULE: tl.constexpr,
):  # fmt: skip
    """The gradient behind the ReLU, and x less its mean; [P, C] each, 0 beyond the limit and the pixels."""
    grad_PC = load_active(grad_ptr, pixel_P, channel_C, limit, pixels, channels, GRANULE)
    x_PC = load_active(x_ptr, pixel_P, channel_C, limit, pixels, channels, GRANULE)
    centred_PC = x_PC - mean_C[None, :]
    centred_PC = tl.where((pixel_P < pixels)[:, None] & (channel_C < limit)[None, :], centred_PC, 0.0)
    if RELU:
        grad_PC = tl.where(centred_PC * scale_C[None, :] + bias_C[None, :] <= 0, 0.0, grad_PC)
    return grad_PC, centred_PC


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=_UNALIGNED)
def gradient_sums_kernel(
    grad_ptr,  # [N, P, C]
    x_ptr,
    row_ptr,
    width_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    sum_ptr,  # [N, C] float32: of the gradient, for each sample
    product_ptr,  # [N, C] float32: of the gradient times x less its mean
    rows,
    pixels,
    channels,
    tiles,
    eps,
    RELU: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    sample = tl.program_id(0) // tiles
    channel_C = (tl.program_id(0) % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    limit = sample_limit(width_ptr, sample, channels)
    if (tl.program_id(0) % tiles) * BLOCK_CHANNELS >= limit:
        return
    row = sample_row(row_ptr, sample, rows)
    mean_C = table_row(mean_ptr, row, channel_C, channels, 0.0)
    scale_C = tl.rsqrt(table_row(var_ptr, row, channel_C, channels, 0.0) + eps)
    scale_C *= table_row(weight_ptr, row, channel_C, channels, 1.0)
    bias_C = table_row(bias_ptr, row, channel_C, channels, 0.0)
    offset = sample.to(tl.int64) * (pixels * channels)
    sum_C = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    product_C = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for start in tl.range(0, pixels, BLOCK_ROWS, num_stages=3):  # without a dot, pipelined only if told
        grad_PC, centred_PC = masked_gradient(
            grad_ptr + offset, x_ptr + offset, start + tl.arange(0, BLOCK_ROWS), channel_C, limit, pixels, channels,
            mean_C, scale_C, bias_C, RELU, GRANULE,
        )  # fmt: skip
        sum_C += tl.sum(grad_PC, axis=0)
        product_C += tl.sum(grad_PC * centred_PC, axis=0)
    place = sample.to(tl.int64) * channels + channel_C
    tl.store(sum_ptr + place, sum_C, mask=channel_C < limit)
    tl.store(product_ptr + place, product_C, mask=channel_C < limit)


@triton.jit(do_not_specialize=["samples", "tiles"], do_not_specialize_on_alignment=_UNALIGNED)
def parameter_gradients_kernel(
    row_ptr,
    width_ptr,
    sum_ptr,
    product_ptr,
    var_ptr,
    dweight_ptr,  # [R, C] float32
    dbias_ptr,
    samples,
    rows,
    channels,
    tiles,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) // tiles
    channel_C = (tl.program_id(0) % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    sum_C = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    product_C = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for start in range(0, samples, BLOCK_ROWS):
        n_N = start + tl.arange(0, BLOCK_ROWS)
        ran_NC = members(row_ptr, width_ptr, n_N, samples, row, rows, channel_C, channels)
        place_NC = (n_N * channels)[:, None] + channel_C[None, :]
        sum_C += tl.sum(tl.load(sum_ptr + place_NC, mask=ran_NC, other=0.0), axis=0)
        product_C += tl.sum(tl.load(product_ptr + place_NC, mask=ran_NC, other=0.0), axis=0)
    place_C = row * channels + channel_C
    ok_C = channel_C < channels
    rstd_C = tl.rsqrt(tl.load(var_ptr + place_C, mask=ok_C, other=0.0) + eps)
    tl.store(dweight_ptr + place_C, product_C * rstd_C, mask=ok_C)
    tl.store(dbias_ptr + place_C, sum_C, mask=ok_C)


@triton.jit(do_not_specialize=["tiles_p", "tiles"], do_not_specialize_on_alignment=_UNALIGNED)
def input_gradient_kernel(
    grad_ptr,
    x_ptr,
    row_ptr,
    width_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    count_ptr,
    dweight_ptr,
    dbias_ptr,
    dx_ptr,  # [N, P, C]
    rows,
    pixels,
    channels,
    tiles_p,
    tiles,
    eps,
    RELU: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = pid // (tiles * tiles_p)
    channel_C = (pid % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pixel_P = ((pid // tiles) % tiles_p) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok_PC = (pixel_P < pixels)[:, None] & (channel_C < channels)[None, :]
    start = sample.to(tl.int64) * (pixels * channels)
    dx_PC = dx_ptr + start + (pixel_P * channels)[:, None] + channel_C[None, :]
    limit = sample_limit(width_ptr, sample, channels)
    if (pid % tiles) * BLOCK_CHANNELS >= limit:
        tl.store(dx_PC, tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dx_ptr.dtype.element_ty), mask=ok_PC)
        return
    row = sample_row(row_ptr, sample, rows)
    mean_C = table_row(mean_ptr, row, channel_C, channels, 0.0)
    rstd_C = tl.rsqrt(table_row(var_ptr, row, channel_C, channels, 0.0) + eps)
    scale_C = rstd_C * table_row(weight_ptr, row, channel_C, channels, 1.0)
    bias_C = table_row(bias_ptr, row, channel_C, channels, 0.0)
    elements_C = tl.maximum(table_row(count_ptr, row, channel_C, channels, 0.0) * pixels, 1.0)
    along_C = table_row(dweight_ptr, row, channel_C, channels, 0.0) * rstd_C / elements_C
    constant_C = table_row(dbias_ptr, row, channel_C, channels, 0.0) / elements_C
    grad_PC, centred_PC = masked_gradient(
        grad_ptr + start, x_ptr + start, pixel_P, channel_C, limit, pixels, channels, mean_C, scale_C, bias_C, RELU,
        GRANULE,
    )  # fmt: skip
    values_PC = (grad_PC - centred_PC * along_C[None, :] - constant_C[None, :]) * scale_C[None, :]
    values_PC = tl.where((channel_C < limit)[None, :], values_PC, 0.0)
    tl.store(dx_PC, values_PC.to(dx_ptr.dtype.element_ty), mask=ok_PC)

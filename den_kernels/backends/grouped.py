"""The portable backend: samples sorted by width, each group convolved with sliced weights in plain PyTorch.

Runs on any device and dtype, forward and backward. Samples of one width go in chunks of a fixed size, the last one
filled up. The size comes from the batch size alone, so that PyTorch's library sees the same shapes whatever the levels
are: it builds its primitives once, and a sample's result cannot depend on how many batch mates share its width.

Reading the widths on the host makes this backend wait for a GPU; the `triton` backend does not.

N samples, C channels, H W space.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from den_kernels import reference
from den_kernels.backends.checks import check_widths
from den_kernels.block import at_levels, unmoved
from den_kernels.chain import alone, one_by_one

NAME = "grouped"
TILE_BOUNDS = ()
ENDS_IN_CHAIN = False
CHUNKS_PER_BATCH = 8


def unavailable() -> str | None:
    """Always None: it is plain PyTorch."""
    return None


def rejects(device: torch.device, dtype: torch.dtype) -> str | None:
    """Always None: any device, any floating dtype."""
    return None


class _Chunk(NamedTuple):
    """Rows of the sorted batch of equal widths, and the channels and groups that their convolution runs."""

    rows: slice
    inputs: int
    outputs: int
    write: int
    groups: int


class _Schedule(NamedTuple):
    """The batch sorted by width, in whole chunks.

    source [P]: the sample in each row of the sorted batch; padding [Q]: the rows that only fill up a chunk (they hold
    one of its samples once more). row [N]: where each sample's result is; P, a row of zeros, for one that makes none.
    """

    chunks: list[_Chunk]
    source: Tensor
    padding: Tensor
    row: Tensor


def _schedule(x: Tensor, weight: Tensor, in_width: Tensor | None, out_width: Tensor | None, groups: int) -> _Schedule:
    n, channels, outputs = x.shape[0], x.shape[1], weight.shape[0]
    reads = [channels] * n if in_width is None else in_width.tolist()
    writes = [outputs] * n if out_width is None else out_width.tolist()
    check_widths("in_width", reads, channels, groups)
    check_widths("out_width", writes, outputs, groups)
    size = -(-n // CHUNKS_PER_BATCH)
    alike: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(zip(reads, writes, strict=True)):
        alike.setdefault(key, []).append(i)
    chunks: list[_Chunk] = []
    source: list[int] = []
    padding: list[int] = []
    row = [-1] * n
    for (read, write), samples in sorted(alike.items(), reverse=True):
        if write == 0:
            continue
        run = 1 if groups == 1 else min(read * groups // channels, write * groups // outputs)
        inputs = read if groups == 1 else run * (channels // groups)
        convolved = 0 if inputs == 0 else write if groups == 1 else run * (outputs // groups)
        for i in samples:
            row[i] = len(source)
            source.append(i)
        missing = -len(samples) % size
        padding.extend(range(len(source), len(source) + missing))
        source.extend(samples[:1] * missing)
        first = len(source) - len(samples) - missing
        for start in range(first, len(source), size):
            chunks.append(_Chunk(slice(start, start + size), inputs, convolved, write, max(run, 1)))
    row = [len(source) if r < 0 else r for r in row]
    return _Schedule(chunks, *(torch.tensor(v, dtype=torch.long, device=x.device) for v in (source, padding, row)))


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _zeros(rows: int, like: Tensor, shape: tuple[int, ...], layout: torch.memory_format) -> Tensor:
    return torch.zeros((rows, *shape), dtype=like.dtype, device=like.device).contiguous(memory_format=layout)


def _kernel(weight: Tensor, chunk: _Chunk, groups: int) -> Tensor:
    kernel = weight[: chunk.outputs, : chunk.inputs] if groups == 1 else weight[: chunk.outputs]
    return kernel.contiguous()


def conv2d(x, weight, bias, in_width, out_width, stride, padding, dilation, groups) -> Tensor:
    """The primitive: one library convolution a chunk of the sorted batch."""
    if in_width is None and out_width is None:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    size = tuple(
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    )
    layout = _layout(x)
    schedule = _schedule(x, weight, in_width, out_width, groups)
    x_sorted = x.index_select(0, schedule.source)
    out_sorted = _zeros(len(x_sorted) + 1, x, (weight.shape[0], *size), layout)
    for chunk in schedule.chunks:
        if chunk.outputs:
            shift = None if bias is None else bias[: chunk.outputs]
            part = x_sorted[chunk.rows, : chunk.inputs].contiguous(memory_format=layout)
            y = F.conv2d(part, _kernel(weight, chunk, groups), shift, stride, padding, dilation, chunk.groups)
            out_sorted[chunk.rows, : chunk.outputs] = y
        if bias is not None and chunk.outputs < chunk.write:
            out_sorted[chunk.rows, chunk.outputs : chunk.write] = bias[chunk.outputs : chunk.write].view(1, -1, 1, 1)
    return out_sorted.index_select(0, schedule.row)


def conv2d_backward(
    grad, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty where `output_mask` is False); what no sample ran is exactly 0."""
    layout = _layout(x)
    schedule = _schedule(x, weight, in_width, out_width, groups)
    x_sorted = x.index_select(0, schedule.source)
    # Rows that only fill up a chunk add nothing to the gradients of the weights.
    grad_sorted = grad.index_select(0, schedule.source).index_fill_(0, schedule.padding, 0)
    dx_sorted = _zeros(len(x_sorted) + 1, x, tuple(x.shape[1:]), layout) if output_mask[0] else x.new_empty(0)
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if output_mask[1] else x.new_empty(0)
    db = x.new_zeros(weight.shape[0]) if output_mask[2] else x.new_empty(0)
    for chunk in schedule.chunks:
        if output_mask[2]:
            db[: chunk.write] += grad_sorted[chunk.rows, : chunk.write].sum((0, 2, 3))
        if not chunk.outputs or not (output_mask[0] or output_mask[1]):
            continue
        dx_part, dw_part, _ = torch.ops.aten.convolution_backward(
            grad_sorted[chunk.rows, : chunk.outputs].contiguous(memory_format=layout),
            x_sorted[chunk.rows, : chunk.inputs].contiguous(memory_format=layout),
            _kernel(weight, chunk, groups),
            None,
            stride,
            padding,
            dilation,
            False,
            (0, 0),
            chunk.groups,
            (output_mask[0], output_mask[1], False),
        )
        if output_mask[0]:
            dx_sorted[chunk.rows, : chunk.inputs] = dx_part
        if output_mask[1]:
            (dw[: chunk.outputs, : chunk.inputs] if groups == 1 else dw[: chunk.outputs]).add_(dw_part)
    dx = dx_sorted.index_select(0, schedule.row) if output_mask[0] else dx_sorted
    return dx, dw, db


def pack_weights(weight: Tensor, stride: int, groups: int, winograd: bool, dense_input: bool = False) -> list[Tensor]:
    """Copies of the weights as they are, [O, I, kh, kw], for every batch."""
    return [weight.clone(memory_format=torch.contiguous_format)]


def fused_conv2d(
    x, out, level, order, in_widths, out_widths, weight, scale, shift, kernel_size, stride, groups, relu
) -> None:
    """The fused convolution's result from unfused parts: see `reference.fused_conv2d`."""
    read, made = at_levels(in_widths, level), at_levels(out_widths, level)
    padding = (kernel_size // 2, kernel_size // 2)
    y = conv2d(x, weight, None, read, made, (stride, stride), padding, (1, 1), groups)
    scale_NC, shift_NC = (table.index_select(0, level)[:, :, None, None] for table in (scale, shift))
    y = torch.addcmul(shift_NC, y.float(), scale_NC)
    out.copy_(F.relu(y) if relu else y)


def residual_block(
    x,
    out,
    level,
    order,
    count,
    widths,
    weight,
    scale,
    shift,
    pre_scale,
    pre_shift,
    kernel_size,
    stride,
    groups,
    projection,
    relu,
) -> None:
    """The fused block's result from unfused parts: see `reference.residual_block`."""
    width = widths.index_select(0, level)
    last = len(weight) - 1
    h = x
    if pre_scale is not None:
        h = F.relu(h * pre_scale.view(1, -1, 1, 1) + pre_shift.view(1, -1, 1, 1)).to(x.dtype)
    for i in range(last + 1):
        padding = (kernel_size[i] // 2, kernel_size[i] // 2)
        # A sample at width 0 is left out of every convolution by an output width of 0.
        out_width = width if i < last else torch.where(width > 0, scale[last].shape[1], 0)
        h = conv2d(
            h,
            weight[i],
            None,
            width if i > 0 else None,
            out_width,
            (stride[i], stride[i]),
            padding,
            (1, 1),
            groups[i],
        )
        h = h * scale[i][level][:, :, None, None] + shift[i][level][:, :, None, None]
        if i < last:
            h = F.relu(h).to(x.dtype)
    if projection:
        kernel, scale_LC, shift_LC = projection
        residual = F.conv2d(x, kernel, None, math.prod(stride))
        residual = (residual * scale_LC[level][:, :, None, None] + shift_LC[level][:, :, None, None]).to(x.dtype)
    else:
        residual = reference.shortcut(x, scale[last].shape[1], math.prod(stride))
    result = residual + h
    result = F.relu(result) if relu else result
    out.copy_(torch.where((width > 0).view(-1, 1, 1, 1), result, residual))


residual_chain = one_by_one(alone(residual_block), fused_conv2d)
gather = unmoved

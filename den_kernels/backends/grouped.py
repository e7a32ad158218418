"""The portable backend: samples gathered by width, each group convolved with sliced weights in plain PyTorch.

Runs on any device and dtype, forward and backward. Samples of one width go in chunks of a fixed size, the last one
padded with zero samples. The size comes from the batch size alone, so that PyTorch's library sees the same shapes
whatever the levels are: it builds its primitives once, and a sample's result cannot depend on how many batch mates
share its width.

Reading the widths on the host makes this backend wait for a GPU; the `triton` backend does not.

N samples, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from den_kernels import reference
from den_kernels.backends.checks import check_widths

NAME = "grouped"
CHUNKS_PER_BATCH = 16


def unavailable() -> str | None:
    """Always None: it is plain PyTorch."""
    return None


def rejects(device: torch.device, dtype: torch.dtype) -> str | None:
    """Always None: any device, any floating dtype."""
    return None


class _Chunk(NamedTuple):
    """Samples of equal widths, and the channels and groups that their convolution runs."""

    members: Tensor
    size: int
    inputs: int
    outputs: int
    write: int
    groups: int


def _chunks(
    x: Tensor, weight: Tensor, in_width: Tensor | None, out_width: Tensor | None, groups: int
) -> Iterator[_Chunk]:
    """Chunks of samples of equal (in_width, out_width), widest first; samples that produce nothing are left out."""
    n, channels, outputs = x.shape[0], x.shape[1], weight.shape[0]
    reads = [channels] * n if in_width is None else in_width.tolist()
    writes = [outputs] * n if out_width is None else out_width.tolist()
    check_widths("in_width", reads, channels, groups)
    check_widths("out_width", writes, outputs, groups)
    size = -(-n // CHUNKS_PER_BATCH)
    samples: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(zip(reads, writes, strict=True)):
        samples.setdefault(key, []).append(i)
    for (read, write), alike in sorted(samples.items(), reverse=True):
        if write == 0:
            continue
        if groups == 1:
            run, inputs, convolved = 1, read, write
        else:
            run = min(read * groups // channels, write * groups // outputs)
            inputs, convolved = run * (channels // groups), run * (outputs // groups)
        if inputs == 0:
            convolved = 0
        for start in range(0, len(alike), size):
            members = torch.tensor(alike[start : start + size], device=x.device)
            yield _Chunk(members, size, inputs, convolved, write, max(run, 1))


def _gather(x: Tensor, chunk: _Chunk, channels: int) -> Tensor:
    """The chunk's samples and first `channels`, with zero samples up to the chunk's fixed size."""
    part = x[:, :channels].index_select(0, chunk.members)
    missing = chunk.size - part.shape[0]
    part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else part
    # The layout must not depend on the levels either: a slice of channels_last is neither layout until it is copied.
    return part.contiguous(memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _kernel(weight: Tensor, chunk: _Chunk, groups: int) -> Tensor:
    kernel = weight[: chunk.outputs, : chunk.inputs] if groups == 1 else weight[: chunk.outputs]
    return kernel.contiguous()


def conv2d(x, weight, bias, in_width, out_width, stride, padding, dilation, groups) -> Tensor:
    """The primitive: one library convolution a chunk, scattered into a zeroed output."""
    if in_width is None and out_width is None:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    size = [
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    ]
    out = torch.zeros((x.shape[0], weight.shape[0], *size), dtype=x.dtype, device=x.device).to(memory_format=_layout(x))
    for chunk in _chunks(x, weight, in_width, out_width, groups):
        count = chunk.members.shape[0]
        if chunk.outputs:
            shift = None if bias is None else bias[: chunk.outputs]
            y = F.conv2d(
                _gather(x, chunk, chunk.inputs),
                _kernel(weight, chunk, groups),
                shift,
                stride,
                padding,
                dilation,
                chunk.groups,
            )
            out[:, : chunk.outputs].index_copy_(0, chunk.members, y[:count])
        if bias is not None and chunk.outputs < chunk.write:
            rest = bias[chunk.outputs : chunk.write].view(1, -1, 1, 1).expand(count, -1, *size)
            out[:, chunk.outputs : chunk.write].index_copy_(0, chunk.members, rest)
    return out


def conv2d_backward(
    grad, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty where `output_mask` is False); what no sample ran is exactly 0."""
    dx = torch.zeros_like(x) if output_mask[0] else x.new_empty(0)
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if output_mask[1] else x.new_empty(0)
    db = x.new_zeros(weight.shape[0]) if output_mask[2] else x.new_empty(0)
    for chunk in _chunks(x, weight, in_width, out_width, groups):
        count = chunk.members.shape[0]
        grad_c = _gather(grad, chunk, chunk.write)
        if output_mask[2]:
            db[: chunk.write] += grad_c.sum((0, 2, 3))
        if not chunk.outputs or not (output_mask[0] or output_mask[1]):
            continue
        dx_c, dw_c, _ = torch.ops.aten.convolution_backward(
            grad_c[:, : chunk.outputs].contiguous(memory_format=_layout(grad)),
            _gather(x, chunk, chunk.inputs),
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
            dx[:, : chunk.inputs].index_copy_(0, chunk.members, dx_c[:count])
        if output_mask[1]:
            part = dw[: chunk.outputs, : chunk.inputs] if groups == 1 else dw[: chunk.outputs]
            part += dw_c
    return dx, dw, db


def pack_weight(weight: Tensor, groups: int) -> Tensor:
    """The weights as they are, [O, I, kh, kw]."""
    return weight.contiguous()


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
    total_stride = 1
    for step in stride:
        total_stride *= step
    residual = reference.shortcut(x, scale[last].shape[1], total_stride)
    result = residual + h
    result = F.relu(result) if relu else result
    out.copy_(torch.where((width > 0).view(-1, 1, 1, 1), result, residual))

"""The specification, in plain PyTorch: one sample at a time, over sliced weights.

Slow on purpose and easy to read. Every backend is compared with this file in value and in gradient; where the two
differ, the backend is wrong. It runs on any device, in any floating dtype, and autograd differentiates it.

Suffixes: N samples, C channels, H W space, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IntPair = int | Sequence[int]


def den_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_width: Tensor | None = None,
    out_width: Tensor | None = None,
    *,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """Elastic convolution: sample n reads input channels `< in_width[n]`, produces output channels `< out_width[n]`.

    Shapes: x [N, C, H, W], weight [O, C / groups, kh, kw], bias [O]; widths integer [N], or None for full. With groups,
    widths are whole groups, and an active output group whose input group is inactive convolves zeros.
    Returns [N, O, H', W'] whose channels at and beyond `out_width[n]` are exactly 0.
    """
    stride, padding, dilation = (_pair(value) for value in (stride, padding, dilation))
    if x.shape[0] == 0 or (in_width is None and out_width is None):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    channels, outputs = x.shape[1], weight.shape[0]
    samples = []
    for n in range(x.shape[0]):
        read = channels if in_width is None else int(in_width[n])
        write = outputs if out_width is None else int(out_width[n])
        # With groups, output group g reads input group g alone: those active on both sides convolve.
        paired = 1 if groups == 1 else min(read * groups // channels, write * groups // outputs)
        inputs = read if groups == 1 else paired * (channels // groups)
        convolved = write if groups == 1 else paired * (outputs // groups)
        kernel = weight[:convolved, :inputs] if groups == 1 else weight[:convolved]
        if kernel.numel() == 0:
            size = [
                _output_size(x.shape[2 + d], weight.shape[2 + d], stride[d], padding[d], dilation[d]) for d in (0, 1)
            ]
            # Sums over nothing: zero, yet part of the graph, so that every gradient is zeros rather than missing.
            y = (x[n, :0].sum() + weight[:0].sum()).expand(1, convolved, *size)
        else:
            y = F.conv2d(x[n : n + 1, :inputs], kernel, None, stride, padding, dilation, paired)
        y = F.pad(y, (0, 0, 0, 0, 0, write - convolved))
        if bias is not None:
            y = y + bias[:write].view(1, -1, 1, 1)
        samples.append(F.pad(y, (0, 0, 0, 0, 0, outputs - write)))
    return torch.cat(samples)


def den_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_width: Tensor | None = None,
    out_width: Tensor | None = None,
) -> Tensor:
    """Elastic linear layer: row n reads input features `< in_width[n]`, produces output features `< out_width[n]`.

    Shapes: x [N, I], weight [O, I], bias [O]; widths integer [N], or None for full. Returns [N, O] whose features at
    and beyond `out_width[n]` are exactly 0.
    """
    rows = []
    for n in range(x.shape[0]):
        read = weight.shape[1] if in_width is None else int(in_width[n])
        write = weight.shape[0] if out_width is None else int(out_width[n])
        y = F.linear(x[n, :read], weight[:write, :read], None if bias is None else bias[:write])
        rows.append(F.pad(y, (0, weight.shape[0] - write)))
    return torch.stack(rows) if rows else F.linear(x, weight, bias)


def shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """The parameter-free shortcut: average pool by `stride`, then zero channels up to `channels`.

    x [N, C, H, W] -> [N, channels, ceil(H / stride), ceil(W / stride)]. A window cut by the border divides by the
    elements inside it. With stride 1 and equal channels it is x itself.
    """
    if stride > 1:
        x = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
    if channels > x.shape[1]:
        x = F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))
    return x


def fused_conv2d(
    x: Tensor,
    level: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    in_widths: Sequence[int] | None = None,
    out_widths: Sequence[int] | None = None,
    stride: int = 1,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """Inference of a convolution and the folded norm behind it, each sample at its own level.

    x [N, C, H, W]; level integer [N]; weight [O, I / groups, k, k] with k odd, padded by k // 2; scale, shift [L, O];
    in_widths, out_widths: of each level; None: all. What lies beyond an output width is 0.
    """
    levels = scale.shape[0]
    in_widths = [weight.shape[1] * groups] * levels if in_widths is None else list(in_widths)
    out_widths = [weight.shape[0]] * levels if out_widths is None else list(out_widths)
    read, made = (torch.tensor(widths, device=x.device)[level.long()] for widths in (in_widths, out_widths))
    padding = weight.shape[2] // 2
    y = den_conv2d(
        x, weight, in_width=read, out_width=made, stride=stride, padding=padding, groups=groups
    )  # fmt: skip
    y = y * scale[level.long(), :, None, None] + shift[level.long(), :, None, None]
    y = F.relu(y) if relu else y
    inside_NC = torch.arange(weight.shape[0], device=x.device) < made[:, None]
    return torch.where(inside_NC[:, :, None, None], y, 0).to(x.dtype)


def residual_block(
    x: Tensor,
    level: Tensor,
    widths: Sequence[int],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    *,
    pre_scale: Tensor | None = None,
    pre_shift: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    groups: Sequence[int] = (1, 1),
    projection: Sequence[Tensor] = (),
    relu: bool = False,
) -> Tensor:
    """Inference of a residual block, each sample at its own level.

    x [N, C, H, W]; level integer [N]; widths: the hidden width of each level, ascending; weight[i]: convolution i,
    [O_i, I_i / groups[i], k, k] with k odd, padded by k // 2; scale[i], shift[i]: [L, O_i], the folded norm behind it,
    a row a level; pre_scale, pre_shift: [C], the norm and ReLU before it (pre-activation). A ReLU follows every norm
    but the last. projection: the shortcut as a 1x1 convolution of the block's stride: its weight [O, C, 1, 1], and its
    folded norm's scale and shift [L, O]; nothing: the parameter-free `shortcut`.

    A sample whose width is 0 gets the shortcut and nothing else: no norm, no ReLU.
    """
    last = len(weight) - 1
    samples = []
    for n in range(x.shape[0]):
        row = int(level[n])
        width = int(widths[row])
        x_n = x[n : n + 1]
        if projection:
            kernel, scale_LC, shift_LC = projection
            out = F.conv2d(x_n, kernel, None, math.prod(stride))
            out = (out * scale_LC[row].view(1, -1, 1, 1) + shift_LC[row].view(1, -1, 1, 1)).to(x.dtype)
        else:
            out = shortcut(x_n, scale[last].shape[1], math.prod(stride))
        if width == 0:
            samples.append(out)
            continue
        h = x_n
        if pre_scale is not None and pre_shift is not None:
            h = F.relu(h * pre_scale.view(1, -1, 1, 1) + pre_shift.view(1, -1, 1, 1)).to(x.dtype)
        active = torch.tensor([width], device=x.device)
        for i in range(last + 1):
            kernel = weight[i]
            h = den_conv2d(
                h,
                kernel,
                in_width=active if i > 0 else None,
                out_width=active if i < last else None,
                stride=stride[i],
                padding=(kernel.shape[2] // 2, kernel.shape[3] // 2),
                groups=groups[i],
            )
            h = h * scale[i][row].view(1, -1, 1, 1) + shift[i][row].view(1, -1, 1, 1)
            if i < last:
                h = F.relu(h).to(x.dtype)
        out = (out + h).to(x.dtype)
        samples.append(F.relu(out) if relu else out)
    return torch.cat(samples) if samples else _empty_output(x, scale[last].shape[1], math.prod(stride))


def _empty_output(x: Tensor, channels: int, stride: int) -> Tensor:
    return x.new_empty((0, channels, -(-x.shape[2] // stride), -(-x.shape[3] // stride)))


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _pair(value: IntPair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])

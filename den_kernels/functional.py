"""The public functions: what they compute, what they check, and what they say when something is wrong.

N samples, C channels, H W space, L levels, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from den_kernels import ops as _ops  # noqa: F401  (registers torch.ops.den_kernels)
from den_kernels.backends import NAMES
from den_kernels.plan import LevelPlan

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
    backend: str = "auto",
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution in which every sample runs its own number of channels.

    Sample n reads only input channels `< in_width[n]` and produces only output channels `< out_width[n]`. Output
    channels beyond are exactly 0. Input channels beyond are not read: NaN there changes nothing. The work follows the
    widths, forward and backward, and a sample's result does not depend on its batch mates.

    Args:
        x: [N, C, H, W], floating point; channels_last is fastest.
        weight: [O, C / groups, kh, kw], of x's dtype (autocast casts both).
        bias: [O] or None.
        in_width, out_width: integer [N] on x's device, in [0, C] and [0, O]; None is full. With groups, whole groups.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        backend: "auto", or one of `available_backends()`.
        residual: [N, O, H', W'], added to the result; a sample whose `in_width` is 0 is its residual, bit for bit. Only
            without bias and out_width.

    Returns: [N, O, H', W'], laid out as x is. With both widths None it is `F.conv2d`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device. Width *values* are checked on a
            CPU; on a GPU, where that would wait for the device, they are clamped to their range instead.
        RuntimeError: the backend asked for cannot be used here.
    """
    _check_tensor("x", x)
    _check_tensor("weight", weight)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    stride_, padding_, dilation_ = (
        _pair("stride", stride, 1),
        _pair("padding", padding, 0),
        _pair("dilation", dilation, 1),
    )
    _check_conv(x, weight, bias, padding_, dilation_, groups)
    _check_width("in_width", in_width, x)
    _check_width("out_width", out_width, x)
    _check_backend(backend)
    if residual is not None:
        return _conv2d_add(
            x, weight, bias, residual, in_width, out_width, (stride_, padding_, dilation_, groups, backend)
        )
    if in_width is None and out_width is None:
        return torch.nn.functional.conv2d(x, weight, bias, stride_, padding_, dilation_, groups)
    return torch.ops.den_kernels.conv2d(
        x, weight, bias, in_width, out_width, stride_, padding_, dilation_, groups, backend
    )


def _conv2d_add(x, weight, bias, residual, in_width, out_width, geometry) -> Tensor:
    if bias is not None or out_width is not None:
        raise ValueError("residual is given with bias or out_width; it stands behind a convolution without either")
    _check_tensor("residual", residual)
    stride, padding, dilation, *_ = geometry
    shape = [x.shape[0], weight.shape[0]]
    for d in (0, 1):
        reach = dilation[d] * (weight.shape[2 + d] - 1) + 1
        shape.append((x.shape[2 + d] + 2 * padding[d] - reach) // stride[d] + 1)
    if list(residual.shape) != shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be {tuple(shape)}, as the result")
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}, but x is on {x.device}; they must be together")
    if residual.dtype == x.dtype:
        return torch.ops.den_kernels.conv2d_add(x, weight, residual, in_width, *geometry)
    # Under autocast: the sum of a residual in float32 and a convolution in less is in float32.
    y = residual + torch.ops.den_kernels.conv2d(x, weight, None, in_width, None, *geometry)
    return y if in_width is None else torch.where((in_width > 0).view(-1, 1, 1, 1), y, residual)


def plan_levels(level: Tensor, num_levels: int) -> LevelPlan:
    """Order the samples of each block by level, once for a whole forward pass.

    Args:
        level: integer [N, B], in [0, num_levels).
        num_levels: L.

    Returns: a `LevelPlan` of int32 tensors on the device of `level`, made without waiting for it.

    Raises:
        TypeError, ValueError: level of another dtype or shape, or (with the C++ kernels) a value out of range.
    """
    _check_tensor("level", level, floating=False)
    if level.dim() != 2:
        raise ValueError(f"level has shape {tuple(level.shape)}; it must be [samples, blocks]")
    return LevelPlan(*torch.ops.den_kernels.plan(level, num_levels))


def _check_tensor(name: str, value: Any, floating: bool = True) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; it must be a torch.Tensor")
    if value.is_floating_point() != floating or value.dtype == torch.bool:
        kind = "floating-point" if floating else "integer"
        raise TypeError(f"{name} has dtype {value.dtype}; it must be {kind}")


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding, dilation, groups: int) -> None:
    if x.dim() != 4 or weight.dim() != 4:
        wrong, shape = ("x", x.shape) if x.dim() != 4 else ("weight", weight.shape)
        raise ValueError(f"{wrong} has shape {tuple(shape)}; it must have 4 dimensions")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {value.dtype}, but x has {x.dtype}; they must agree")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}; they must be together")
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups or weight.shape[0] % groups:
        raise ValueError(
            f"groups is {groups!r}; it must divide {x.shape[1]} input and {weight.shape[0]} output channels"
        )
    if weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: with groups={groups} it takes "
            f"{weight.shape[1] * groups} input channels, but x has {x.shape[1]}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    for d, axis in ((0, "height"), (1, "width")):
        if x.shape[2 + d] + 2 * padding[d] < dilation[d] * (weight.shape[2 + d] - 1) + 1:
            raise ValueError(
                f"x has {axis} {x.shape[2 + d]}: with padding {padding[d]} too small for a kernel of "
                f"{weight.shape[2 + d]} at dilation {dilation[d]}"
            )


def _check_width(name: str, width: Tensor | None, x: Tensor) -> None:
    if width is None:
        return
    _check_tensor(name, width, floating=False)
    if tuple(width.shape) != (x.shape[0],):
        raise ValueError(f"{name} has shape {tuple(width.shape)}; it must be ({x.shape[0]},), a width for each sample")
    if width.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {width.dtype}; it must be torch.int32 or torch.int64")
    if width.device != x.device:
        raise ValueError(f"{name} is on {width.device}, but x is on {x.device}; they must be together")


def _check_backend(backend: str) -> None:
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(map(repr, NAMES))}")


def _pair(name: str, value: IntPair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}, or a pair of them")
    return pair

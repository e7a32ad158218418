"""The specification as a backend: `den_kernels.reference`, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from den_kernels import reference
from den_kernels.block import unmoved
from den_kernels.chain import alone, one_by_one

NAME = "reference"
TILE_BOUNDS = ()
ENDS_IN_CHAIN = False


def unavailable() -> str | None:
    """Always None: it is plain PyTorch."""
    return None


def rejects(device: torch.device, dtype: torch.dtype) -> str | None:
    """Always None: any device, any floating dtype."""
    return None


def conv2d(x, weight, bias, in_width, out_width, stride, padding, dilation, groups) -> Tensor:
    """`reference.den_conv2d`."""
    return reference.den_conv2d(
        x, weight, bias, in_width, out_width, stride=stride, padding=padding, dilation=dilation, groups=groups
    )


def conv2d_backward(
    grad, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty where `output_mask` is False), by autograd over the per-sample loop."""
    with torch.enable_grad():
        x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, x.new_zeros(weight.shape[0])))
        y = conv2d(x, weight, bias, in_width, out_width, stride, padding, dilation, groups)
        grads = torch.autograd.grad(y, (x, weight, bias), grad, materialize_grads=True, allow_unused=True)
    dx, dw, db = (g if wanted else x.new_empty(0) for g, wanted in zip(grads, output_mask, strict=True))
    return dx, dw, db


def pack_weights(weight: Tensor, stride: int, groups: int, winograd: bool, dense_input: bool = False) -> list[Tensor]:
    """Copies of the weights as they are, [O, I, kh, kw], for every batch."""
    return [weight.clone(memory_format=torch.contiguous_format)]


def fused_conv2d(
    x, out, level, order, in_widths, out_widths, weight, scale, shift, kernel_size, stride, groups, relu
) -> None:
    """`reference.fused_conv2d` into `out`."""
    read, made = (None if widths is None else widths.tolist() for widths in (in_widths, out_widths))
    form = {"in_widths": read, "out_widths": made, "stride": stride, "groups": groups, "relu": relu}
    out.copy_(reference.fused_conv2d(x, level, weight, scale, shift, **form))


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
    """`reference.residual_block` into `out`."""
    result = reference.residual_block(
        x,
        level,
        widths.tolist(),
        weight,
        scale,
        shift,
        pre_scale=pre_scale,
        pre_shift=pre_shift,
        stride=stride,
        groups=groups,
        projection=projection,
        relu=relu,
    )
    out.copy_(result)


residual_chain = one_by_one(alone(residual_block), fused_conv2d)
gather = unmoved

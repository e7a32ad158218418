"""Every operator of `den_kernels`: schema, implementation, fake, autograd and FLOP formula. The only file that
registers.

The operators are opaque to torch.compile and torch.export: which backend runs, and what the levels are, is decided
inside. Arguments arrive checked by `functional.py`.

N samples, C channels, H W space, L levels, B blocks, R rows of statistics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from den_kernels.backends import batch_norm as plain_batch_norm
from den_kernels.backends import load, resolve
from den_kernels.block import BlockArguments, at_levels, output_shape
from den_kernels.chain import chain_output, plan_rows, unflatten
from den_kernels.plan import plan_levels

_LIBRARY = torch.library.Library("den_kernels", "DEF")

_CONV = "Tensor? in_width, Tensor? out_width, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_LIBRARY.define(f"conv2d(Tensor x, Tensor weight, Tensor? bias, {_CONV}, str backend) -> Tensor")
_LIBRARY.define(
    f"conv2d_backward(Tensor grad, Tensor x, Tensor weight, {_CONV}, bool[3] output_mask, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)

# residual + conv2d for the samples that read any channel; the others are their residual, bit for bit.
_LIBRARY.define(
    "conv2d_add(Tensor x, Tensor weight, Tensor residual, Tensor? in_width, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, SymInt groups, str backend) -> Tensor"
)

# y: x normalised by the statistics of the samples that ran each channel (channels below `width`), row by row, through
# weight and bias [R, C] and a ReLU if wanted; 0 elsewhere. mean, var (biased), count (of samples): [R, C].
_NORM = "Tensor? row, Tensor? width, Tensor? weight, Tensor? bias"
_LIBRARY.define(
    f"batch_norm(Tensor x, {_NORM}, int rows, float eps, bool relu, str backend)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor count)"
)
_LIBRARY.define(
    f"batch_norm_backward(Tensor grad, Tensor x, {_NORM}, Tensor mean, Tensor var, Tensor count, float eps, bool relu, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("plan(Tensor level, int num_levels) -> (Tensor, Tensor, Tensor)")

_BLOCK = (
    "Tensor level, Tensor order, Tensor count, Tensor widths, Tensor[] weight, Tensor[] scale, Tensor[] shift, "
    "Tensor? pre_scale, Tensor? pre_shift, int[] kernel_size, int[] stride, int[] groups, "
    "Tensor[] projection, bool relu, str backend"
)
_LIBRARY.define(
    "fused_conv2d(Tensor x, Tensor level, Tensor order, Tensor? in_widths, Tensor? out_widths, Tensor weight, "
    "Tensor scale, Tensor shift, int kernel_size, int stride, int groups, bool relu, str backend) -> Tensor"
)
_LIBRARY.define(f"residual_block(Tensor x, {_BLOCK}) -> Tensor")
_LIBRARY.define(f"residual_block_(Tensor(a!) x, {_BLOCK}) -> ()")
_LIBRARY.define(
    "residual_chain(Tensor x, Tensor? level, Tensor? order, Tensor? count, Tensor[] tensors, str spec, str backend)"
    " -> Tensor"
)


def _layout(x: Tensor) -> torch.memory_format:
    """channels_last for an x stored so, else contiguous: the layout that results take."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _output_shape(x: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    spatial = [
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    ]
    return [x.shape[0], weight.shape[0], *spatial]


# The primitive


def _conv2d(x, weight, bias, in_width, out_width, stride, padding, dilation, groups, backend) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(_output_shape(x, weight, stride, padding, dilation))
    run = resolve(backend, x.device, x.dtype).conv2d
    y = run(x, weight, bias, in_width, out_width, stride, padding, dilation, groups)
    return y.contiguous(memory_format=_layout(x))


def _conv2d_fake(x, weight, bias, in_width, out_width, stride, padding, dilation, groups, backend) -> Tensor:
    return x.new_empty(_output_shape(x, weight, stride, padding, dilation)).to(memory_format=_layout(x))


def _conv2d_backward(grad, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask, backend):
    if x.shape[0] == 0:
        grads = (torch.zeros_like(x), torch.zeros_like(weight), x.new_zeros(weight.shape[0]))
    else:
        run = resolve(backend, x.device, x.dtype).conv2d_backward
        grads = run(grad, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask)
    like = (x, weight, None)
    return tuple(
        (g.contiguous(memory_format=_layout(t)) if t is not None else g) if wanted else x.new_empty(0)
        for g, wanted, t in zip(grads, output_mask, like, strict=True)
    )


def _conv2d_backward_fake(
    grad, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask, backend
):
    return (
        torch.empty_like(x, memory_format=_layout(x)) if output_mask[0] else x.new_empty(0),
        torch.empty_like(weight, memory_format=_layout(weight)) if output_mask[1] else x.new_empty(0),
        x.new_empty(weight.shape[0]) if output_mask[2] else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, in_width, out_width, *geometry, backend = inputs
    ctx.save_for_backward(x, weight, in_width, out_width)
    ctx.geometry, ctx.backend, ctx.has_bias = geometry, backend, bias is not None


def _autograd(ctx, grad):
    x, weight, in_width, out_width = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = torch.ops.den_kernels.conv2d_backward(
        grad, x, weight, in_width, out_width, *ctx.geometry, mask, ctx.backend
    )
    dx, dw, db = (g if wanted else None for g, wanted in zip(grads, mask, strict=True))
    return dx, dw, db, None, None, None, None, None, None, None


# The primitive on top of a residual


def _conv2d_add(x, weight, residual, in_width, stride, padding, dilation, groups, backend) -> Tensor:
    if x.shape[0] == 0:
        return torch.empty_like(residual, memory_format=_layout(x))
    module = resolve(backend, x.device, x.dtype)
    if hasattr(module, "conv2d_add"):
        y = module.conv2d_add(x, weight, residual, in_width, stride, padding, dilation, groups)
    else:
        y = residual + module.conv2d(x, weight, None, in_width, None, stride, padding, dilation, groups)
        if in_width is not None:
            y = torch.where((in_width > 0).view(-1, 1, 1, 1), y, residual)
    return y.contiguous(memory_format=_layout(x))


def _conv2d_add_fake(x, weight, residual, in_width, stride, padding, dilation, groups, backend) -> Tensor:
    return torch.empty_like(residual, memory_format=_layout(x))


def _add_setup_context(ctx, inputs, output) -> None:
    x, weight, _, in_width, *ctx.geometry, ctx.backend = inputs
    ctx.save_for_backward(x, weight, in_width)


def _add_autograd(ctx, grad):
    x, weight, in_width = ctx.saved_tensors
    dx = dweight = None
    if any(ctx.needs_input_grad[:2]):
        mask = [*ctx.needs_input_grad[:2], False]
        grads = torch.ops.den_kernels.conv2d_backward(grad, x, weight, in_width, None, *ctx.geometry, mask, ctx.backend)
        dx, dweight = (g if wanted else None for g, wanted in zip(grads[:2], mask[:2], strict=True))
    return dx, dweight, grad if ctx.needs_input_grad[2] else None, None, None, None, None, None, None


# Batch norm


def _norm_backend(name: str, x: Tensor):
    """The backend's own batch norm where it has one, else the plain one."""
    backend = resolve(name, x.device, x.dtype)
    return backend if hasattr(backend, "batch_norm") else plain_batch_norm


def _batch_norm(x, row, width, weight, bias, rows, eps, relu, backend):
    y, *statistics = _norm_backend(backend, x).batch_norm(x, row, width, weight, bias, rows, eps, relu)
    return y.contiguous(memory_format=_layout(x)), *statistics


def _batch_norm_fake(x, row, width, weight, bias, rows, eps, relu, backend):
    dtype = torch.promote_types(x.dtype, torch.float32)
    tables = (x.new_empty((rows, x.shape[1]), dtype=dtype) for _ in range(3))
    return torch.empty_like(x, memory_format=_layout(x)), *tables


def _batch_norm_backward(grad, x, row, width, weight, bias, mean, var, count, eps, relu, backend):
    run = _norm_backend(backend, x).batch_norm_backward
    dx, *rest = run(grad, x, row, width, weight, bias, mean, var, count, eps, relu)
    return dx.contiguous(memory_format=_layout(x)), *rest


def _batch_norm_backward_fake(grad, x, row, width, weight, bias, mean, var, count, eps, relu, backend):
    return torch.empty_like(x, memory_format=_layout(x)), torch.empty_like(mean), torch.empty_like(mean)


def _norm_setup_context(ctx, inputs, output) -> None:
    x, row, width, weight, bias, _, ctx.eps, ctx.relu, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, row, width, weight, bias, *output[1:])


def _norm_autograd(ctx, grad, *_):
    x, row, width, weight, bias, *statistics = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.den_kernels.batch_norm_backward(
        grad, x, row, width, weight, bias, *statistics, ctx.eps, ctx.relu, ctx.backend
    )
    dweight = None if weight is None else dweight.to(weight.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, None, None, dweight, dbias, None, None, None, None


# The plan


def _plan(level, num_levels):
    native = {"cuda": "triton", "cpu": "cpu"}.get(level.device.type)
    if native is not None:
        backend = load(native)
        # Levels are planned whatever the dtype of the maps; float32 is one that every backend takes.
        if backend.unavailable() is None and backend.rejects(level.device, torch.float32) is None:
            return backend.plan_levels(level, num_levels)
    return plan_levels(level, num_levels)


def _plan_fake(level, num_levels):
    n, b = level.shape
    level_BN, order_BN = (level.new_empty((b, n), dtype=torch.int32) for _ in range(2))
    return level_BN, order_BN, level.new_empty((b, num_levels), dtype=torch.int32)


# The fused convolution and the fused residual block


def _fused_conv2d(x, level, order, in_widths, out_widths, weight, scale, *rest) -> Tensor:
    *form, backend = rest
    out = _fused_conv2d_fake(x, level, order, in_widths, out_widths, weight, scale, *rest)
    if x.shape[0]:
        run = resolve(backend, x.device, x.dtype).fused_conv2d
        run(x, out, level, order, in_widths, out_widths, weight, scale, *form)
    return out


def _fused_conv2d_fake(x, level, order, in_widths, out_widths, weight, scale, shift, kernel_size, stride, *rest):
    shape = output_shape(x.shape, scale.shape[1], (stride,))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _residual_block(x, level, order, count, widths, weight, scale, shift, *rest) -> Tensor:
    *block, backend = rest
    shape = output_shape(x.shape, scale[-1].shape[1], block[3])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if x.shape[0]:
        run = resolve(backend, x.device, x.dtype).residual_block
        run(x, out, level, order, count, widths, weight, scale, shift, *block)
    return out


def _residual_block_fake(x, level, order, count, widths, weight, scale, shift, *rest) -> Tensor:
    shape = output_shape(x.shape, scale[-1].shape[1], rest[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _residual_block_in_place(x, level, order, count, widths, weight, scale, shift, *rest) -> None:
    *block, backend = rest
    if x.shape[0]:
        run = resolve(backend, x.device, x.dtype).residual_block
        run(x, x, level, order, count, widths, weight, scale, shift, *block)


def _residual_block_in_place_fake(x, *args) -> None:
    return None


def _residual_chain(x, level, order, count, tensors, spec, backend) -> Tensor:
    out = chain_output(x, spec)
    if x.shape[0]:
        resolve(backend, x.device, x.dtype).residual_chain(x, out, level, order, count, tensors, spec)
    return out


def _residual_chain_fake(x, level, order, count, tensors, spec, backend) -> Tensor:
    return chain_output(x, spec)


for _name, _run, _fake in (
    ("conv2d", _conv2d, _conv2d_fake),
    ("conv2d_backward", _conv2d_backward, _conv2d_backward_fake),
    ("conv2d_add", _conv2d_add, _conv2d_add_fake),
    ("batch_norm", _batch_norm, _batch_norm_fake),
    ("batch_norm_backward", _batch_norm_backward, _batch_norm_backward_fake),
    ("plan", _plan, _plan_fake),
    ("fused_conv2d", _fused_conv2d, _fused_conv2d_fake),
    ("residual_block", _residual_block, _residual_block_fake),
    ("residual_block_", _residual_block_in_place, _residual_block_in_place_fake),
    ("residual_chain", _residual_chain, _residual_chain_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"den_kernels::{_name}", _fake, lib=_LIBRARY)
for _name, _gradient, _context in (
    ("conv2d", _autograd, _setup_context),
    ("conv2d_add", _add_autograd, _add_setup_context),
    ("batch_norm", _norm_autograd, _norm_setup_context),
):
    torch.library.register_autograd(f"den_kernels::{_name}", _gradient, setup_context=_context, lib=_LIBRARY)


# FLOPs: multiply-adds x 2 of the channels that the samples ran (all of them where the widths hold no values, as in
# tracing)


def _pairs(n: int, channels: int, outputs: int, in_width: Tensor | None, out_width: Tensor | None, groups: int) -> int:
    """Sum over the samples of (input channel, output channel) pairs that their convolution multiplies."""
    known = all(w is None or type(w) is Tensor for w in (in_width, out_width))
    if not known or (in_width is None and out_width is None):
        return n * channels * outputs // groups
    read = torch.full((n,), channels) if in_width is None else in_width.cpu().long()
    write = torch.full((n,), outputs) if out_width is None else out_width.cpu().long()
    if groups == 1:
        return int((read * write).sum())
    active = torch.minimum(read * groups // channels, write * groups // outputs)
    return int(active.sum()) * (channels // groups) * (outputs // groups)


def _macs(x: Tensor, weight: Tensor, in_width, out_width, stride, padding, dilation, groups: int) -> int:
    taps = math.prod(_output_shape(x, weight, stride, padding, dilation)[2:]) * math.prod(weight.shape[2:])
    return taps * _pairs(x.shape[0], x.shape[1], weight.shape[0], in_width, out_width, groups)


@register_flop_formula(torch.ops.den_kernels.conv2d, get_raw=True)
def _conv2d_flop(x, weight, bias, in_width, out_width, stride, padding, dilation, groups, backend, **_) -> int:
    return 2 * _macs(x, weight, in_width, out_width, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.den_kernels.conv2d_add, get_raw=True)
def _conv2d_add_flop(x, weight, residual, in_width, stride, padding, dilation, groups, backend, **_) -> int:
    return 2 * _macs(x, weight, in_width, None, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.den_kernels.conv2d_backward, get_raw=True)
def _conv2d_backward_flop(
    grad, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask, backend, **_
) -> int:
    return 2 * sum(output_mask[:2]) * _macs(x, weight, in_width, out_width, stride, padding, dilation, groups)


@register_flop_formula(torch.ops.den_kernels.fused_conv2d, get_raw=True)
def _fused_conv2d_flop(
    x, level, order, in_widths, out_widths, weight, scale, shift, kernel_size, stride, groups, *rest, **_
) -> int:
    n, inputs, outputs = x.shape[0], x.shape[1], scale.shape[1]
    pixels = math.prod(output_shape(x.shape, outputs, (stride,))[2:])
    known = all(t is None or type(t) is Tensor for t in (level, in_widths, out_widths))
    read_N, made_N = (at_levels(widths, level) if known else None for widths in (in_widths, out_widths))
    return 2 * pixels * kernel_size**2 * _pairs(n, inputs, outputs, read_N, made_N, groups)


@register_flop_formula([torch.ops.den_kernels.residual_block, torch.ops.den_kernels.residual_block_], get_raw=True)
def _residual_block_flop(x, level, order, count, *rest, **_) -> int:
    return _block_flop(x.shape, level, BlockArguments(*rest[:-1]))


@register_flop_formula(torch.ops.den_kernels.residual_chain, get_raw=True)
def _residual_chain_flop(x, level, order, count, tensors, spec, backend, **_) -> int:
    total, shape = 0, x.shape
    layers, head = (flat := unflatten(tensors, spec)).layers, flat.head
    for (level_N, *_plan), layer in zip(plan_rows(layers, x.shape[0], level, order, count), layers, strict=True):
        channels, stride = layer.output
        if isinstance(layer, BlockArguments):
            total += _block_flop(shape, level_N, layer)
            shape = output_shape(shape, channels, (stride,))
            continue
        pixels = math.prod(output_shape(shape, channels, (layer.stride,))[2:])  # before a max pool
        pairs = _pairs(shape[0], shape[1], channels, None, None, layer.groups)
        total += 2 * pixels * layer.kernel_size**2 * pairs
        shape = output_shape(shape, channels, (stride,))
    if head is not None:
        total += 2 * shape[0] * shape[1] * head.output[0]
    return total


def _block_flop(shape, level: Tensor, block: BlockArguments) -> int:
    n, channels, height, columns = shape
    known = type(level) is Tensor and type(block.widths) is Tensor
    width = block.widths.cpu()[level.cpu().long()].long() if known else torch.full((n,), block.scale[0].shape[1])
    total, inputs = 0, channels
    for i, outputs in enumerate(s.shape[1] for s in block.scale):
        height, columns = -(-height // block.stride[i]), -(-columns // block.stride[i])
        read = torch.where(width > 0, channels, 0) if i == 0 else width
        write = width if i + 1 < len(block.scale) else torch.where(width > 0, outputs, 0)
        pairs, groups = read * write, block.groups[i]
        if groups > 1:  # whole groups, each of which multiplies its own inputs alone
            group_in, group_out = inputs // groups, outputs // groups
            pairs = torch.minimum(read // group_in, write // group_out) * group_in * group_out
        total += int(pairs.sum()) * block.kernel_size[i] ** 2 * height * columns
        inputs = outputs
    if block.projection:
        total += n * channels * block.scale[-1].shape[1] * height * columns
    return 2 * total

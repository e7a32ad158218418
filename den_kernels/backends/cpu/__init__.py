"""The `cpu` backend: the C++ kernels of csrc/, for float32 and bfloat16 on a CPU.

The elastic convolution and batch norm, forward and backward, and fused residual blocks for inference; bfloat16 is
summed in float32. Each sample runs its own width: nothing is gathered or sorted, and no primitive is built for a shape.
The extension links no torch: tensors go in as addresses, so everything about them is checked before the call (shapes
and dtypes in `functional.py`, values in `csrc/checks.cpp`).

Symbols: N samples, C channels, H W space, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from den_kernels.backends import batch_norm as plain
from den_kernels.backends import grouped
from den_kernels.backends.cpu.chains import bind_chain, check_plan, residual_block, residual_chain
from den_kernels.backends.cpu.native import DTYPES, address, extension, set_isa, supported_isas, unavailable
from den_kernels.backends.cpu.weights import TILE_BOUNDS, gather, pack_weight, pack_weights

__all__ = [
    "ENDS_IN_CHAIN",
    "NAME",
    "TILE_BOUNDS",
    "batch_norm",
    "batch_norm_backward",
    "bind_chain",
    "conv2d",
    "conv2d_add",
    "conv2d_backward",
    "fused_conv2d",
    "gather",
    "pack_weight",
    "pack_weights",
    "plan_levels",
    "rejects",
    "residual_block",
    "residual_chain",
    "set_isa",
    "supported_isas",
    "unavailable",
]

NAME = "cpu"
ENDS_IN_CHAIN = True

Pair = tuple[int, int]


def rejects(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes tensors of this device and dtype, else why it does not."""
    if device.type != "cpu":
        return f"backend 'cpu' takes CPU tensors, got device {device}"
    if dtype not in DTYPES:
        return f"backend 'cpu' takes {' and '.join(DTYPES.values())}, got {dtype}"
    return None


def _int32(width: Tensor | None) -> Tensor | None:
    return None if width is None else width.to(torch.int32).contiguous()


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_width: Tensor | None,
    out_width: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    residual: Tensor | None = None,
) -> Tensor:
    """The elastic convolution, x [N, C, H, W] -> [N, C_out, H_out, W_out] of its dtype; channels_last if x is.

    float32 or bfloat16, all tensors alike. residual: like the result, added to it; a sample of input width 0 is its
    residual, bit for bit. Raises ValueError for a width out of range or, with groups, not of whole groups.
    """
    native = extension()
    if x.dtype == torch.bfloat16 and groups > 1 and weight.shape[1] % 2:
        # bfloat16 channels are multiplied in pairs, and here a pair would lie in two groups.
        y = conv2d(
            x.float(), weight.float(), None if bias is None else bias.float(),
            in_width, out_width, stride, padding, dilation, groups, None if residual is None else residual.float(),
        )  # fmt: skip
        return y.to(x.dtype)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    x_NHWC = x if channels_last else x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    in_width, out_width = _int32(in_width), _int32(out_width)
    N, C, H, W = x.shape
    C_out, _, *kernel = weight.shape
    H_out, W_out = (
        (size + 2 * pad - dil * (k - 1) - 1) // step + 1
        for size, pad, dil, k, step in zip((H, W), padding, dilation, kernel, stride, strict=True)
    )
    out = torch.empty((N, C_out, H_out, W_out), dtype=x.dtype, memory_format=torch.channels_last)
    native.conv2d(
        DTYPES[x.dtype],
        x_NHWC.data_ptr(),
        weight.data_ptr(),
        address(bias),
        address(residual),
        out.data_ptr(),
        address(in_width),
        address(out_width),
        (N, C, H, W, C_out, groups),
        (*kernel, *stride, *padding, *dilation),
        torch.get_num_threads(),
    )
    return out if channels_last else out.contiguous()


def conv2d_add(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    in_width: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """residual + `conv2d`, in one pass."""
    return conv2d(x, weight, None, in_width, None, stride, padding, dilation, groups, residual)


def conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    in_width: Tensor | None,
    out_width: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, where `output_mask` asks for them; what no sample ran is exactly 0.

    The same bits whatever the number of threads. In bfloat16 they are those of the `grouped` backend. Raises ValueError
    as `conv2d` does.
    """
    if x.dtype != torch.float32:
        return grouped.conv2d_backward(
            grad, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask
        )
    native = extension()
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    weight = weight.contiguous()
    in_width, out_width = _int32(in_width), _int32(out_width)
    N, C, H, W = x.shape
    C_out, _, *kernel = weight.shape
    dx = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last) if output_mask[0] else None
    dweight = torch.empty(weight.shape, dtype=x.dtype) if output_mask[1] else None
    dbias = torch.empty((C_out,), dtype=x.dtype) if output_mask[2] else None
    native.conv2d_backward(
        grad.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        address(dx),
        address(dweight),
        address(dbias),
        address(in_width),
        address(out_width),
        (N, C, H, W, C_out, groups),
        (*kernel, *stride, *padding, *dilation),
        torch.get_num_threads(),
    )
    return dx if dx is None or channels_last else dx.contiguous(), dweight, dbias


def batch_norm(
    x: Tensor,
    row: Tensor | None,
    width: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x, and mean, biased variance and count of samples [R, C] of this batch; see `ops.py`.

    Raises ValueError for a row or width out of range.
    """
    if not _native_norm(x, weight):
        return plain.batch_norm(x, row, width, weight, bias, rows, eps, relu)
    x_NHWC = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    mean, var, count = (torch.empty((rows, x.shape[1]), dtype=x.dtype) for _ in range(3))
    norm = _Norm(x_NHWC, row, width, weight, bias, mean, var, count, eps, relu)
    extension().batch_norm(*norm.arguments, y.data_ptr())
    return y, mean, var, count


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    row: Tensor | None,
    width: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, dweight and dbias [R, C], of what `batch_norm` computed."""
    if not _native_norm(x, weight):
        return plain.batch_norm_backward(grad, x, row, width, weight, bias, mean, var, count, eps, relu)
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    dx = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    dweight, dbias = torch.empty(mean.shape, dtype=x.dtype), torch.empty(mean.shape, dtype=x.dtype)
    norm = _Norm(x, row, width, weight, bias, mean, var, count, eps, relu)
    extension().batch_norm_backward(
        *norm.arguments, grad.data_ptr(), dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr()
    )
    return dx, dweight, dbias


def _native_norm(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the extension's batch norm takes these dtypes."""
    return x.dtype == torch.float32 and (weight is None or weight.dtype == torch.float32)


class _Norm:
    """The arguments that the extension's batch norm takes, and the tensors that must live while it runs."""

    def __init__(self, x, row, width, weight, bias, mean, var, count, eps: float, relu: bool):
        N, C, H, W = x.shape
        self.tensors = (
            *(x, _int32(row), _int32(width)),
            *(None if t is None else t.contiguous() for t in (weight, bias, mean, var, count)),
        )
        sizes = (N, C, H * W, mean.shape[0])
        self.arguments = ([address(t) for t in self.tensors], sizes, eps, relu, torch.get_num_threads())


def plan_levels(level_NB: Tensor, num_levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of a `LevelPlan`. Raises ValueError for a level out of range."""
    level_NB = level_NB.to(torch.int64).contiguous()
    N, B = level_NB.shape
    level_BN, order_BN = (torch.empty((B, N), dtype=torch.int32) for _ in range(2))
    count_BL = torch.empty((B, num_levels), dtype=torch.int32)
    extension().plan(
        level_NB.data_ptr(), (N, B, num_levels), level_BN.data_ptr(), order_BN.data_ptr(), count_BL.data_ptr()
    )
    return level_BN, order_BN, count_BL


def fused_conv2d(
    x: Tensor,
    out: Tensor,
    level: Tensor,
    order: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel_size: int,
    stride: int,
    groups: int,
    relu: bool,
) -> None:
    """A convolution with a norm by level and perhaps a ReLU, written to `out`, which is channels_last.

    level, order [N], in_widths, out_widths [L]: int32, contiguous. weight: from `pack_weight`. scale, shift [L, O]:
    float32, contiguous. Raises ValueError for a level, an order or widths out of range, or a weight of another shape.
    """
    check_plan(level, order, x.shape[0])

    def run(x: Tensor, out: Tensor, level: Tensor, order: Tensor, stride: int) -> None:
        N, C, H, W = x.shape
        tensors = (x, out, level, order, in_widths, out_widths, weight, scale, shift)
        extension().fused_conv2d(
            DTYPES[x.dtype],
            [address(t) for t in tensors],
            (N, C, H, W, out.shape[1], scale.shape[0], kernel_size, stride, groups),
            weight.numel(),
            relu,
            torch.get_num_threads(),
        )

    x = x.contiguous(memory_format=torch.channels_last)
    one_pixel = kernel_size == 1 and tuple(x.shape[2:]) == (1, 1)
    if x.shape[0] == 1 or not one_pixel or not _is_plan(level, order, scale.shape[0]):
        return run(x, out, level, order, stride)  # which raises for what is no plan
    # Maps of one pixel (a fully connected layer): samples of a level are the pixels of one image, which reads the
    # weights once.
    x_NC, out_NO, first = x.flatten(1), out.flatten(1), torch.zeros(1, dtype=torch.int32)
    for l in level.unique():
        rows = (level == l).nonzero().flatten()
        image, made = (
            torch.empty((1, C, 1, len(rows)), dtype=x.dtype, memory_format=torch.channels_last)
            for C in (x_NC.shape[1], out_NO.shape[1])
        )
        torch.index_select(x_NC, 0, rows, out=image.permute(0, 2, 3, 1).view(len(rows), -1))
        run(image, made, l[None], first, stride=1)
        out_NO[rows] = made.permute(0, 2, 3, 1).view(len(rows), -1)


def _is_plan(level: Tensor, order: Tensor, levels: int) -> bool:
    """Whether the levels are below `levels`, and the order holds each sample once."""
    in_range = bool(((level >= 0) & (level < levels)).all())
    return in_range and order.sort().values.equal(torch.arange(len(order), dtype=order.dtype))

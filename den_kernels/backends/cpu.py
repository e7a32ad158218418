"""The `cpu` backend: the C++ kernels of csrc/, for float32 on a CPU.

The elastic convolution and batch norm, forward and backward, and the fused residual block for inference. Each sample
runs its own width: nothing is gathered or sorted, and no primitive is built for a shape. The extension links no torch:
tensors go in as addresses, so everything about them is checked before the call (shapes and dtypes in `functional.py`,
values in `bindings.cpp`).

Symbols: N samples, C channels, H W space, L levels.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch  # before the extension: torch brings the OpenMP library that both must share
from torch import Tensor

from . import batch_norm as plain

NAME = "cpu"

Pair = tuple[int, int]


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, or why there is none."""
    try:
        return importlib.import_module("den_kernels._cpu"), None
    except ModuleNotFoundError:
        return None, (
            "the C++ extension den_kernels._cpu is not built: install a C++ compiler (e.g. apt install g++) and "
            "run `pip install -e .` (or `pip install --force-reinstall --no-deps den-kernels`) again"
        )
    except ImportError as error:
        return None, (
            f"the C++ extension den_kernels._cpu cannot be loaded ({error}): rebuild it on this machine with "
            "`pip install -e .`"
        )


def unavailable() -> str | None:
    """None when the extension can be used, else the reason and the fix in one sentence."""
    return _load()[1]


def _extension() -> ModuleType:
    extension, reason = _load()
    if extension is None:
        raise RuntimeError(f"backend 'cpu' is not available: {reason}")
    return extension


def rejects(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes tensors of this device and dtype, else why it does not."""
    if device.type != "cpu":
        return f"backend 'cpu' takes CPU tensors, got device {device}"
    if dtype != torch.float32:
        return f"backend 'cpu' takes float32, got {dtype}"
    return None


def set_isa(name: str) -> str:
    """Run the kernels of instruction set `name` from now on; returns the name of those used before.

    For tests and measurements: the best set is chosen when the extension is loaded. Raises ValueError when this machine
    cannot run it.
    """
    return _extension().set_isa(name)


def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this machine runs, best first."""
    return tuple(_extension().supported_isas())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
    """The elastic convolution, x [N, C, H, W] float32 -> [N, C_out, H_out, W_out]; channels_last if x is.

    residual: like the result, added to it; a sample of input width 0 is its residual, bit for bit.
    Raises ValueError for a width out of range or, with groups, not of whole groups.
    """
    extension = _extension()
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
    extension.conv2d(
        x_NHWC.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        _address(residual),
        out.data_ptr(),
        _address(in_width),
        _address(out_width),
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

    The same bits whatever the number of threads. Raises ValueError as `conv2d` does.
    """
    extension = _extension()
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    weight = weight.contiguous()
    in_width, out_width = _int32(in_width), _int32(out_width)
    N, C, H, W = x.shape
    C_out, _, *kernel = weight.shape
    dx = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last) if output_mask[0] else None
    dweight = torch.empty(weight.shape, dtype=x.dtype) if output_mask[1] else None
    dbias = torch.empty((C_out,), dtype=x.dtype) if output_mask[2] else None
    extension.conv2d_backward(
        grad.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        _address(dx),
        _address(dweight),
        _address(dbias),
        _address(in_width),
        _address(out_width),
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
    _extension().batch_norm(*norm.arguments, y.data_ptr())
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
    _extension().batch_norm_backward(
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
        self.arguments = ([_address(t) for t in self.tensors], sizes, eps, relu, torch.get_num_threads())


def pack_weight(weight: Tensor, groups: int) -> Tensor:
    """Weights [C_out, C_in/groups, K, K] float32 as `residual_block` reads them: a flat tensor (csrc/pack.h)."""
    extension = _extension()
    weight = weight.detach().contiguous()
    C_out, group_in, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    packed = torch.empty(extension.packed_floats(C_out, group_in, taps, groups), dtype=torch.float32)
    extension.pack_weight(weight.data_ptr(), packed.data_ptr(), C_out, group_in, taps, groups, torch.get_num_threads())
    return packed


def residual_block(
    x: Tensor,
    out: Tensor,
    level: Tensor,
    order: Tensor,
    count: Tensor,
    widths: Tensor,
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    pre_scale: Tensor | None,
    pre_shift: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    groups: Sequence[int],
    relu: bool,
) -> None:
    """One residual block for inference, written to `out`, which may be `x` itself when the shapes agree.

    x, out: float32, channels_last. level, order [N], widths [L]: int32, contiguous. weight: from `pack_weight`. scale,
    shift: float32 [L, C] contiguous, one a convolution. Raises ValueError for a level, an order or widths out of range,
    or packed weights of another shape.
    """
    extension = _extension()
    N, C, H, W = x.shape
    for name, value in (("level", level), ("order", order)):
        if value.dtype != torch.int32 or value.numel() != N or not value.is_contiguous():
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}; it must be contiguous torch.int32 of shape "
                f"({N},), one entry a sample: use plan_levels(...).block(b)"
            )
    hidden = scale[0].shape[1]
    C_out = out.shape[1]
    last = len(weight) - 1
    c_in = C
    for i, packed in enumerate(weight):
        c_out = C_out if i == last else hidden
        expected = extension.packed_floats(c_out, c_in // groups[i], kernel_size[i] ** 2, groups[i])
        if packed.numel() != expected:
            raise ValueError(
                f"weight[{i}] must be packed by this backend's pack_weight for {c_in} -> {c_out} channels "
                f"({expected} values), got {packed.numel()} values"
            )
        c_in = hidden
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    channels_last = out.is_contiguous(memory_format=torch.channels_last)
    out_NHWC = out if channels_last else torch.empty_like(out, memory_format=torch.channels_last)
    extension.residual_block(
        x.data_ptr(),
        out_NHWC.data_ptr(),
        level.data_ptr(),
        order.data_ptr(),
        widths.data_ptr(),
        [w.data_ptr() for w in weight],
        [s.data_ptr() for s in scale],
        [s.data_ptr() for s in shift],
        _address(pre_scale),
        _address(pre_shift),
        (N, C, H, W, hidden, C_out, scale[0].shape[0]),
        kernel_size,
        stride,
        groups,
        relu,
        torch.get_num_threads(),
    )
    if not channels_last:
        out.copy_(out_NHWC)

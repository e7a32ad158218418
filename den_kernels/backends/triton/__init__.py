"""The Triton backend: NVIDIA GPUs from sm_80 on, levels and widths on the device, no host synchronisation.

Importing this package does not import triton: the kernels' modules (`conv`, `block`, `implicit_gemm`, `launch`,
`offline`) do, and are imported on first use. Under TRITON_INTERPRET=1 the kernels run on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence

import torch

from den_kernels.backends import batch_norm as plain_batch_norm
from den_kernels.backends.triton.chain import Readers, handing_on
from den_kernels.block import BlockArguments, at_levels, unmoved

NAME = "triton"
TILE_BOUNDS = ()
ENDS_IN_CHAIN = False
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST_TRITON = (3, 3)
_OLDEST_CAPABILITY = (8, 0)


@functools.cache
def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which takes CPU tensors. Needs triton to be importable."""
    from triton.runtime.interpreter import InterpretedFunction

    from den_kernels.backends.triton.conv import conv2d_kernel

    return isinstance(conv2d_kernel, InterpretedFunction)


@functools.cache
def unavailable() -> str | None:
    """None when the backend can run on this machine, else one sentence with the reason and the fix."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'den-kernels[triton]' (Linux only)"
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, AttributeError) as error:
        return f"importing triton failed ({error}): reinstall it with pip install 'den-kernels[triton]'"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        wanted = ".".join(str(part) for part in _OLDEST_TRITON)
        return f"triton {version} is too old: pip install 'triton>={wanted}'"
    if _interpreted():
        return None
    if torch.version.hip is not None:
        return "this torch is built for ROCm and the kernels are checked on NVIDIA only: use backend='grouped'"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU: install a CUDA build of torch and a driver, or use backend='cpu'"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def rejects(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes tensors of this device and dtype, else one sentence that says why not."""
    if dtype not in _DTYPES:
        return f"the triton backend takes float32, float16 and bfloat16, not {dtype}: use backend='grouped'"
    reason = unavailable()
    if reason is not None:
        return reason
    if _interpreted():
        return None
    if device.type != "cuda":
        return f"the triton backend needs CUDA tensors, not {device.type}: move them, or use backend='cpu'"
    capability = _capability(torch.cuda.current_device() if device.index is None else device.index)
    if capability < _OLDEST_CAPABILITY:
        return f"the triton backend needs compute capability 8.0 or later, not {capability}: use backend='grouped'"
    return None


def plan_levels(level_NB: torch.Tensor, num_levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of a `LevelPlan`, in one launch; a level out of range is taken as the nearest."""
    from den_kernels.backends.triton import launch, plan

    samples, blocks = level_NB.shape
    level_BN, order_BN = (level_NB.new_empty((blocks, samples), dtype=torch.int32) for _ in range(2))
    count_BL = level_NB.new_empty((blocks, num_levels), dtype=torch.int32)
    if count_BL.numel():
        launch.run(plan.plan_plan(level_NB, level_BN, order_BN, count_BL), level_NB.device)
    return level_BN, order_BN, count_BL


def pack_weight(weight_OIHW: torch.Tensor, groups: int) -> torch.Tensor:
    """[O, I / groups, KH, KW] to the contiguous [O, KH, KW, I / groups] that the kernels read.

    Input channels are innermost for all ``groups``: a tap of a filter is then one run of memory, as activations are.
    """
    return weight_OIHW.permute(0, 2, 3, 1).contiguous()


def pack_weights(
    weight: torch.Tensor, stride: int, groups: int, winograd: bool, dense_input: bool = False
) -> list[torch.Tensor]:
    """`pack_weight`, for every batch; a copy, also where `pack_weight` has nothing to move."""
    return [weight.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)]


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    in_width: torch.Tensor | None,
    out_width: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The primitive of DESIGN section 1 on [N, C, H, W]; the result is channels_last whatever x is.

    residual: like the result, added to it; a sample of input width 0 is its residual, bit for bit.
    """
    from den_kernels.backends.triton import conv, launch

    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    out_h, out_w = (conv.output_size(*size) for size in sizes)
    shape = (x.shape[0], weight.shape[0], out_h, out_w)
    out = conv.empty_map(shape, x)
    if out.numel():
        planned = conv.plan_conv2d(
            _channels_last(x),
            pack_weight(weight, groups),
            bias if bias is None else bias.contiguous(),
            _contiguous(in_width),
            _contiguous(out_width),
            residual if residual is None else _channels_last(residual),
            out,
            _pair(stride),
            _pair(padding),
            _pair(dilation),
            groups,
        )
        launch.run(planned, x.device)
    return out


def fused_conv2d(
    x: torch.Tensor,
    out: torch.Tensor,
    level: torch.Tensor,
    order: torch.Tensor,
    in_widths: torch.Tensor | None,
    out_widths: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    kernel_size: int,
    stride: int,
    groups: int,
    relu: bool,
) -> None:
    """The fused convolution into ``out``: the primitive's kernel on a packed weight, norm and ReLU in its epilogue."""
    from den_kernels.backends.triton import conv, launch

    if out.numel() == 0:
        return
    read, made = at_levels(in_widths, level), at_levels(out_widths, level)
    pad, norm = kernel_size // 2, conv.Norm(level, scale, shift, relu)
    geometry = (stride, stride), (pad, pad), (1, 1)
    planned = conv.plan_conv2d(_channels_last(x), weight, None, read, made, None, out, *geometry, groups, norm)
    launch.run(planned, x.device)


def conv2d_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    in_width: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """residual + `conv2d`, in one pass."""
    return conv2d(x, weight, None, in_width, None, stride, padding, dilation, groups, residual)


def conv2d_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    in_width: torch.Tensor | None,
    out_width: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias (empty where ``output_mask`` is False); what no sample ran is exactly 0.

    Every geometry, widths or none, in these kernels; the same bits every time.
    """
    from den_kernels.backends.triton import conv, data_gradient, launch, weight_gradient

    dx = conv.empty_map(x.shape, x) if output_mask[0] else x.new_empty(0)
    filters = (weight.shape[0], *weight.shape[2:], weight.shape[1])
    dweight = x.new_empty(filters if output_mask[1] else 0)
    dbias = x.new_empty(weight.shape[0] if output_mask[2] else 0)
    if grad.numel() == 0 or x.numel() == 0:
        return dx.zero_(), _from_ohwi(dweight.zero_()), dbias.zero_()
    grad, x = _channels_last(grad), _channels_last(x)
    read, write = _contiguous(in_width), _contiguous(out_width)
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    planned = []
    if output_mask[0]:
        filters_OHWI = pack_weight(weight, groups)
        planned.append(
            data_gradient.plan_data_gradient(grad, filters_OHWI, read, write, dx, stride, padding, dilation, groups)
        )
    if output_mask[1]:
        planned += weight_gradient.plan_weight_gradient(
            grad, x, read, write, dweight, stride, padding, dilation, groups
        )
    if output_mask[2]:
        planned += weight_gradient.plan_bias_gradient(grad, write, dbias)
    for one in planned:
        launch.run(one, x.device)
    return dx, _from_ohwi(dweight), dbias


def batch_norm(
    x: torch.Tensor,
    row: torch.Tensor | None,
    width: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    eps: float,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y like x, and mean, biased variance and count of samples [R, C] of this batch; see `ops.py`."""
    from den_kernels.backends.triton import conv, launch, norm

    if x.numel() == 0:
        return plain_batch_norm.batch_norm(x, row, width, weight, bias, rows, eps, relu)
    x = _channels_last(x)
    y = conv.empty_map(x.shape, x)
    mean, var, count = (x.new_empty((rows, x.shape[1]), dtype=torch.float32) for _ in range(3))
    told = norm.Norm(_contiguous(row), _contiguous(width), _contiguous(weight), _contiguous(bias), eps, relu)
    for one in norm.plan_forward(x, told, y, mean, var, count):
        launch.run(one, x.device)
    return y, mean, var, count


def batch_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    row: torch.Tensor | None,
    width: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    count: torch.Tensor,
    eps: float,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx like x, dweight and dbias [R, C], of what `batch_norm` computed."""
    from den_kernels.backends.triton import conv, launch, norm

    if x.numel() == 0:
        return plain_batch_norm.batch_norm_backward(grad, x, row, width, weight, bias, mean, var, count, eps, relu)
    grad, x = _channels_last(grad), _channels_last(x)
    dx = conv.empty_map(x.shape, x)
    dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
    told = norm.Norm(_contiguous(row), _contiguous(width), _contiguous(weight), _contiguous(bias), eps, relu)
    for one in norm.plan_backward(grad, x, told, mean, var, count, dx, dweight, dbias):
        launch.run(one, x.device)
    return dx, dweight, dbias


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _from_ohwi(weight: torch.Tensor) -> torch.Tensor:
    return weight.permute(0, 3, 1, 2) if weight.dim() == 4 else weight


def residual_block(x: torch.Tensor, out: torch.Tensor, *arguments) -> None:
    """Write the fused block of ``x`` to ``out``, which may be ``x`` when the shapes agree.

    arguments: level, order and count of the plan, then those of a `BlockArguments` with weights from `pack_weight`. The
    convolutions read levels from ``order`` and ``count``, which say the same as ``level`` with fewer dependent loads.

    Raises:
        ValueError: ``x`` or ``out`` is not channels_last.
    """
    _run_block(x, out, None, None, *arguments)


def _run_block(
    x: torch.Tensor,
    out: torch.Tensor,
    activated: torch.Tensor | None,
    readers: Readers | None,
    level: torch.Tensor,
    order: torch.Tensor,
    count: torch.Tensor,
    *arguments,
) -> None:
    """`residual_block` that reads ``activated`` and hands on to ``readers``; see `chain`."""
    from den_kernels.backends.triton import block, launch

    for name, tensor in (("x", x), ("out", out)):
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{name} must be channels_last for the triton backend, got strides {tensor.stride()} for shape "
                f"{tuple(tensor.shape)}: use {name}.contiguous(memory_format=torch.channels_last)"
            )
    if out.numel() == 0:
        return
    planned = block.plan_block(
        x,
        out,
        level,
        order,
        count,
        BlockArguments(*arguments),
        in_place=out.data_ptr() == x.data_ptr(),
        activated=activated,
        readers=readers,
    )
    for one in planned:
        launch.run(one, x.device)


residual_chain = handing_on(_run_block, fused_conv2d)
gather = unmoved

"""The `cpu` backend: the C++ kernels of csrc/, for float32 and bfloat16 on a CPU.

The elastic convolution and batch norm, forward and backward, and fused residual blocks for inference; bfloat16 is
summed in float32. Each sample runs its own width: nothing is gathered or sorted, and no primitive is built for a shape.
The extension links no torch: tensors go in as addresses, so everything about them is checked before the call (shapes
and dtypes in `functional.py`, values in `bindings.cpp`).

Symbols: N samples, C channels, H W space, L levels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import mmap
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch  # before the extension: torch brings the OpenMP library that both must share
from torch import Tensor

from den_kernels.backends import batch_norm as plain
from den_kernels.backends import grouped
from den_kernels.block import BlockArguments, flatten

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


# By the names that the extension knows them by.
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def rejects(device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the backend takes tensors of this device and dtype, else why it does not."""
    if device.type != "cpu":
        return f"backend 'cpu' takes CPU tensors, got device {device}"
    if dtype not in _DTYPES:
        return f"backend 'cpu' takes {' and '.join(_DTYPES.values())}, got {dtype}"
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
    """The elastic convolution, x [N, C, H, W] -> [N, C_out, H_out, W_out] of its dtype; channels_last if x is.

    float32 or bfloat16, all tensors alike. residual: like the result, added to it; a sample of input width 0 is its
    residual, bit for bit. Raises ValueError for a width out of range or, with groups, not of whole groups.
    """
    extension = _extension()
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
    extension.conv2d(
        _DTYPES[x.dtype],
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

    The same bits whatever the number of threads. In bfloat16 they are those of the `grouped` backend. Raises ValueError
    as `conv2d` does.
    """
    if x.dtype != torch.float32:
        return grouped.conv2d_backward(
            grad, x, weight, in_width, out_width, stride, padding, dilation, groups, output_mask
        )
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


# Batches are of a class by their tiles of 4x4 outputs: fewer than 16, fewer than 3. Fewer tiles leave the weights, read
# once a call, as the larger traffic, where they outgrow the cache: F(2x2) then reads less than half of F(4x4), and the
# weights as they are about half of that.
TILE_BOUNDS = (16, 3)
_LARGE_WEIGHTS = 256 * 128, 512 * 256
# Channels of a group must fill blocks of the extension's maps, of either dtype.
_WHOLE_BLOCKS = 32


def winograd_tile(weight: Tensor, stride: int, groups: int, batch_class: int) -> int:
    """Outputs a side of the Winograd tiles that a convolution is computed with; 0: directly.

    weight: [C_out, C_in / groups, K, K]. batch_class: how many of `TILE_BOUNDS` the batch's tiles are below. Decided by
    dtype, shape and batch size alone, so that a sample's result does not depend on its batch mates.
    """
    C_out, C_in, *kernel = weight.shape
    if kernel != [3, 3] or stride != 1 or min(C_out // groups, C_in) < 8:
        return 0
    if groups > 1 and (C_out // groups % _WHOLE_BLOCKS or C_in % _WHOLE_BLOCKS):
        return 0
    tile = 2 if weight.dtype == torch.bfloat16 else 4
    for smaller, large in zip((2, 0)[:batch_class], _LARGE_WEIGHTS, strict=False):
        tile = min(tile, smaller) if C_out * C_in >= large else tile
    return tile


def pack_weights(weight: Tensor, stride: int, groups: int, winograd: bool) -> list[Tensor]:
    """Weights as `residual_block` reads them, for each class of batch; classes may share a tensor."""
    tiles = [winograd_tile(weight, stride, groups, c) if winograd else 0 for c in range(len(TILE_BOUNDS) + 1)]
    packed = {tile: pack_weight(weight, groups, tile) for tile in set(tiles)}
    return [packed[tile] for tile in tiles]


def pack_weight(weight: Tensor, groups: int, winograd: int = 0) -> Tensor:
    """Weights [C_out, C_in/groups, K, K] as `residual_block` reads them: a flat tensor.

    winograd: 2 or 4 transforms them for tiles of that many outputs a side (csrc/winograd.h; tiles of 4 in float32
    whatever their dtype); 0: as they are (csrc/pack.h). The sizes differ, which is how `residual_block` knows.
    """
    extension = _extension()
    weight = weight.detach().contiguous()
    C_out, group_in, *kernel = weight.shape
    threads = torch.get_num_threads()
    name = _DTYPES[weight.dtype]
    if winograd:
        size = extension.winograd_packed_elements(name, winograd, C_out, group_in, groups)
        packed = torch.empty(size, dtype=weight.dtype if winograd == 2 else torch.float32)
        extension.winograd_pack(name, winograd, weight.data_ptr(), packed.data_ptr(), C_out, group_in, groups, threads)
        return packed
    if weight.dtype == torch.bfloat16 and groups > 1 and group_in % 2:
        raise ValueError(
            f"weight has {group_in} input channels a group in bfloat16, which is multiplied in pairs of channels: "
            "use float32, or backend='grouped'"
        )
    taps = kernel[0] * kernel[1]
    shape = (C_out, group_in, taps, groups)
    packed = torch.empty(extension.packed_elements(name, *shape), dtype=weight.dtype)
    extension.pack_weight(name, weight.data_ptr(), packed.data_ptr(), *shape, threads)
    return packed


_LARGE_PAGE = 2 << 20


def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of flat tensors, side by side in one allocation of large pages where the system has them.

    The weights of a network are read from memory once a call when the batch is small; with pages of 4 KiB, half of that
    time goes into translating addresses.
    """
    sizes = [-(-t.numel() * t.element_size() // 64) * 64 for t in tensors]
    arena = _empty_in_large_pages(sum(sizes))
    copies, start = [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        place = arena[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        copies.append(place.copy_(tensor))
        start += size
    return copies


def _empty_in_large_pages(size: int) -> Tensor:
    """Bytes [size], aligned to a large page."""
    if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The kernel may be built without: it is as well then.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    arena = torch.frombuffer(memory, dtype=torch.uint8)
    start = -arena.data_ptr() % _LARGE_PAGE
    return arena[start : start + size]


def plan_levels(level_NB: Tensor, num_levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of a `LevelPlan`. Raises ValueError for a level out of range."""
    level_NB = level_NB.to(torch.int64).contiguous()
    N, B = level_NB.shape
    level_BN, order_BN = (torch.empty((B, N), dtype=torch.int32) for _ in range(2))
    count_BL = torch.empty((B, num_levels), dtype=torch.int32)
    _extension().plan(
        level_NB.data_ptr(), (N, B, num_levels), level_BN.data_ptr(), order_BN.data_ptr(), count_BL.data_ptr()
    )
    return level_BN, order_BN, count_BL


def residual_block(x: Tensor, out: Tensor, level: Tensor, order: Tensor, count: Tensor, *block) -> None:
    """One residual block for inference, written to `out`, which may be `x` itself when the shapes agree.

    level, order [N]: int32, contiguous. For the rest see `residual_chain`.
    """
    residual_chain(x, out, level, order, count, *flatten([BlockArguments(*block)]))


def residual_chain(
    x: Tensor,
    out: Tensor,
    level: Tensor,
    order: Tensor,
    count: Tensor,
    tensors: Sequence[Tensor],
    spec: Sequence[int],
) -> None:
    """Residual blocks one after the other in one call; the maps between them are scratch memory of the extension.

    x, out: float32 or bfloat16; out may be x when there is one block and the shapes agree. level, order: int32 [B, N]
    (or [N] for one block), contiguous. tensors, spec: the blocks, from `den_kernels.block.flatten`, with weights
    from `pack_weight`, scales and shifts float32, contiguous. Raises ValueError for a level, an order or widths out
    of range, or packed weights of another shape.
    """
    N, C, H, W = x.shape
    chain = _chain(_DTYPES[x.dtype], tuple(t.data_ptr() for t in tensors), tuple(spec))
    for name, value in (("level", level), ("order", order)):
        if value.dtype != torch.int32 or value.numel() != chain.blocks * N or not value.is_contiguous():
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}; it must be contiguous torch.int32 of shape "
                f"({N},), one entry a sample, for each of {chain.blocks} blocks: use plan_levels(...)"
            )
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    channels_last = out.is_contiguous(memory_format=torch.channels_last)
    out_NHWC = out if channels_last else torch.empty_like(out, memory_format=torch.channels_last)
    chain.run(
        x.data_ptr(),
        out_NHWC.data_ptr(),
        level.data_ptr(),
        order.data_ptr(),
        (N, C, H, W),
        torch.get_num_threads(),
    )
    if not channels_last:
        out.copy_(out_NHWC)


@functools.lru_cache(maxsize=256)
def _chain(dtype: str, addresses: tuple[int, ...], spec: tuple[int, ...]) -> Any:
    """The native form of a chain, which these numbers determine: it holds addresses, no values."""
    return _extension().Chain(dtype, addresses, spec)

"""Weights as the fused blocks read them: which algorithm a convolution takes, its packed form, and where that lies."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from den_kernels.backends.cpu.native import DTYPES, extension

# Of batches of few tiles: below how many tiles of 4x4 outputs, from how many pairs of channels on, which tiles at most.
# The weights, read once a call, are the larger traffic then: F(2x2) reads less than half of F(4x4), weights as they are
# about half of that.
_FEW_TILES = ((16, 256 * 128, 2), (9, 64 * 64, 2), (3, 512 * 256, 0))
TILE_BOUNDS = tuple(tiles for tiles, _, _ in _FEW_TILES)
# Of images: see keeps_lines in csrc/geometry.h.
_FEW_CHANNELS = 4
# Channels of a group must fill blocks of the extension's maps, of either dtype.
_WHOLE_BLOCKS = 32


def winograd_tile(weight: Tensor, stride: int, groups: int, batch_class: int) -> int:
    """Outputs a side of the Winograd tiles that a convolution is computed with; 0: directly.

    weight: [C_out, C_in / groups, K, K]. batch_class: how many of `TILE_BOUNDS` the batch's tiles are below. Decided by
    dtype, shape and batch size alone, so that a sample's result does not depend on its batch mates, and by the
    instruction set: tiles of AMX multiply faster than transforms take.
    """
    if not extension().winograd_wins(DTYPES[weight.dtype]):
        return 0
    C_out, C_in, *kernel = weight.shape
    if kernel != [3, 3] or stride != 1 or min(C_out // groups, C_in) < 8:
        return 0
    if groups > 1 and (C_out // groups % _WHOLE_BLOCKS or C_in % _WHOLE_BLOCKS):
        return 0
    tile = 2 if weight.dtype == torch.bfloat16 else 4
    smaller = [most for _, pairs, most in _FEW_TILES[:batch_class] if C_out * C_in >= pairs]
    return min([tile, *smaller])


def pack_weights(weight: Tensor, stride: int, groups: int, winograd: bool, dense_input: bool = False) -> list[Tensor]:
    """Weights as `residual_block` reads them, for each class of batch; classes may share a tensor.

    dense_input: of a convolution without a shortcut, of which every sample reads all input channels.
    """
    if dense_input and groups == 1 and weight.shape[1] <= _FEW_CHANNELS and weight.shape[3] > 1:
        # Columns under the kernel count as channels (keeps_lines of csrc/geometry.h).
        weight = weight.permute(0, 3, 1, 2).flatten(1, 2)[..., None]
    tiles = [winograd_tile(weight, stride, groups, c) if winograd else 0 for c in range(len(TILE_BOUNDS) + 1)]
    packed = {tile: pack_weight(weight, groups, tile) for tile in set(tiles)}
    return [packed[tile] for tile in tiles]


def pack_weight(weight: Tensor, groups: int, winograd: int = 0) -> Tensor:
    """Weights [C_out, C_in/groups, K, K] as `residual_block` reads them: a flat tensor.

    winograd: 2 or 4 transforms them for tiles of that many outputs a side (csrc/winograd.h; tiles of 4 in float32
    whatever their dtype); 0: as they are (csrc/pack.h). The sizes differ, which is how `residual_block` knows.
    """
    native = extension()
    weight = weight.detach().contiguous()
    C_out, group_in, *kernel = weight.shape
    threads = torch.get_num_threads()
    name = DTYPES[weight.dtype]
    if winograd:
        size = native.winograd_packed_elements(name, winograd, C_out, group_in, groups)
        packed = torch.empty(size, dtype=weight.dtype if winograd == 2 else torch.float32)
        native.winograd_pack(name, winograd, weight.data_ptr(), packed.data_ptr(), C_out, group_in, groups, threads)
        return packed
    if weight.dtype == torch.bfloat16 and groups > 1 and group_in % 2:
        raise ValueError(
            f"weight has {group_in} input channels a group in bfloat16, which is multiplied in pairs of channels: "
            "use float32, or backend='grouped'"
        )
    taps = kernel[0] * kernel[1]
    shape = (C_out, group_in, taps, groups)
    packed = torch.empty(native.packed_elements(name, *shape), dtype=weight.dtype)
    native.pack_weight(name, weight.data_ptr(), packed.data_ptr(), *shape, threads)
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

"""What a path costs, in the paper's sense: convolutions and hidden fully connected layers, estimator only.

Batch norm, ReLU, shortcuts and the heads are not counted (notes: every printed size comes out exactly so). A
FLOP count is multiply-adds times 2.

Suffixes: N samples, B blocks, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from den.blocks import Block
from den.estimator import Estimator
from den.selector import Selector

if TYPE_CHECKING:
    from den.freeze import FrozenDEN
    from den.model import DEN

ImageSize = int | tuple[int, int]


def block_macs(model: DEN | FrozenDEN | Estimator, image_size: ImageSize) -> Tensor:
    """Multiply-adds of each block at each level for one image: int64 [B, L].

    image_size: height and width of the images that go into the model, or one integer for square ones.
    """
    return _tables(_estimator(model), image_size)[0]


def fixed_macs(model: DEN | FrozenDEN | Estimator, image_size: ImageSize) -> int:
    """Multiply-adds for one image outside the blocks, on every path: stem and hidden fully connected layers."""
    return _tables(_estimator(model), image_size)[1]


def full_macs(model: DEN | FrozenDEN | Estimator, image_size: ImageSize) -> int:
    """Multiply-adds of the whole estimator, every block at its top level, for one image."""
    table_BL, fixed = _tables(_estimator(model), image_size)
    return fixed + int(table_BL[:, -1].sum())


def selector_macs(model: DEN | FrozenDEN, image_size: ImageSize) -> int:
    """Multiply-adds of the selector for one image. Raises ValueError for a selector of the caller's own."""
    source = _source(model)
    if not isinstance(source.selector, Selector):
        raise ValueError("the selector is a module of the caller's own; only the cost of a den Selector is known")
    height, width = _size(image_size)
    return source.selector.spec.macs(source.estimator.in_channels, height, width)


def flops(
    model: DEN | FrozenDEN, level: Tensor | Sequence[int], image_size: ImageSize, *, include_selector: bool = False
) -> Tensor:
    """FLOPs (multiply-adds x 2) of the estimator for each sample, as in Table 2 of the paper.

    Args:
        model: a DEN, or its frozen form.
        level: integers [N, B]; [B] counts as one sample.
        image_size: height and width of the images that go into the model, or one integer for square ones.
        include_selector: add the selector's.

    Returns: int64 [N] on the levels' device.

    Raises:
        TypeError, ValueError: levels that are no integers, of another shape, or (on a CPU) out of range.
    """
    source = _source(model)
    table_BL, fixed = _tables(source.estimator, image_size)
    level_NB = _level(level, *table_BL.shape)
    table_BL = table_BL.to(level_NB.device)
    macs_N = fixed + table_BL.gather(1, level_NB.t()).sum(0)
    if include_selector:
        macs_N = macs_N + selector_macs(source, image_size)
    return 2 * macs_N


def cost_ratios(model: DEN | FrozenDEN | Estimator) -> Tensor:
    """d_i(l) of equation 5: weights of block i that level l runs, as a share of the block's. float32 [B, L]."""
    rows = [[count / b.param_counts[-1] for count in b.param_counts] for b in _blocks(_estimator(model))]
    return torch.tensor(rows, dtype=torch.float32)


def count_parameters(model: DEN | FrozenDEN | Estimator, level: Sequence[int] | Tensor | None = None) -> int:
    """Parameters in the paper's sense, of one path or (level None) of the whole estimator.

    Convolution weights and hidden fully connected layers; no batch norm, no heads, no selector.
    level: integers [B].
    """
    estimator = _estimator(model)
    blocks = _blocks(estimator)
    if level is None:
        path = [-1] * len(blocks)
    else:
        rows = _level(level, len(blocks), estimator.num_levels)
        if len(rows) != 1:
            raise ValueError(f"level has {len(rows)} rows; count_parameters takes one path, [B]")
        path = rows[0].tolist()
    stem = 0 if estimator.stem is None else estimator.stem.conv.weight.numel()
    return stem + sum(b.param_counts[l] for b, l in zip(blocks, path, strict=True)) + estimator.tail.param_count


def active_parameters(model: DEN | FrozenDEN | Estimator, level: Sequence[int] | Tensor) -> Tensor:
    """Parameters of each sample's path, counted as `count_parameters` does: int64 [N]. level: integers [N, B]."""
    estimator = _estimator(model)
    table_BL = torch.tensor([block.param_counts for block in _blocks(estimator)], dtype=torch.int64)
    level_NB = _level(level, *table_BL.shape)
    stem = 0 if estimator.stem is None else estimator.stem.conv.weight.numel()
    table_BL = table_BL.to(level_NB.device)
    return stem + estimator.tail.param_count + table_BL.gather(1, level_NB.t()).sum(0)


def _source(model: DEN | FrozenDEN) -> DEN:
    """The model itself, or the architecture that a frozen one keeps."""
    return model.__dict__.get("source", model)


def _estimator(model: DEN | FrozenDEN | Estimator) -> Estimator:
    return model if isinstance(model, Estimator) else _source(model).estimator


def _blocks(estimator: Estimator) -> list[Block]:
    return list(estimator.blocks)  # type: ignore[arg-type]


def _size(image_size: ImageSize) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size is {image_size}; height and width must be at least 1")
    return height, width


def _tables(estimator: Estimator, image_size: ImageSize) -> tuple[Tensor, int]:
    """Multiply-adds of the blocks [B, L] and of what runs on every path."""
    stride, fixed, size = estimator.entry(*_size(image_size))
    rows = []
    for index, block in enumerate(_blocks(estimator)):
        entry = (stride,) if index == 0 and estimator.stem is None else ()
        macs, size = block.macs(*size, *entry)
        rows.append(macs)
    # On the CPU also where a model is made on the meta device, to be counted.
    return torch.tensor(rows, dtype=torch.int64, device="cpu"), fixed + estimator.tail.macs


def _level(level: Tensor | Sequence[int], num_blocks: int, num_levels: int) -> Tensor:
    """Levels as int64 [N, B]."""
    level = torch.as_tensor(level)
    if level.dtype == torch.bool or level.is_floating_point():
        raise TypeError(f"level has dtype {level.dtype}; it must be an integer dtype, such as torch.int64")
    if level.dim() not in (1, 2) or level.shape[-1] != num_blocks:
        raise ValueError(f"level has shape {tuple(level.shape)}; it must be [N, B] or [B] with B = {num_blocks}")
    level = level.to(torch.int64)
    if level.device.type == "cpu" and level.numel() and not 0 <= int(level.min()) <= int(level.max()) < num_levels:
        raise ValueError(
            f"level holds values from {int(level.min())} to {int(level.max())}; all must be in [0, {num_levels - 1}]"
        )
    return level.expand(1, -1) if level.dim() == 1 else level

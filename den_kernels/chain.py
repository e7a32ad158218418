"""Chains of fused layers in the flat form that an operator can take, and what a backend needs to run one.

L levels, C channels, N samples, H W space.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from den_kernels.block import BlockArguments, output_shape
from den_kernels.fused_pool import global_pool
from den_kernels.plan import plan_levels


class ConvArguments(NamedTuple):
    """What a dense convolution with a norm and perhaps a ReLU computes with: one level, all channels.

    weight: packed by a backend. scale, shift: [1, C]. max_pool: a 3x3 max pool of stride 2, padding 1, stands behind.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    kernel_size: int
    stride: int
    groups: int
    relu: bool
    max_pool: bool = False

    @property
    def levels(self) -> int:
        return 1

    @property
    def output(self) -> tuple[int, int]:
        """Channels of the result, and by how much its map is smaller."""
        return self.scale.shape[1], self.stride * (2 if self.max_pool else 1)


Layer = BlockArguments | ConvArguments
Tables = tuple[Tensor, ...]  # of a pool: its scale and shift [C], or nothing

_HEADER, _LAYER = 3, 10  # integers in front of the layers, and of each in front of its convolutions


def flatten(
    layers: Sequence[Layer], pool: Tables | None = None, head: ConvArguments | None = None
) -> tuple[list[Tensor], str]:
    """The layers, the pool that ends them if any, and the linear layer behind that, if any, as a 1x1 convolution: as a
    few tensors and a text that tells how to take them apart.

    The text holds integers (as a list they would cost a call more than small layers do): whether there is a pool,
    whether it has a norm, and whether the last layer is the one behind it; then of each layer: convolutions k, input,
    hidden and output channels, levels, whether there is a norm in front, a ReLU behind, a projection, a shortcut (or
    the layer is a convolution), and a max pool behind, then k each of kernel sizes, strides, groups and the numbers
    of packed weights. The tensors: all widths; all tables, first the norms in front of layers, then of each layer k
    scales and k shifts, the scale and shift of the projection, and last those of the pool; then each layer's weights,
    that of the projection last.
    """
    widths: list[Tensor] = []
    norms: list[Tensor] = []
    tables: list[Tensor] = []
    weights: list[Tensor] = []
    if head is not None and pool is None:
        raise ValueError("head stands behind a pool, and pool is None")
    spec = [int(pool is not None), int(bool(pool)), int(head is not None)]
    for layer in (*layers, *(() if head is None else (head,))):
        shortcut = isinstance(layer, BlockArguments)
        block = layer if isinstance(layer, BlockArguments) else _as_block(layer)
        widths.append(block.widths)
        tables += (*block.scale, *block.shift)
        pre = block.pre_scale is not None and block.pre_shift is not None
        if block.pre_scale is not None and block.pre_shift is not None:
            norms += (block.pre_scale, block.pre_shift)
        tables += block.projection[1:]
        weights += (*block.weight, *block.projection[:1])
        levels, hidden = block.scale[0].shape
        inside = 0 if block.pre_scale is None else block.pre_scale.numel()
        spec += (len(block.weight), inside, hidden, block.scale[-1].shape[1], levels)
        max_pool = isinstance(layer, ConvArguments) and layer.max_pool
        spec += (int(part) for part in (pre, block.relu, len(block.projection) > 0, shortcut, max_pool))
        spec += (*block.kernel_size, *block.stride, *block.groups, *(w.numel() for w in block.weight))
    tables += pool or ()
    all_tables = torch.cat([table.flatten() for table in (*norms, *tables)])
    return [torch.cat(widths), all_tables, *weights], " ".join(map(str, spec))


def _as_block(conv: ConvArguments) -> BlockArguments:
    """A convolution in the form of a block, for flattening."""
    width = torch.full((1,), conv.scale.shape[1], dtype=torch.int32, device=conv.scale.device)
    sizes = [conv.kernel_size], [conv.stride], [conv.groups]
    return BlockArguments(width, [conv.weight], [conv.scale], [conv.shift], None, None, *sizes, [], conv.relu)


@functools.lru_cache(maxsize=256)
def read_spec(spec: str) -> tuple[int, ...]:
    """The integers of `flatten`'s text."""
    return tuple(map(int, spec.split()))


class Flattened(NamedTuple):
    """What `flatten` took apart."""

    layers: list[Layer]
    pool: Tables | None
    head: ConvArguments | None


def unflatten(tensors: Sequence[Tensor], spec: str) -> Flattened:
    """What `flatten` was given, as views of its tensors."""
    all_widths, all_tables, *weights = tensors
    layers: list[Layer] = []
    w = width = norm_table = 0
    table = sum(2 * inside for _, inside, *_ in _layers(read_spec(spec)))

    def take(*shape: int) -> Tensor:
        nonlocal table
        start, table = table, table + math.prod(shape)
        return all_tables[start:table].view(shape)

    def take_norm(channels: int) -> Tensor:
        nonlocal norm_table
        start, norm_table = norm_table, norm_table + channels
        return all_tables[start:norm_table]

    for k, inside, hidden, outside, levels, pre, relu, projected, shortcut, max_pool, *of in _layers(read_spec(spec)):
        outputs = [hidden] * (k - 1) + [outside]
        scale, shift = ([take(levels, channels) for channels in outputs] for _ in range(2))
        norm = [take_norm(inside) if pre else None for _ in range(2)]
        projection = [weights[w + k], take(levels, outside), take(levels, outside)] if projected else []
        kernel_size, stride, groups = (of[i * k : (i + 1) * k] for i in range(3))
        if shortcut:
            form = (kernel_size, stride, groups, projection, bool(relu))
            widths = all_widths[width : width + levels]
            layers.append(BlockArguments(widths, weights[w : w + k], scale, shift, norm[0], norm[1], *form))
        else:
            window = kernel_size[0], stride[0], groups[0]
            layers.append(ConvArguments(weights[w], scale[0], shift[0], *window, bool(relu), bool(max_pool)))
        w, width = w + k + projected, width + levels
    pooled, normed, headed = read_spec(spec)[:_HEADER]
    head = cast(ConvArguments, layers.pop()) if headed else None
    channels = layers[-1].output[0]
    return Flattened(layers, tuple(take(channels) for _ in range(2 * normed)) if pooled else None, head)


def _layers(spec: Sequence[int]) -> Iterator[Sequence[int]]:
    """The integers of each layer."""
    s = _HEADER
    while s < len(spec):
        end = s + _LAYER + 4 * spec[s]
        yield spec[s:end]
        s = end


@functools.lru_cache(maxsize=256)
def _output_shape(shape: tuple[int, ...], spec: str) -> tuple[int, ...]:
    """[N, C, H, W] of the last layer."""
    for k, _, _, channels, *rest in _layers(read_spec(spec)):
        strides = rest[_LAYER - 4 + k : _LAYER - 4 + 2 * k]
        shape = output_shape(shape, channels, (*strides, 1 + rest[_LAYER - 5]))  # the max pool's stride last
    return shape


def chain_output(x: Tensor, spec: str) -> Tensor:
    """An empty tensor for what a chain makes of x [N, C, H, W]: a channels_last map, with a pool [N, C], or [N, K]."""
    return empty_output(x.shape, x.dtype, x.device, spec)()


def empty_output(shape: Sequence[int], dtype: torch.dtype, device: torch.device, spec: str) -> Callable[[], Tensor]:
    """What makes `chain_output` for each x of this shape."""
    # What torch.compile traces with may be symbols, which cannot be looked up.
    known = all(type(size) is int for size in shape)
    made = (_output_shape if known else _output_shape.__wrapped__)(tuple(shape), spec)
    pooled = read_spec(spec)[0]
    layout = {} if pooled else {"memory_format": torch.channels_last}
    return functools.partial(torch.empty, made[:2] if pooled else made, dtype=dtype, device=device, **layout)


def plan_rows(
    layers: Sequence[Layer], samples: int, level: Tensor | None, order: Tensor | None, count: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Level [N], order [N] and count [L] of each layer: the plan's next row, or for a layer of one level that level.

    level: of a plan, [B, N]; or without an order, levels [N, B].
    """
    if level is not None and order is None:
        level, order, count = plan_levels(level, max(layer.levels for layer in layers))
    rows = iter(()) if level is None or order is None or count is None else zip(level, order, count, strict=True)

    @functools.cache
    def only_level(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        level_N, order_N = torch.zeros(samples, dtype=torch.int32, device=device), torch.arange(samples, device=device)
        return level_N, order_N.int(), torch.full((1,), samples, dtype=torch.int32, device=device)

    for layer in layers:
        yield next(rows) if layer.levels > 1 else only_level(layer.scale[0].device)


def as_pixels(features: Tensor) -> Tensor:
    """Features [N, C], contiguous, as a channels_last image [1, C, 1, N] of a pixel for each sample."""
    return features.view(1, 1, *features.shape).permute(0, 3, 1, 2)


class Step(NamedTuple):
    """A layer of a chain, and its level [N], order [N] and count [L]."""

    plan: tuple[Tensor, Tensor, Tensor]
    layer: Layer


# Runs a block from x to y, given the steps behind it; what it returns is given to the block that comes next, if any.
RunBlock = Callable[[Tensor, Tensor, Step, Sequence[Step], Tensor | None], Tensor | None]


def alone(residual_block: Callable[..., None]) -> RunBlock:
    """A block by a backend's operator, whatever stands around it."""

    def run(x: Tensor, y: Tensor, step: Step, behind: Sequence[Step], handed: Tensor | None) -> None:
        residual_block(x, y, *step.plan, *step.layer)

    return run


def one_by_one(run_block: RunBlock, fused_conv2d: Callable[..., None]) -> Callable[..., None]:
    """A backend's `residual_chain`, a chain in one call, from what it runs a layer with."""

    def residual_chain(x: Tensor, out: Tensor, level, order, count, tensors, spec: str) -> None:
        layers, pool, head = unflatten(tensors, spec)
        plan = plan_rows(layers, x.shape[0], level, order, count)
        steps = [Step(row, layer) for row, layer in zip(plan, layers, strict=True)]
        handed = None
        for i, step in enumerate(steps):
            layer = step.layer
            channels, stride = layer.output
            pools = isinstance(layer, ConvArguments) and layer.max_pool
            shape = output_shape(x.shape, channels, (stride // 2 if pools else stride,))
            in_place = i > 0 and shape == tuple(x.shape) and isinstance(layer, BlockArguments)
            if i + 1 == len(layers) and pool is None and not pools:
                y = out
            elif in_place:
                y = x  # a map of this chain's own
            else:
                y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            if isinstance(layer, BlockArguments):
                handed = run_block(x, y, step, steps[i + 1 :], handed)
            else:
                handed = None
                fused_conv2d(x, y, *step.plan[:2], None, None, *layer[:-1])
            x = F.max_pool2d(y, 3, 2, 1) if pools else y
        if pool is not None and head is not None:
            only = torch.zeros(1, dtype=torch.int32, device=x.device)
            features = as_pixels(global_pool(x, pool))
            fused_conv2d(features, as_pixels(out), only, only, None, None, *head[:-1])
        elif pool is not None:
            global_pool(x, pool, out)
        elif x is not out:
            out.copy_(x)

    return residual_chain

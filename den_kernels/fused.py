"""The inference form of residual blocks: packed weights, folded norms, one operator call a block.

T sets (such as tasks), L levels, C channels, N samples, H W space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from den_kernels import ops as _ops  # noqa: F401  (registers torch.ops.den_kernels)
from den_kernels.backends import resolve
from den_kernels.block import BlockArguments, batch_class
from den_kernels.packed import PackedLayer


class FusedResidualBlock(PackedLayer):
    """Convolutions with their norms, ReLUs, shortcut and addition as one operator; each sample at its own level.

    See `reference.residual_block` for what it computes. Inference only. The weights are packed for one backend when the
    module is made, so it stays on the device of `weights`.

    Args:
        weights: the convolutions, each [O, I / groups, k, k] with k odd; 2 or 3 of them; padding is k // 2.
        scales, shifts: the folded norm behind each, float [T, L, O].
        widths: hidden width of each level, ascending.
        strides, groups: of each convolution (groups: None for 1).
        pre_scale, pre_shift: [T, C], the norm (with ReLU) before the first convolution: pre-activation.
        projection: the shortcut as a 1x1 convolution of the block's stride: its weight [O, C, 1, 1] and its folded
            norm's scale and shift, [T, L, O]. None: average pooling and zero channels.
        relu: apply a ReLU after the addition (post-activation).
        winograd: let the backend compute 3x3 convolutions of stride 1 by Winograd's algorithm, where it has it: about
            three times as fast in float32, with a largest error near 1e-5 of the largest value in place of 1e-6.
        backend: "auto" or a name.
    """

    scale0: Tensor
    pre_scale: Tensor | None
    pre_shift: Tensor | None
    projection_scale: Tensor
    projection_shift: Tensor

    def __init__(
        self,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor],
        widths: Sequence[int],
        *,
        strides: Sequence[int],
        groups: Sequence[int] | None = None,
        pre_scale: Tensor | None = None,
        pre_shift: Tensor | None = None,
        projection: tuple[Tensor, Tensor, Tensor] | None = None,
        relu: bool = False,
        winograd: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        groups = [1] * len(weights) if groups is None else list(groups)
        _check_block(weights, scales, shifts, widths, strides, groups, pre_scale, pre_shift, projection)
        first = weights[0]
        chosen = resolve(backend, first.device, first.dtype)
        self.backend: str = chosen.NAME
        self._tile_bounds: tuple[int, ...] = chosen.TILE_BOUNDS
        self.kernel_sizes = [w.shape[2] for w in weights]
        self.strides, self.groups, self.relu = list(strides), groups, relu
        self.in_channels, self.out_channels = first.shape[1] * groups[0], weights[-1].shape[0]
        self._weight_names: list[list[str]] = []  # of each convolution, for each class of batch
        self.register_buffer("widths", torch.tensor(list(widths), dtype=torch.int32, device=first.device))
        for i, weight in enumerate(weights):
            forms = chosen.pack_weights(weight.detach(), self.strides[i], groups[i], winograd)
            self._weight_names.append(self.register_forms(f"weight{i}", forms))
            self.register_buffer(f"scale{i}", scales[i].detach().float().contiguous())
            self.register_buffer(f"shift{i}", shifts[i].detach().float().contiguous())
        self.register_buffer("pre_scale", None if pre_scale is None else pre_scale.detach().float().contiguous())
        self.register_buffer("pre_shift", None if pre_shift is None else pre_shift.detach().float().contiguous())
        self._projection_name = ""
        if projection is not None:
            weight, scale, shift = (part.detach() for part in projection)
            forms = chosen.pack_weights(weight, math.prod(strides), 1, False)
            self._projection_name = self.register_forms("projection", forms[:1])[0]
            self.register_buffer("projection_scale", scale.float().contiguous())
            self.register_buffer("projection_shift", shift.float().contiguous())
        self._arguments: dict[tuple[int, int], BlockArguments] = {}

    @property
    def num_levels(self) -> int:
        return self.scale0.shape[1]

    def changed(self) -> None:
        super().changed()
        self._arguments = {}

    def batch_class(self, shape: Sequence[int], stride: int | None = None) -> int:
        """Which form of the weights a batch [N, C, H, W] takes; see `den_kernels.backends`."""
        return batch_class(self._tile_bounds, shape, math.prod(self.strides) if stride is None else stride)

    def arguments(self, set_index: int = 0, batch_class: int = 0) -> BlockArguments:
        """The operator's arguments behind the plan, for one set; kept, because slicing costs more than the call."""
        if torch.compiler.is_compiling():  # what is kept would be guarded on, and compiled anew once it is there
            return self._bind(set_index, batch_class)
        key = set_index, batch_class
        if key not in self._arguments:
            self._arguments[key] = self._bind(set_index, batch_class)
        return self._arguments[key]

    def _bind(self, set_index: int, batch_class: int) -> BlockArguments:
        count = len(self.kernel_sizes)
        weights: list[Tensor] = [getattr(self, names[batch_class]) for names in self._weight_names]
        projection: list[Tensor] = []
        if self._projection_name:
            tables = self.projection_scale[set_index], self.projection_shift[set_index]
            projection = [getattr(self, self._projection_name), *tables]
        return BlockArguments(
            cast(Tensor, self.widths),
            weights,
            [getattr(self, f"scale{i}")[set_index] for i in range(count)],
            [getattr(self, f"shift{i}")[set_index] for i in range(count)],
            None if self.pre_scale is None else self.pre_scale[set_index],
            None if self.pre_shift is None else self.pre_shift[set_index],
            self.kernel_sizes,
            self.strides,
            self.groups,
            projection,
            self.relu,
        )

    def forward(
        self,
        x: Tensor,
        level: Tensor,
        order: Tensor,
        count: Tensor,
        set_index: int = 0,
        inplace: bool = False,
    ) -> Tensor:
        """x [N, C, H, W] channels_last; level, order [N] and count [L]: one block of a `LevelPlan`.

        Returns [N, O, ceil(H / s), ceil(W / s)], s the product of the strides; with `inplace` it is x itself,
        overwritten.
        """
        arguments = self.arguments(set_index, self.batch_class(x.shape))
        if not inplace:
            return torch.ops.den_kernels.residual_block(x, level, order, count, *arguments, self.backend)
        if self.out_channels != self.in_channels or math.prod(self.strides) != 1:
            raise ValueError("inplace is True, but this block's output has another shape than its input")
        torch.ops.den_kernels.residual_block_(x, level, order, count, *arguments, self.backend)
        return x


def _check_block(weights, scales, shifts, widths, strides, groups, pre_scale, pre_shift, projection) -> None:
    if len(weights) not in (2, 3):
        raise ValueError(f"weights has {len(weights)} convolutions; a residual block has 2 or 3")
    for name, values in (("scales", scales), ("shifts", shifts), ("strides", strides), ("groups", groups)):
        if len(values) != len(weights):
            raise ValueError(f"{name} has {len(values)} entries; weights has {len(weights)}")
    hidden = weights[0].shape[0]
    widths = [int(w) for w in widths]
    if not widths or widths != sorted(widths) or widths[0] < 0 or widths[-1] != hidden:
        raise ValueError(f"widths is {tuple(widths)}; it must ascend from at least 0 to the {hidden} hidden channels")
    for i, weight in enumerate(weights):
        if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
            raise ValueError(
                f"weights[{i}] has shape {tuple(weight.shape)}; it must be [O, I / groups, k, k] with k odd"
            )
        if i > 0 and weight.shape[1] * groups[i] != hidden:
            raise ValueError(
                f"weights[{i}] reads {weight.shape[1] * groups[i]} channels; the block has {hidden} hidden ones"
            )
        if 0 < i < len(weights) - 1 and weight.shape[0] != hidden:
            raise ValueError(f"weights[{i}] makes {weight.shape[0]} channels; the block has {hidden} hidden ones")
        for name, table in (("scales", scales[i]), ("shifts", shifts[i])):
            if table.dim() != 3 or tuple(table.shape[1:]) != (len(widths), weight.shape[0]):
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(table.shape)}; it must be [sets, {len(widths)}, {weight.shape[0]}]"
                )
    if (pre_scale is None) != (pre_shift is None):
        raise ValueError("pre_scale and pre_shift go together; one of them is None")
    if pre_scale is not None and (pre_scale.dim() != 2 or pre_scale.shape[1] != weights[0].shape[1] * groups[0]):
        raise ValueError(
            f"pre_scale has shape {tuple(pre_scale.shape)}; it must be [sets, {weights[0].shape[1] * groups[0]}]"
        )
    if projection is not None:
        shapes = [tuple(part.shape) for part in projection]
        inside, outside, tables = weights[0].shape[1] * groups[0], weights[-1].shape[0], tuple(scales[-1].shape)
        if shapes != [(outside, inside, 1, 1), tables, tables]:
            raise ValueError(
                f"projection has shapes {shapes}; they must be {(outside, inside, 1, 1)}, {tables} and {tables}"
            )
    elif math.prod(strides) == 1 and weights[-1].shape[0] < weights[0].shape[1] * groups[0]:
        raise ValueError(
            "the last convolution makes fewer channels than the block reads; its shortcut cannot drop channels"
        )

"""The inference form of a residual block: packed weights, folded norms, one operator call.

T sets (such as tasks), L levels, C channels, N samples, H W space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from den_kernels import ops as _ops  # noqa: F401  (registers torch.ops.den_kernels)
from den_kernels.backends import resolve


class FusedResidualBlock(nn.Module):
    """Convolutions with their norms, ReLUs, shortcut and addition as one operator; each sample at its own level.

    See `reference.residual_block` for what it computes. Inference only. The weights are packed for one backend when the
    module is made, so it stays on the device of `weights`.

    Args:
        weights: the convolutions, each [O, I / groups, k, k] with k odd; 2 or 3 of them; padding is k // 2.
        scales, shifts: the folded norm behind each, float [T, L, O].
        widths: hidden width of each level, ascending.
        strides, groups: of each convolution (groups: None for 1).
        pre_scale, pre_shift: [T, C], the norm (with ReLU) before the first convolution: pre-activation.
        relu: apply a ReLU after the addition (post-activation).
        backend: "auto" or a name.
    """

    pre_scale: Tensor | None
    pre_shift: Tensor | None

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
        relu: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        groups = [1] * len(weights) if groups is None else list(groups)
        _check_block(weights, scales, shifts, widths, strides, groups, pre_scale, pre_shift)
        first = weights[0]
        chosen = resolve(backend, first.device, first.dtype, "residual_block")
        self.backend: str = chosen.NAME
        self.kernel_sizes = [w.shape[2] for w in weights]
        self.strides, self.groups, self.relu = list(strides), groups, relu
        self.in_channels, self.out_channels = first.shape[1] * groups[0], weights[-1].shape[0]
        self.register_buffer("widths", torch.tensor(list(widths), dtype=torch.int32, device=first.device))
        for i, weight in enumerate(weights):
            self.register_buffer(f"weight{i}", chosen.pack_weight(weight.detach(), groups[i]))
            self.register_buffer(f"scale{i}", scales[i].detach().float().contiguous())
            self.register_buffer(f"shift{i}", shifts[i].detach().float().contiguous())
        self.register_buffer("pre_scale", None if pre_scale is None else pre_scale.detach().float().contiguous())
        self.register_buffer("pre_shift", None if pre_shift is None else pre_shift.detach().float().contiguous())
        self._arguments: dict[int, tuple] = {}

    def _apply(self, fn, recurse=True):
        self._arguments = {}
        return super()._apply(fn, recurse)

    def _set_arguments(self, set_index: int) -> tuple:
        """The operator's arguments behind the plan, for one set; kept, because slicing costs more than the call."""
        if set_index not in self._arguments:
            count = len(self.kernel_sizes)
            weights = [getattr(self, f"weight{i}") for i in range(count)]
            scales = [getattr(self, f"scale{i}")[set_index] for i in range(count)]
            shifts = [getattr(self, f"shift{i}")[set_index] for i in range(count)]
            pre = [None if table is None else table[set_index] for table in (self.pre_scale, self.pre_shift)]
            self._arguments[set_index] = (
                *(self.widths, weights, scales, shifts, *pre),
                *(self.kernel_sizes, self.strides, self.groups, self.relu, self.backend),
            )
        return self._arguments[set_index]

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
        arguments = self._set_arguments(set_index)
        if not inplace:
            return torch.ops.den_kernels.residual_block(x, level, order, count, *arguments)
        if self.out_channels != self.in_channels or math.prod(self.strides) != 1:
            raise ValueError("inplace is True, but this block's output has another shape than its input")
        torch.ops.den_kernels.residual_block_(x, level, order, count, *arguments)
        return x


def _check_block(weights, scales, shifts, widths, strides, groups, pre_scale, pre_shift) -> None:
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
    if math.prod(strides) == 1 and weights[-1].shape[0] < weights[0].shape[1] * groups[0]:
        raise ValueError(
            "the last convolution makes fewer channels than the block reads; its shortcut cannot drop channels"
        )

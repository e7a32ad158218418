"""The inference form of one elastic convolution: packed weight, folded norm by level and ReLU in one operator call.

T sets (such as tasks), L levels, C channels, N samples, H W space.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from den_kernels import ops as _ops  # noqa: F401  (registers torch.ops.den_kernels)
from den_kernels.backends import resolve
from den_kernels.block import batch_class
from den_kernels.chain import ConvArguments
from den_kernels.packed import PackedLayer


class FusedConv2d(PackedLayer):
    """A convolution with its norm and ReLU as one operator; each sample at the widths of its level.

    See `reference.fused_conv2d` for what it computes. Inference only. The weight is packed for one backend when the
    module is made, so it stays on the device of `weight`.

    Args:
        weight: [O, I / groups, k, k] with k odd; padding is k // 2.
        scale, shift: the folded norm behind it, float [T, L, O].
        in_widths, out_widths: input channels read and output channels made at each level, ascending, above 0; None:
            all. With groups, a level must read every group that it makes.
        stride, groups: of the convolution.
        relu: whether a ReLU follows.
        max_pool: whether a 3x3 max pool of stride 2 and padding 1 follows that.
        winograd, backend: as in `FusedResidualBlock`.

    Raises ValueError for shapes or widths that do not fit together, RuntimeError for a backend asked for by name that
    cannot be used.
    """

    scale: Tensor
    shift: Tensor
    in_widths: Tensor | None
    out_widths: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        *,
        in_widths: Sequence[int] | None = None,
        out_widths: Sequence[int] | None = None,
        stride: int = 1,
        groups: int = 1,
        relu: bool = False,
        max_pool: bool = False,
        winograd: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = weight.shape[1] * groups, weight.shape[0]
        levels = scale.shape[1] if scale.dim() == 3 else 0
        read = [self.in_channels] * levels if in_widths is None else list(in_widths)
        made = [self.out_channels] * levels if out_widths is None else list(out_widths)
        _check(weight, scale, shift, read, made, groups)
        self.kernel_size, self.stride, self.groups, self.relu = weight.shape[2], stride, groups, relu
        self.max_pool, self.pool_stride = max_pool, 2 if max_pool else 1
        chosen = resolve(backend, weight.device, weight.dtype)
        self.backend: str = chosen.NAME
        self._tile_bounds: tuple[int, ...] = chosen.TILE_BOUNDS
        forms = chosen.pack_weights(weight.detach(), stride, groups, winograd, dense_input=in_widths is None)
        self._names = self.register_forms("weight", forms)
        # Zeros beyond a level's width, so that a scale and shift leave nothing there.
        made_L1 = torch.tensor(made, device=weight.device)[:, None]
        inside_LC = torch.arange(self.out_channels, device=weight.device) < made_L1
        for name, table in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.where(inside_LC, table.detach().float(), 0.0).contiguous())
        for name, widths in (("in_widths", in_widths), ("out_widths", out_widths)):
            given = None if widths is None else torch.tensor(list(widths), dtype=torch.int32, device=weight.device)
            self.register_buffer(name, given)

    def forward(self, x: Tensor, level: Tensor, order: Tensor, set_index: int = 0, stride: int | None = None) -> Tensor:
        """x [N, C, H, W] channels_last; level, order int32 [N]: of one block of a `LevelPlan`.

        stride: another than the module's, for weights that are packed as they are, such as those of an image's few
            channels.
        Returns [N, O, ceil(H / s), ceil(W / s)], channels_last, 0 beyond a sample's width; s: the stride, doubled by a
        max pool.
        """
        stride = self.stride if stride is None else stride
        arguments = self.arguments(set_index, self.batch_class(x.shape, stride))._replace(stride=stride)
        widths = self.in_widths, self.out_widths
        y = torch.ops.den_kernels.fused_conv2d(x, level, order, *widths, *arguments[:-1], self.backend)
        return F.max_pool2d(y, 3, 2, 1) if self.max_pool else y

    @property
    def num_levels(self) -> int:
        return self.scale.shape[1]

    @property
    def dense(self) -> bool:
        """Whether it has one level, of all channels."""
        return self.num_levels == 1 and self.in_widths is None and self.out_widths is None

    @property
    def strides(self) -> list[int]:
        return [self.stride]

    def batch_class(self, shape: Sequence[int], stride: int) -> int:
        """Which form of the weight a batch [N, C, H, W] takes at a stride; see `den_kernels.backends`."""
        return batch_class(self._tile_bounds, shape, stride)

    def arguments(self, set_index: int = 0, batch_class: int = 0) -> ConvArguments:
        """The operator's arguments behind the plan and the widths, for one set."""
        weight, tables = getattr(self, self._names[batch_class]), (self.scale[set_index], self.shift[set_index])
        return ConvArguments(weight, *tables, self.kernel_size, self.stride, self.groups, self.relu, self.max_pool)


def _check(
    weight: Tensor, scale: Tensor, shift: Tensor, in_widths: Sequence[int], out_widths: Sequence[int], groups: int
) -> None:
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [O, I / groups, k, k] with k odd")
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    for name, table in (("scale", scale), ("shift", shift)):
        if table.dim() != 3 or table.shape != scale.shape or table.shape[2] != outputs:
            raise ValueError(f"{name} has shape {tuple(table.shape)}; it must be [sets, levels, {outputs}], as scale")
    for name, widths, channels in (("in_widths", in_widths, inputs), ("out_widths", out_widths, outputs)):
        if len(widths) != scale.shape[1]:
            raise ValueError(f"{name} has {len(widths)} levels; scale has {scale.shape[1]}")
        ascending = list(widths) == sorted(widths) and widths[0] > 0 and widths[-1] <= channels
        if not ascending or any(width % (channels // groups) for width in widths if groups > 1):
            whole = f", in whole groups of {channels // groups}" if groups > 1 else ""
            raise ValueError(f"{name} is {tuple(widths)}; it must ascend from above 0 to at most {channels}{whole}")
    if groups > 1 and any(read * outputs < made * inputs for read, made in zip(in_widths, out_widths, strict=True)):
        raise ValueError(
            f"in_widths is {tuple(in_widths)} and out_widths {tuple(out_widths)}; with groups={groups} a level must "
            "read every group that it makes"
        )

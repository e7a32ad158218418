"""Elastic layers that drop into any PyTorch model: the plain layer, and a level for each sample.

N samples, C channels, H W space, L levels, S sets of statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den_kernels.all_reduce import add_over_processes
from den_kernels.backends.batch_norm import batch_norm
from den_kernels.functional import den_conv2d


def _widths_buffer(name: str, widths: Sequence[int] | None, channels: int, groups: int, device) -> Tensor | None:
    """The checked table of widths, int32 [L], or None."""
    if widths is None:
        return None
    values = [int(w) for w in widths]
    step = channels // groups if groups > 1 else 1
    if not values or values != sorted(values) or values[0] < 0 or values[-1] != channels:
        raise ValueError(
            f"{name} is {tuple(widths)}; it must ascend from at least 0 to the layer's {channels} channels"
        )
    if any(w % step for w in values):
        raise ValueError(f"{name} is {tuple(widths)}; with groups={groups} each must be a multiple of {step} channels")
    return torch.tensor(values, dtype=torch.int32, device=device)


def _level_tensor(level: Tensor | int, x: Tensor, num_levels: int) -> Tensor:
    """`level` as an integer tensor [N] in [0, num_levels): checked on a CPU, clamped on a GPU, which must not wait."""
    if isinstance(level, int):
        if not 0 <= level < num_levels:
            raise ValueError(f"level is {level}; it must be between 0 and {num_levels - 1}")
        return torch.full((x.shape[0],), level, device=x.device)
    if not isinstance(level, Tensor) or level.is_floating_point() or level.dtype == torch.bool:
        kind = level.dtype if isinstance(level, Tensor) else type(level).__name__
        raise TypeError(f"level is {kind}; it must be an integer tensor [N] or an int")
    if tuple(level.shape) != (x.shape[0],):
        raise ValueError(f"level has shape {tuple(level.shape)}; it must be ({x.shape[0]},), a level for each sample")
    if level.device != x.device:
        raise ValueError(f"level is on {level.device}, but x is on {x.device}; they must be together")
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and level.numel():
        low, high = (int(v) for v in torch.aminmax(level))
        if low < 0 or high >= num_levels:
            raise ValueError(f"level holds {low if low < 0 else high}; it must be between 0 and {num_levels - 1}")
        return level
    return level.clamp(0, num_levels - 1)


class _Elastic(nn.Module):
    """The width tables of a layer, by level."""

    weight: Tensor
    in_widths: Tensor | None
    out_widths: Tensor | None
    backend: str

    def _set_widths(
        self,
        inputs: int,
        outputs: int,
        groups: int,
        in_widths: Sequence[int] | None,
        out_widths: Sequence[int] | None,
        backend: str,
    ) -> None:
        table_in = _widths_buffer("in_widths", in_widths, inputs, groups, self.weight.device)
        table_out = _widths_buffer("out_widths", out_widths, outputs, groups, self.weight.device)
        if table_in is not None and table_out is not None and len(table_in) != len(table_out):
            raise ValueError(f"in_widths has {len(table_in)} levels, but out_widths has {len(table_out)}")
        self.register_buffer("in_widths", table_in, persistent=False)
        self.register_buffer("out_widths", table_out, persistent=False)
        self.backend = backend
        self._widths_text = ", ".join(
            f"{name}={tuple(widths)}"
            for name, widths in (("in_widths", in_widths), ("out_widths", out_widths))
            if widths
        )

    @property
    def num_levels(self) -> int:
        """L, or 1 for a layer without widths."""
        table = self.in_widths if self.out_widths is None else self.out_widths
        return 1 if table is None else len(table)

    def _widths(self, level: Tensor | int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Input and output width of each sample, integer [N] or None."""
        level = _level_tensor(level, x, self.num_levels)
        in_width = None if self.in_widths is None else self.in_widths.index_select(0, level)
        out_width = None if self.out_widths is None else self.out_widths.index_select(0, level)
        return in_width, out_width

    def extra_repr(self) -> str:
        return ", ".join(text for text in (super().extra_repr(), self._widths_text) if text)


class DENConv2d(_Elastic, nn.Conv2d):
    """An `nn.Conv2d` whose channels are elastic: `forward(x, level)` runs sample n at `level[n]`.

    Same signature and state_dict as `nn.Conv2d`; with no level it is `nn.Conv2d`. `out_widths[l]` is the number of
    output channels that level l produces, `in_widths[l]` the number of input channels that it reads; None is all of
    them at every level. See `den_conv2d` for what a width means and which errors are raised.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
        *,
        in_widths: Sequence[int] | None = None,
        out_widths: Sequence[int] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._set_widths(in_channels, out_channels, groups, in_widths, out_widths, backend)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        in_widths: Sequence[int] | None = None,
        out_widths: Sequence[int] | None = None,
        backend: str = "auto",
    ) -> DENConv2d:
        """An elastic layer that shares `conv`'s parameters: train or load either, the other follows."""
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv is {type(conv).__name__}; it must be an nn.Conv2d")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,  # type: ignore[arg-type]
            device="meta",
            dtype=conv.weight.dtype,
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer._set_widths(conv.in_channels, conv.out_channels, conv.groups, in_widths, out_widths, backend)
        return layer.train(conv.training)

    def forward(self, x: Tensor, level: Tensor | int | None = None) -> Tensor:  # type: ignore[override]
        """x [N, C, H, W], level integer [N] (or one int for all; None: full) -> [N, O, H', W']."""
        if level is None or (self.in_widths is None and self.out_widths is None):
            return super().forward(x)
        return self.forward_widths(x, *self._widths(level, x))

    def forward_widths(
        self, x: Tensor, in_width: Tensor | None, out_width: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """The same with the widths themselves, integer [N] or None, for callers that already hold them.

        residual: added to the result, see `den_conv2d`.
        """
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        elif isinstance(padding, str):
            x = F.pad(x, self._reversed_padding_repeated_twice)
            padding = (0, 0)
        return den_conv2d(
            x,
            self.weight,
            self.bias,
            in_width,
            out_width,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            backend=self.backend,
            residual=residual,
        )


class DENLinear(_Elastic, nn.Linear):
    """An `nn.Linear` whose features are elastic: `forward(x, level)` runs row n at `level[n]`.

    Same signature and state_dict as `nn.Linear`; with no level it is `nn.Linear`. Row n reads the first `in_widths[l]`
    input features and produces the first `out_widths[l]` output features, the rest being exactly 0; see `DENConv2d`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        in_widths: Sequence[int] | None = None,
        out_widths: Sequence[int] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_widths(in_features, out_features, 1, in_widths, out_widths, backend)

    def forward(self, x: Tensor, level: Tensor | int | None = None) -> Tensor:  # type: ignore[override]
        """x [N, in_features], level integer [N] (or one int for all; None: full) -> [N, out_features]."""
        if level is None or (self.in_widths is None and self.out_widths is None):
            return super().forward(x)
        if x.dim() != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; with a level it must be [N, {self.in_features}]")
        return self.forward_widths(x, *self._widths(level, x))

    def forward_widths(self, x: Tensor, in_width: Tensor | None, out_width: Tensor | None) -> Tensor:
        """The same with the widths themselves, integer [N] or None: a 1x1 convolution of a map of one pixel."""
        x, weight = x[:, :, None, None], self.weight[:, :, None, None]
        return den_conv2d(x, weight, self.bias, in_width, out_width, backend=self.backend).flatten(1)


class DENBatchNorm2d(nn.Module):
    """Batch norm over the samples that ran a channel, with statistics and affine of its own for each level.

    Row `set_index * num_levels + level` of the [S, C] parameters and buffers serves a sample, S = num_sets *
    num_levels. A hidden norm, whose channels' distribution does not depend on the level, has one level and is given
    widths; the norm behind a contract convolution has a row a level; `num_sets` separates, say, tasks. A row or channel
    that no sample ran keeps its statistics. Statistics are computed in float32 or better.

    sync: False; True takes the statistics of a training batch over all processes of `torch.distributed`, each of which
    then has to call the module alike (see `sync_batch_norm`).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_levels: int = 1,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        num_sets: int = 1,
        device=None,
        dtype=None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_features", num_features),
            ("num_levels", num_levels),
            ("num_sets", num_sets),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive integer")
        self.num_features, self.num_levels, self.num_sets = num_features, num_levels, num_sets
        self.eps, self.momentum, self.affine, self.backend = eps, momentum, affine, backend
        self.sync = False
        rows = num_sets * num_levels
        shape = (rows, num_features)
        if affine:
            self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(shape, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros(rows, device=device, dtype=torch.long))

    def scale_shift(self, set_index: int = 0) -> tuple[Tensor, Tensor]:
        """The inference form of one set: y = scale[level] * x + shift[level]; both [num_levels, C]."""
        rows = self._rows(set_index)
        scale = torch.rsqrt(self.running_var[rows] + self.eps)
        if self.affine:
            scale = scale * self.weight[rows]
        shift = -self.running_mean[rows] * scale
        return scale, (shift + self.bias[rows] if self.affine else shift)

    def forward(
        self,
        x: Tensor,
        level: Tensor | None = None,
        width: Tensor | None = None,
        set_index: int = 0,
        *,
        relu: bool = False,
    ) -> Tensor:
        """Normalise x [N, C, H, W].

        level: integer [N], the row of each sample (None: the top one). width: integer [N]; channels at and beyond
        `width[n]` of sample n take no part in the statistics and come out 0, so width 0 leaves the sample out (None:
        all). relu: whether a ReLU follows, at no further cost.
        """
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be [N, {self.num_features}, H, W]")
        if not 0 <= set_index < self.num_sets:
            raise ValueError(f"set_index is {set_index}; it must be between 0 and {self.num_sets - 1}")
        row_N = None
        if self.num_levels > 1:
            if level is None:
                level = torch.full((x.shape[0],), self.num_levels - 1, device=x.device)
            row_N = _level_tensor(level, x, self.num_levels)
        if self.training:
            return self._normalise_batch(x, row_N, width, set_index, relu)
        taken_NC = None
        if width is not None:
            taken_NC = torch.arange(self.num_features, device=x.device) < width.view(-1, 1)
        scale_NC, shift_NC = (_of_samples(table, row_N, taken_NC) for table in self.scale_shift(set_index))
        y = torch.addcmul(shift_NC.to(x.dtype)[:, :, None, None], x, scale_NC.to(x.dtype)[:, :, None, None])
        return F.relu(y) if relu else y

    def _normalise_batch(
        self, x: Tensor, row_N: Tensor | None, width_N: Tensor | None, set_index: int, relu: bool
    ) -> Tensor:
        """By this batch's statistics, which also move the running ones."""
        rows = self._rows(set_index)
        weight, bias = (self.weight[rows], self.bias[rows]) if self.affine else (None, None)
        if self.sync and torch.distributed.is_initialized():
            y, mean_LC, var_LC, count_LC = batch_norm(
                x, row_N, width_N, weight, bias, self.num_levels, self.eps, relu, add_over_processes
            )
        else:
            y, mean_LC, var_LC, count_LC = torch.ops.den_kernels.batch_norm(
                x, row_N, width_N, weight, bias, self.num_levels, self.eps, relu, self.backend
            )
        self._track(mean_LC, var_LC, count_LC, x.shape[2] * x.shape[3], rows)
        return y

    def _rows(self, set_index: int) -> slice:
        return slice(set_index * self.num_levels, (set_index + 1) * self.num_levels)

    @torch.no_grad()
    def _track(self, mean_LC: Tensor, var_LC: Tensor, count_LC: Tensor, pixels: int, rows: slice) -> None:
        """Move the running statistics of what was run; the variance unbiased, as in nn.BatchNorm2d."""
        elements_LC = count_LC * pixels
        unbiased_LC = var_LC * (elements_LC / (elements_LC - 1).clamp(min=1))
        step_LC = torch.where(count_LC > 0, self.momentum, 0.0)
        for running, batch_LC in ((self.running_mean[rows], mean_LC), (self.running_var[rows], unbiased_LC)):
            running.add_(step_LC * (batch_LC - running))
        self.num_batches_tracked[rows] += (count_LC > 0).any(1)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_levels={self.num_levels}, num_sets={self.num_sets}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}"
        )


def _of_samples(table_LC: Tensor, row_N: Tensor | None, taken_NC: Tensor | None = None) -> Tensor:
    """Each sample's row of a table, [N, C] or broadcastable to it; 0 where a channel is not taken."""
    table_NC = table_LC if row_N is None else table_LC.index_select(0, row_N)
    return table_NC if taken_NC is None else torch.where(taken_NC, table_NC, 0)

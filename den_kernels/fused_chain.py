"""Fused layers one after the other in one operator call: no Python between them.

N samples, C channels, H W space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from den_kernels import ops as _ops  # noqa: F401  (registers torch.ops.den_kernels)
from den_kernels.backends import load, resolve
from den_kernels.block import output_shape
from den_kernels.chain import ConvArguments, Layer, flatten
from den_kernels.fused import FusedResidualBlock
from den_kernels.fused_conv import FusedConv2d
from den_kernels.fused_linear import FusedLinear
from den_kernels.fused_pool import FusedPool
from den_kernels.packed import changes, gather_weights
from den_kernels.plan import LevelPlan
from den_kernels.unwatched import unwatched

Flat = tuple[list[Tensor], str]  # from `flatten`
Bound = Callable[[Tensor, Tensor | None], Tensor]  # of x and levels; from a backend's `bind_chain`
_MOST_BOUND = 64  # shapes of batches


def joins_chain(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a network's ends (its first, dense convolution, its linear layer, the plan of its levels) are faster in
    the backend's chain than as operators of their own.

    See `backends.resolve` for the arguments and what is raised.
    """
    return resolve(backend, device, dtype).ENDS_IN_CHAIN


class FusedChain:
    """Layers one after the other, and perhaps a pool behind them, in one operator call.

    The layers stay the modules that they are; their packed weights are moved next to each other.

    Args:
        layers: `FusedResidualBlock`, or `FusedConv2d` of one level and all its channels; all of one backend.
        pool: what comes last; None: the last layer.
    """

    def __init__(self, layers: Sequence[FusedResidualBlock | FusedConv2d], pool: FusedPool | None = None) -> None:
        backends = {layer.backend for layer in layers}
        if len(backends) != 1:
            raise ValueError(f"layers use the backends {sorted(backends)}; a chain takes layers of one")
        for i, layer in enumerate(layers):
            if isinstance(layer, FusedConv2d) and not layer.dense:
                raise ValueError(f"layers[{i}] is a FusedConv2d with levels; a chain takes one of a single, full level")
        self.layers, self.pool, self.backend = list(layers), pool, backends.pop()
        gather_weights(self.layers)
        # What calls hand to the operator, for as long as no layer changes.
        self._changes = -1
        self._versions: list[int] = []
        self._classes: dict[tuple, tuple[int, ...]] = {}  # by shape and stride
        self._flat: dict[tuple, Flat] = {}
        self._binds = hasattr(load(self.backend), "bind_chain")
        self._bound: dict[tuple, Bound | None] = {}

    def __getstate__(self) -> dict:
        # What is kept for calls holds addresses, which a copy or another process must not use.
        return {**self.__dict__, "_changes": -1, "_versions": [], "_classes": {}, "_flat": {}, "_bound": {}}

    def __call__(
        self,
        x: Tensor,
        plan: LevelPlan | Tensor | None = None,
        set_index: int = 0,
        entry_stride: int | None = None,
        head: FusedLinear | None = None,
    ) -> Tensor:
        """The last layer's map, channels_last, with a pool [N, C], or with a head [N, K].

        x: [N, C, H, W] channels_last, never overwritten. plan: of the layers that have more than one level, or just
        their levels, int64 [N, B]; None where none has. entry_stride: of the first layer, a convolution, in place of
        its own; see `FusedConv2d.forward`. head: what stands behind the pool.
        """
        if self._binds and (plan is None or type(plan) is Tensor) and unwatched(x):
            bound = self.bind(x, set_index, entry_stride, head)
            if bound is not None:
                return bound(x, plan)
        entry = tuple(x.shape), entry_stride
        if torch.compiler.is_compiling():  # what is kept would be guarded on, and compiled anew once it is there
            flat = self._flatten(set_index, entry_stride, self._batch_classes(*entry), head)
        else:
            flat = self._kept(set_index, *entry, head)
        rows = (plan, None, None) if plan is None or isinstance(plan, Tensor) else plan
        return torch.ops.den_kernels.residual_chain(x, *rows, *flat, self.backend)

    def bind(
        self, x: Tensor, set_index: int = 0, entry_stride: int | None = None, head: FusedLinear | None = None
    ) -> Bound | None:
        """The backend's own call for batches like x, for as long as no layer changes; None where it has none.

        It takes x and levels int64 [N, B], contiguous, or None. PyTorch sees nothing of it: see `unwatched`.
        """
        self._forget_changed()
        kept = self._bound  # which other threads replace, and never empty
        key = x.shape, x.dtype, x.device, set_index, entry_stride, head, None if head is None else head.version
        if key not in kept:
            if len(kept) >= _MOST_BOUND:
                kept = self._bound = {}
            flat = self._kept(set_index, tuple(x.shape), entry_stride, head)
            kept[key] = load(self.backend).bind_chain(x, *flat) if self._binds else None
        return kept[key]

    def _forget_changed(self) -> None:
        count = changes()
        if count == self._changes:
            return
        # Other chains' layers are counted too.
        versions = [layer.version for layer in self.layers]
        if versions != self._versions:
            self._classes, self._flat, self._bound = {}, {}, {}
            self._versions = versions
        self._changes = count  # last: other threads then find nothing old

    def _kept(self, set_index: int, shape: tuple[int, ...], entry_stride: int | None, head: FusedLinear | None) -> Flat:
        """`_flatten`, kept for as long as no layer changes: it costs more than the call."""
        self._forget_changed()
        all_classes, flat = self._classes, self._flat
        if (shape, entry_stride) not in all_classes:
            all_classes[shape, entry_stride] = self._batch_classes(shape, entry_stride)
        classes = all_classes[shape, entry_stride]
        key = set_index, entry_stride, classes, head, None if head is None else head.version
        if key not in flat:
            flat[key] = self._flatten(set_index, entry_stride, classes, head)
        return flat[key]

    def _batch_classes(self, shape: tuple[int, ...], entry_stride: int | None) -> tuple[int, ...]:
        """Which form of its weights each layer takes for an x of this shape."""
        classes = []
        for i, layer in enumerate(self.layers):
            stride = entry_stride if i == 0 and entry_stride else math.prod(layer.strides)
            classes.append(layer.batch_class(shape, stride))
            shape = output_shape(shape, layer.out_channels, (stride, layer.pool_stride))
        return tuple(classes)

    def _flatten(
        self, set_index: int, entry_stride: int | None, classes: tuple[int, ...], head: FusedLinear | None
    ) -> Flat:
        arguments: list[Layer] = [
            layer.arguments(set_index, batch_class) for layer, batch_class in zip(self.layers, classes, strict=True)
        ]
        if entry_stride and isinstance(arguments[0], ConvArguments):
            arguments[0] = arguments[0]._replace(stride=entry_stride)
        pool = None if self.pool is None else self.pool.tables(set_index)
        return flatten(arguments, pool, None if head is None else head.arguments())

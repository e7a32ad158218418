"""Layers whose weights are packed for one backend when they are made, and where in memory these lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from den_kernels.backends import load

_changes = 0  # of all layers of this process


def changes() -> int:
    """Counts `PackedLayer.changed` of all layers: while it stays the same, no layer has reported a change."""
    return _changes


class PackedLayer(nn.Module):
    """A layer with packed weights, a form for each class of batch (see `den_kernels.backends`).

    backend: name of the one that they are packed for; set by the layer.
    pool_stride: that of a max pool behind it; 1: none.
    """

    backend: str
    pool_stride = 1

    def __init__(self) -> None:
        super().__init__()
        self._packed_names: list[str] = []
        self.version = 0  # how often its tensors were replaced

    def changed(self) -> None:
        """Its tensors are others than before: what was kept of them is out of date."""
        global _changes
        _changes += 1
        self.version += 1

    def _apply(self, fn, recurse=True):
        try:
            return super()._apply(fn, recurse)
        finally:
            self.changed()

    def register_forms(self, name: str, forms: Sequence[Tensor]) -> list[str]:
        """Keep a weight's forms as buffers, and return the buffer's name for each class of batch.

        Classes that share a form know it by the name of the first.
        """
        names = [f"{name}_{next(k for k, other in enumerate(forms) if other is form)}" for form in forms]
        for buffer, form in zip(names, forms, strict=True):
            self.register_buffer(buffer, form)
        self._packed_names += dict.fromkeys(names)
        return names

    def packed(self) -> dict[str, Tensor]:
        """The packed weights by name of their buffer."""
        return {name: getattr(self, name) for name in self._packed_names}

    def move_packed(self, tensors: Mapping[str, Tensor]) -> None:
        """Put copies of the packed weights in place of them."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self.changed()


def gather_weights(layers: Iterable[PackedLayer]) -> None:
    """Move the packed weights of layers of one backend next to each other, where it reads them best."""
    places = [(layer, name, tensor) for layer in layers for name, tensor in layer.packed().items()]
    if not places:
        return
    moved = load(places[0][0].backend).gather([tensor for *_, tensor in places])
    for (layer, name, _), tensor in zip(places, moved, strict=True):
        layer.move_packed({name: tensor})

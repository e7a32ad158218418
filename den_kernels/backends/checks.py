"""Checks of values that only a CPU can make without waiting for a device."""

from __future__ import annotations

from collections.abc import Iterable


def check_widths(name: str, widths: Iterable[int], channels: int, groups: int) -> None:
    """Raise ValueError unless every width is in [0, channels] and, with groups, a whole number of them."""
    step = channels // groups if groups > 1 else 1
    for n, width in enumerate(widths):
        if not 0 <= width <= channels:
            raise ValueError(f"{name}[{n}] is {width}; it must be between 0 and the {channels} channels of the tensor")
        if width % step:
            raise ValueError(f"{name}[{n}] is {width}; with groups={groups} it must be a multiple of {step} channels")

"""The hierarchy inside a block: how many of its hidden channels each level runs (section 3 and A.1 of the paper)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from numbers import Real


class Hierarchy:
    """Level ratios of a network's blocks: level l runs the first `ratios[l]` of a block's hidden channels.

    Args:
        ratios: share of the hidden channels at each level, in [0, 1], strictly ascending, the last 1. A first ratio
            of 0 is a level without any convolution: it exists in residual blocks alone, which pass their input on.

    Raises:
        TypeError: ratios is not a sequence of numbers.
        ValueError: ratios are empty, out of [0, 1], not ascending, or do not end at 1.
    """

    def __init__(self, ratios: Sequence[float]):
        if isinstance(ratios, str) or not isinstance(ratios, Sequence):
            raise TypeError(f"ratios is {ratios!r}; it must be a sequence of numbers such as (0, 0.25, 0.5, 1)")
        for ratio in ratios:
            if isinstance(ratio, bool) or not isinstance(ratio, Real):
                raise TypeError(f"ratios has {ratio!r}; every ratio must be a number in [0, 1]")
        shown = tuple(ratios)
        if not shown:
            raise ValueError("ratios is empty; it needs at least the full level, (1,)")
        if not all(0 <= ratio <= 1 for ratio in shown):
            raise ValueError(f"ratios is {shown}; every ratio must be in [0, 1]")
        if any(low >= high for low, high in itertools.pairwise(shown)):
            raise ValueError(f"ratios is {shown}; ratios must ascend strictly")
        if shown[-1] != 1:
            raise ValueError(f"ratios is {shown}; the last ratio must be 1, the full block")
        self.ratios = tuple(float(ratio) for ratio in shown)

    @property
    def num_levels(self) -> int:
        """L, the number of levels."""
        return len(self.ratios)

    @property
    def has_identity(self) -> bool:
        """Whether level 0 runs no channel at all."""
        return self.ratios[0] == 0

    def widths(self, channels: int, groups: int = 1) -> tuple[int, ...]:
        """Hidden channels of each level: `ratio * channels`, rounded to whole convolution groups.

        A ratio above 0 keeps at least one group. Halves round up.

        Args:
            channels: hidden channels of the full block.
            groups: convolution groups (for ResNeXt: paths) that a width may not cut.

        Returns: L ascending integers, the last `channels`.

        Raises:
            ValueError: channels is not a positive multiple of groups, or two levels round to the same width.
        """
        if groups < 1 or channels < 1 or channels % groups:
            raise ValueError(
                f"channels is {channels} with groups {groups}; channels must be a positive multiple of groups"
            )
        units = groups if groups > 1 else channels
        size = channels // units
        widths = tuple(size * max(1, math.floor(ratio * units + 0.5)) if ratio else 0 for ratio in self.ratios)
        if len(set(widths)) < len(widths):
            what = f"{channels} channels in {groups} groups" if groups > 1 else f"{channels} channels"
            raise ValueError(f"ratios {self.ratios} give {what} the widths {widths}; use fewer levels or more channels")
        return widths

    def __repr__(self) -> str:
        return f"Hierarchy({', '.join(f'{ratio:g}' for ratio in self.ratios)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hierarchy) and self.ratios == other.ratios

    def __hash__(self) -> int:
        return hash(self.ratios)

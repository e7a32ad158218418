"""The one table of shapes and level mixes, for benchmarks and tests alike.

Suffixes: N samples, B blocks, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from den.timing import PAPER_COST, even_shares, spread

RATIOS = (0.0, 0.25, 0.5, 1.0)
BATCHES = (1, 8, 64, 256)
TASK = {"cifar100": 100}

# Largest error over largest value, against the float64 reference.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
WINOGRAD_TOLERANCE = 1e-3  # float32


# Level mixes


@dataclass(frozen=True)
class Mix:
    """How the levels of a batch are distributed.

    mean_cost: the share of a full block's work that the mix aims at.
    shares: of the levels, by their ratios. Without either, every level equally often.
    """

    name: str
    meaning: str
    shares: Mapping[float, float] | None = field(default=None, hash=False)
    mean_cost: float | None = None

    def fits(self, ratios: Sequence[float]) -> bool:
        """Whether a hierarchy of these ratios has the levels that the mix takes."""
        return self.shares is None or set(self.shares) <= set(ratios)

    def probabilities(self, ratios: Sequence[float] = RATIOS) -> list[float]:
        """Share of each level, L numbers that sum to 1. Raises ValueError where the ratios cannot give the mix."""
        if self.mean_cost is not None:
            return even_shares(ratios, self.mean_cost)
        if self.shares is None:
            return [1 / len(ratios)] * len(ratios)
        if not self.fits(ratios):
            raise ValueError(f"mix {self.name!r} takes ratios {tuple(self.shares)}, but ratios is {tuple(ratios)}")
        return [self.shares.get(ratio, 0.0) for ratio in ratios]

    def levels(self, batch: int, blocks: int, ratios: Sequence[float] = RATIOS, seed: int = 0) -> Tensor:
        """Levels int64 [N, B]: the shares met as exactly as whole slots allow, in random order."""
        return spread(self.probabilities(ratios), batch, blocks, seed)


def single(level: int, name: str | None = None, meaning: str | None = None) -> Mix:
    """Every sample and block at one of the four levels of RATIOS."""
    ratio = RATIOS[level]
    return Mix(name or f"level{level}", meaning or f"every block at {ratio:g} of its channels", {ratio: 1.0})


FULL = single(3, "full", "every block at its top level: no FLOP saved")
UNIFORM = Mix("uniform", "every level equally often")
PAPER = Mix("paper", "mean cost 0.53, as in Table 2b of the paper", mean_cost=PAPER_COST)
SKIP = single(0, "skip", "every block left out")
TOP1 = Mix("top1-of-4", "one in four at the top level, the rest left out", {0.0: 0.75, 1.0: 0.25})
MIXES = {mix.name: mix for mix in (FULL, UNIFORM, PAPER, TOP1, single(2), single(1), SKIP)}


# Networks


@dataclass(frozen=True)
class ModelCase:
    """A network of `den.create_model`, its hierarchy, and the square images that it is timed on."""

    name: str
    image_size: int
    batches: tuple[int, ...] = BATCHES
    ratios: tuple[float, ...] = RATIOS

    @property
    def half(self) -> int:
        """The level of half the channels: that of the static slim network."""
        return self.ratios.index(0.5)


MODELS = (
    ModelCase("wrn_32_4", 32),
    ModelCase("resnet_42", 32, (1, 8, 64)),
    ModelCase("resnext_29_4x64d", 32, (1, 8, 64)),
    ModelCase("resnet_50", 224, (1, 8)),
    ModelCase("vgg_16", 32, (1, 8, 64), RATIOS[1:]),  # no shortcut that a level 0 could leave alone
)
RATIOS_OF = {case.name: case.ratios for case in MODELS}


# Residual blocks


@dataclass(frozen=True)
class BlockCase:
    """A residual block: kernel sizes, strides and groups of its convolutions, and the map that it reads.

    channels: in, hidden, out. hidden widths are `RATIOS` of the hidden channels, in whole groups.
    """

    name: str
    channels: tuple[int, int, int]
    size: int
    kernels: tuple[int, ...] = (3, 3)
    strides: tuple[int, ...] = (1, 1)
    groups: tuple[int, ...] = (1, 1)
    preactivation: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden width of each level."""
        return tuple(int(r * self.channels[1]) for r in RATIOS)

    @property
    def weight_shapes(self) -> list[tuple[int, int, int, int]]:
        """[O, I / groups, k, k] of each convolution."""
        inside, hidden, outside = self.channels
        ends = [inside, *[hidden] * (len(self.kernels) - 1), outside]
        return [
            (ends[i + 1], ends[i] // g, k, k) for i, (k, g) in enumerate(zip(self.kernels, self.groups, strict=True))
        ]

    def macs(self) -> tuple[int, ...]:
        """Multiply-adds for one sample at each level."""
        totals = [0] * len(RATIOS)
        size = self.size
        last = len(self.kernels) - 1
        for i, shape in enumerate(self.weight_shapes):
            size = -(-size // self.strides[i])
            for l, width in enumerate(self.widths):
                share = width / self.channels[1]
                # An inner ungrouped convolution is elastic on both sides; a grouped one loses whole groups, once.
                elastic = share * share if 0 < i < last and self.groups[i] == 1 else share
                totals[l] += round(math.prod(shape) * size * size * elastic)
        return tuple(totals)


BLOCKS = (
    BlockCase("wrn-64@32", (64, 64, 64), 32),
    BlockCase("wrn-128@16", (128, 128, 128), 16),
    BlockCase("wrn-256@8", (256, 256, 256), 8),
    BlockCase("wrn-64-128@32/2", (64, 128, 128), 32, strides=(2, 1)),
    BlockCase("resnet-64@32", (64, 64, 64), 32, preactivation=False),
    BlockCase("resnet50-256@28", (256, 64, 256), 28, (1, 3, 1), (1, 1, 1), (1, 1, 1), preactivation=False),
    BlockCase("resnext-4x64d@32", (64, 256, 64), 32, (1, 3, 1), (1, 1, 1), (1, 4, 1), preactivation=False),
)


# The primitive


@dataclass(frozen=True)
class ConvCase:
    """One elastic convolution; `elastic` says which side: "out" (expand), "in" (contract) or "both"."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    size: int
    elastic: str
    stride: int = 1
    groups: int = 1


CONVS = (
    ConvCase("3x3-expand-64@32", 64, 64, 3, 32, "out"),
    ConvCase("3x3-contract-64@32", 64, 64, 3, 32, "in"),
    ConvCase("3x3-expand-256@8", 256, 256, 3, 8, "out"),
    ConvCase("3x3-contract-256@8", 256, 256, 3, 8, "in"),
    ConvCase("3x3-inner-128@16", 128, 128, 3, 16, "both"),
    ConvCase("3x3-expand-64-128@32/2", 64, 128, 3, 32, "out", stride=2),
    ConvCase("1x1-expand-256-64@28", 256, 64, 1, 28, "out"),
    ConvCase("3x3-grouped-256@32", 256, 256, 3, 32, "both", groups=4),
)

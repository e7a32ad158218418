"""Static slim network: the backbone with narrower hidden layers, the same for every image, trained alone.

What a DEN has to beat at equal FLOPs. Suffixes: B blocks, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from den.baselines.base import BaselineConfig, Method, levels, supervised
from den.blocks import Block
from den.config import Rule
from den.flops import block_macs, fixed_macs
from den.loop import Phase
from den.metrics import Policy
from den.model import DEN, create_model
from den.tasks import Task


@dataclass
class SlimConfig(BaselineConfig):
    """A static slim network's settings."""

    share: float = 0.5
    """FLOPs of it as a share of the full network's: those of the DEN that it is to be compared with."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        return [*super().rules(), ("share", self.share, 0 < self.share <= 1, "above 0 and at most 1")]


def slim_path(
    model: str, share: float, image_size: int | tuple[int, int], options: Mapping[str, Any] | None = None
) -> tuple[tuple[float, ...], list[int]]:
    """The ratios and the path [B] of the static network whose FLOPs are nearest to a share of the full network's.

    The hidden layers of all blocks have one ratio, a multiple of 1/U where U is the least number of channels (for
    ResNeXt: paths) of any block; where that alone would miss, evenly spread blocks have the next multiple.

    Returns: ratios for `den.create_model`, and a level for each block. Raises ValueError for a share out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1")
    more = {**(options or {}), "bn": "shared", "selector": {"widths": (4,), "blocks_per_stage": 1}}
    with torch.device("meta"):  # they are counted, not run
        full = create_model(model, {"any": 2}, **more).estimator
        units = min(_units(block) for block in full.blocks)  # type: ignore[arg-type]
        first = 0 if full.hierarchy.has_identity else 1
        grid = [unit / units for unit in range(first, units + 1)]
        scale = create_model(model, {"any": 2}, **{**more, "ratios": grid}).estimator
    macs_BL = block_macs(scale, image_size)
    fixed = fixed_macs(scale, image_size)
    wanted = share * (fixed + int(macs_BL[:, -1].sum())) - fixed
    totals_L = macs_BL.sum(0)
    lower = max(0, min(len(grid) - 2, int((totals_L <= wanted).sum()) - 1))
    blocks = len(macs_BL)
    paths = [
        [lower + math.floor((b + 1) * m / blocks) - math.floor(b * m / blocks) for b in range(blocks)]
        for m in range(blocks + 1)
    ]
    misses = [abs(float(macs_BL.gather(1, torch.tensor(path)[:, None]).sum()) - wanted) for path in paths]
    path = paths[min(range(len(paths)), key=misses.__getitem__)]
    ratios = tuple(dict.fromkeys((grid[lower], grid[lower + 1], 1.0)))
    return ratios, [level - lower for level in path]


def _units(block: Block) -> int:
    """What a width may be counted in: channels, or whole groups of them."""
    groups = getattr(block, "groups", 1)
    return groups if groups > 1 else block.widths[-1]


class Slim(Method):
    """A DEN of which one path is ever run, in training as in use. `den.dense(model, level=path)` is it alone."""

    name = "slim"
    Config = SlimConfig
    network: DEN

    def build(self) -> DEN:
        size = self.tasks[0].image_size
        ratios, self.path = slim_path(self.model_name, self.config.share, size, self.options)
        self.options = {**self.options, "ratios": ratios}
        return self.create(self.tasks)

    def set_up(self) -> None:
        self.net = self.loop.setup("network", self.network.estimator, self.sgd(self.network.estimator.parameters()))

    def phases(self) -> list[Phase]:
        step = supervised(lambda batch: self.net(batch.x, levels(self.path, batch.x), batch.task.name))
        return [self.weights_phase("network", step, begin=self.net.train)]

    def policies(self, task: Task) -> dict[str, Policy]:
        return {"fixed": self.path}

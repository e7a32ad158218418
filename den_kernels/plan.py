"""Samples grouped by level: their order and counts, built once per forward, on the levels' device, without a sync.

Suffixes: N samples, B blocks, L levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LevelPlan(NamedTuple):
    """The levels of a batch with what every block needs to schedule them. All int32, on one device.

    level_BN: level of each sample in each block. order_BN: samples by descending level, ties in batch order, so that
    the dearest start first and level 0 comes last. count_BL: samples whose level is at least l; `count[0] == N`.
    """

    level_BN: Tensor
    order_BN: Tensor
    count_BL: Tensor

    def block(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Level [N], order [N] and count [L] of block b."""
        return self.level_BN[b], self.order_BN[b], self.count_BL[b]


def plan_levels(level_NB: Tensor, num_levels: int) -> LevelPlan:
    """The plan of levels [N, B] in plain PyTorch, on their device. Its shapes do not depend on the levels.

    A level out of range is taken as the nearest: telling the caller would wait for the device.
    """
    level_BN = level_NB.t().clamp(0, num_levels - 1).to(torch.int32, memory_format=torch.contiguous_format)
    order_BN = torch.argsort(level_BN, dim=1, descending=True, stable=True).to(torch.int32)
    steps_L = torch.arange(num_levels, device=level_NB.device)
    count_BL = (level_BN.unsqueeze(2) >= steps_L).sum(1, dtype=torch.int32)
    return LevelPlan(level_BN, order_BN, count_BL)

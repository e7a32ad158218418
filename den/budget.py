"""Cost held to what is wanted: a price of cost found while training, and a selector that is told its budget.

A budget is the wanted mean cost, in (0, 1], in the unit that the selector was trained with. Prices and conditioning are
tables over a grid of budgets, interpolated linearly between its points.

N samples, B blocks, L levels, C features, K points of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from den.losses import path_cost

GRID = 11
HIDDEN = 16
LEAST = 0.05  # of the budgets drawn in training
LOG_RHO = (math.log(1e-3), math.log(1e3))
PROPORTION, RECENT = 5.0, 0.2
Budget = float | Tensor


def check_budget(budget: Budget, x: Tensor) -> Tensor:
    """A budget as the selector reads it: [N] on x's device.

    budget: a number, or numbers [N]. Raises TypeError or ValueError; values are checked on a CPU alone, and clamped.
    """
    if not isinstance(budget, Tensor):
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise TypeError(f"budget is {budget!r}; it must be a number or a tensor [N]")
        if not 0 < budget <= 1:
            raise ValueError(f"budget is {budget}; it must be above 0 and at most 1, a share of the full cost")
        return torch.full((x.shape[0],), float(budget), device=x.device)
    if not budget.is_floating_point():
        raise TypeError(f"budget has dtype {budget.dtype}; it must be floating point")
    if budget.shape not in ((), (x.shape[0],)):
        raise ValueError(f"budget has shape {tuple(budget.shape)}; it must be [N], here [{x.shape[0]}]")
    if budget.device != x.device:
        raise ValueError(f"budget is on {budget.device}, but x is on {x.device}; they must be together")
    if budget.device.type == "cpu" and not bool(((budget > 0) & (budget <= 1)).all()):
        raise ValueError("budget holds values that are not above 0 and at most 1")
    return budget.float().clamp(0, 1).expand(x.shape[0])


def at_budget(table_K: Tensor, budget_N: Tensor) -> Tensor:
    """A table over budgets 0 to 1 at some of them, interpolated: [N]."""
    place_N = budget_N * (len(table_K) - 1)
    low_N = place_N.long().clamp(max=len(table_K) - 2)
    table_K = table_K.float()
    return torch.lerp(table_K[low_N], table_K[low_N + 1], place_N - low_N)


class Conditioning(nn.Module):
    """What tells a selector its budget: features scaled and shifted (FiLM, Perez et al. 2018), and a price of cost.

    The logits lose price(budget) * cost of the level. Training finds the scale and shift; `calibrate` the price, which
    makes the mean cost that of the budget: for fixed features the cost of the argmax never rises with the price.

    default: the budget where none is given.
    """

    cost_BL: Tensor
    price_K: Tensor

    def __init__(self, features: int, cost_BL: Tensor, default: float):
        super().__init__()
        self.default = default
        self.film = nn.Sequential(nn.Linear(1, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * features))
        self.register_buffer("cost_BL", cost_BL.float().clone())
        self.register_buffer("price_K", torch.zeros(GRID))

    def neutral(self) -> None:
        """Start as a selector that knows no budget."""
        nn.init.zeros_(cast(nn.Linear, self.film[2]).weight)

    def features(self, features_NC: Tensor, budget_N: Tensor) -> Tensor:
        """Features [N, C] of an image as they are read at its budget."""
        scale, shift = self.film(2 * budget_N[:, None].to(features_NC.dtype) - 1).chunk(2, 1)
        return features_NC * (1 + scale) + shift

    def priced(self, logits_NBL: Tensor, budget_N: Tensor) -> Tensor:
        """Logits less the price of each level."""
        price_N = at_budget(self.price_K, budget_N)
        return logits_NBL - price_N[:, None, None].to(logits_NBL.dtype) * self.cost_BL

    @torch.no_grad()
    def calibrate(self, logits_at: Callable[[Tensor], Tensor], count: int) -> None:
        """Set the price at each budget of the grid so that images of `logits_at` cost that budget in the mean.

        logits_at: from budgets [count] to the priced logits [count, B, L] of as many images.
        """
        device = self.price_K.device
        for k in range(1, GRID):
            budget = k / (GRID - 1)
            budget_N = torch.full((count,), budget, device=device)
            before = self.price_K[k]
            logits = logits_at(budget_N).float() + before * self.cost_BL
            low, high = torch.tensor(-100.0, device=device), torch.tensor(100.0, device=device)
            for _ in range(40):
                price = (low + high) / 2
                mean = path_cost((logits - price * self.cost_BL).argmax(2), self.cost_BL).mean()
                dear = mean > budget
                low, high = torch.where(dear, price, low), torch.where(dear, high, price)
            self.price_K[k] = high
        self.price_K[0] = 2 * self.price_K[1] - self.price_K[2]


class RhoControl(nn.Module):
    """rho of equation 5: fixed, or found by dual ascent, so that the mean cost is the one wanted.

    log rho rises by `rate` times what the argmax paths cost beyond what is wanted, in every step, and falls likewise.
    Ascent alone overshoots and swings, for paths answer late; so log rho also has a part in proportion to that excess
    (Stooke et al. 2020). With budgets there is a rho for each: a table over the grid.

    rho: to begin with. target: mean cost wanted; None: rho stays, unless budgets are given.
    """

    log_rho_K: Tensor
    excess_K: Tensor

    def __init__(self, rho: float, target: float | None, rate: float, budgets: bool):
        super().__init__()
        self.fixed = rho if target is None and not budgets else None
        self.target, self.rate = target, rate
        start = math.log(min(max(rho, 1e-3), 1e3))
        self.register_buffer("log_rho_K", torch.full((GRID if budgets else 1,), start))
        self.register_buffer("excess_K", torch.zeros_like(self.log_rho_K))  # of the last steps, a running mean

    def rho(self, budget_N: Tensor | None) -> Tensor | float:
        """rho for images of these budgets, [N]; or of all, a number or a scalar."""
        if self.fixed is not None:
            return self.fixed
        log_rho_K = (self.log_rho_K + PROPORTION * self.excess_K).clamp(*LOG_RHO)
        return log_rho_K[0].exp() if budget_N is None else at_budget(log_rho_K, budget_N).exp()

    @torch.no_grad()
    def update(self, cost_N: Tensor, budget_N: Tensor | None) -> None:
        """After a step in which images (of all processes) took paths of this cost."""
        if self.fixed is not None:
            return
        if budget_N is None:
            mean_K, seen_K = (cost_N.mean() - cast(float, self.target))[None], torch.ones_like(self.log_rho_K)
        else:
            nearest_N = (budget_N * (GRID - 1)).round().long()
            excess_K = torch.zeros_like(self.log_rho_K).index_add(0, nearest_N, cost_N - budget_N)
            count_K = torch.zeros_like(self.log_rho_K).index_add(0, nearest_N, torch.ones_like(cost_N))
            mean_K, seen_K = excess_K / count_K.clamp(min=1), count_K.clamp(max=1)
        self.log_rho_K.add_(self.rate * mean_K).clamp_(*LOG_RHO)
        self.excess_K += RECENT * seen_K * (mean_K - self.excess_K)

"""Equations 3 to 8 of the paper: what the estimator and the selector minimise, and how paths are drawn.

N samples, B blocks, L levels, K sampled paths (the paper's |Z|).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sparsity(level: Tensor, ratio_BL: Tensor, rho: float) -> Tensor:
    """S(z) of equation 5, per sample: rho * (mean over blocks of d_i(l_i))^2.

    level: integer [..., B]; ratio_BL: d_i(l), the share of block i's parameters that level l runs. Returns [...].
    """
    return rho * path_cost(level, ratio_BL).square()


def path_cost(level: Tensor, ratio_BL: Tensor) -> Tensor:
    """The mean over blocks of d_i(l_i), in [0, 1]: the inside of equation 5. level [..., B] -> [...]."""
    blocks = torch.arange(ratio_BL.shape[0], device=level.device)
    return ratio_BL[blocks, level.long()].mean(-1)


def log_prob(logits_NBL: Tensor, level: Tensor) -> Tensor:
    """log P(z; x) of equation 3: the sum over blocks of log C_i(l_i). level integer [..., N, B] -> [..., N]."""
    log_C = F.log_softmax(logits_NBL, dim=-1).expand(*level.shape, -1)
    return log_C.gather(-1, level.long().unsqueeze(-1)).squeeze(-1).sum(-1)


def initial_levels(
    num_samples: int, num_blocks: int, num_levels: int, tau: float, generator: torch.Generator | None = None
) -> Tensor:
    """Paths [N, B] drawn from equation 8: the full one with probability tau, otherwise any path alike."""
    level_NB = torch.randint(num_levels, (num_samples, num_blocks), generator=generator)
    full_N = torch.rand(num_samples, generator=generator) < tau
    return torch.where(full_N.unsqueeze(1), num_levels - 1, level_NB)


def sample_levels(
    logits_NBL: Tensor, num_paths: int, epsilon: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Paths [K, N, B] drawn from the selector; with probability epsilon a path is uniform instead (epsilon-greedy)."""
    n, b, num_levels = logits_NBL.shape
    probs = logits_NBL.detach().softmax(-1).reshape(n * b, num_levels).cpu()
    drawn = torch.multinomial(probs, num_paths, replacement=True, generator=generator).t().reshape(num_paths, n, b)
    uniform = torch.randint(num_levels, (num_paths, n, b), generator=generator)
    explore = torch.rand((num_paths, n, 1), generator=generator) < epsilon
    return torch.where(explore, uniform, drawn).to(logits_NBL.device)


def advantage(reward_KN: Tensor, baseline: str) -> Tensor:
    """R(z; x, y, t) of equation 6 less a baseline that does not depend on z.

    "none" is the paper. "leave_one_out" subtracts the mean of the sample's other K - 1 paths: the same expected
    gradient with far less variance, since most of R is how hard the image is, not which path it took. K is at least 2.
    """
    if baseline == "none":
        return reward_KN
    if baseline != "leave_one_out":
        raise ValueError(f"baseline is {baseline!r}; it must be 'none' or 'leave_one_out'")
    k = reward_KN.shape[0]
    if k < 2:
        raise ValueError(f"baseline is 'leave_one_out' with {k} sampled path; it needs at least 2")
    return (reward_KN - reward_KN.mean(0)) * (k / (k - 1))


def selector_loss(logits_NBL: Tensor, level_KNB: Tensor, advantage_KN: Tensor) -> Tensor:
    """A scalar whose gradient is equation 7: the mean over samples and paths of R * grad log P(z; x)."""
    return (advantage_KN.detach() * log_prob(logits_NBL, level_KNB)).mean()

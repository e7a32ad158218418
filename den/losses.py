"""Equations 3 to 8 of the paper: what the estimator and the selector minimise, and how paths are drawn.

N samples, B blocks, L levels, K sampled paths (the paper's |Z|).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sparsity(level: Tensor, ratio_BL: Tensor, rho: float | Tensor) -> Tensor:
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
    probs_NBL, device = logits_NBL.detach().softmax(-1), logits_NBL.device
    shape = (num_paths, n, b)
    on_host = device.type == "cpu"
    if on_host:
        flat = probs_NBL.reshape(n * b, num_levels)
        drawn = torch.multinomial(flat, num_paths, replacement=True, generator=generator).t().reshape(shape)
    else:
        drawn = levels_at(probs_NBL, _to_device(torch.rand(shape, generator=generator), device))
    uniform = torch.randint(num_levels, shape, generator=generator)
    explore = torch.rand((num_paths, n, 1), generator=generator) < epsilon
    if on_host:
        return torch.where(explore, uniform, drawn)
    instead = _to_device(torch.where(explore, uniform, -1), device)
    return torch.where(instead < 0, drawn, instead)


def levels_at(probs_NBL: Tensor, uniform_KNB: Tensor) -> Tensor:
    """The levels [K, N, B] at which the distributions' running sums pass these numbers in [0, 1).

    What `torch.multinomial` draws, from random numbers of the host, and without waiting for the device.
    """
    running_NBL = probs_NBL.cumsum(-1)
    running_NBL = running_NBL / running_NBL[..., -1:]  # the last is 1, so that no level of probability 0 is drawn
    return (uniform_KNB.unsqueeze(-1) >= running_NBL[..., :-1]).sum(-1)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """From the host; on a GPU without waiting for it, which a copy of pageable memory would."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def expected_square_cost(logits_NBL: Tensor, ratio_BL: Tensor) -> Tensor:
    """E[(mean over blocks of d_i(l_i))^2] over paths drawn from the selector, [N]: the expectation of equation 5 / rho.

    The blocks' costs are independent, with means mu_i and variances v_i: (mean mu_i)^2 + sum v_i / B^2.
    """
    C = logits_NBL.softmax(-1)
    mean_NB = (C * ratio_BL).sum(-1)
    variance_NB = (C * ratio_BL.square()).sum(-1) - mean_NB.square()
    return mean_NB.mean(-1).square() + variance_NB.sum(-1) / ratio_BL.shape[0] ** 2


def entropy(logits_NBL: Tensor) -> Tensor:
    """Entropy of a block's levels in nats, mean over blocks: [N]."""
    log_C = logits_NBL.log_softmax(-1)
    return -(log_C.exp() * log_C).sum(-1).mean(-1)


def leave_one_out(reward_KN: Tensor) -> Tensor:
    """R(z; x, y, t) of equation 6 less the mean of the sample's other K - 1 paths.

    The same expected gradient with far less variance, since most of R is how hard the image is, not which path it took
    (Kool et al. 2019). Raises ValueError for K = 1.
    """
    k = reward_KN.shape[0]
    if k < 2:
        raise ValueError(f"leave_one_out has {k} sampled path; it needs at least 2")
    return (reward_KN - reward_KN.mean(0)) * (k / (k - 1))


def selector_loss(logits_NBL: Tensor, level_KNB: Tensor, advantage_KN: Tensor) -> Tensor:
    """A scalar whose gradient is equation 7: the mean over samples and paths of R * grad log P(z; x).

    advantage_KN: R, perhaps less a baseline that does not depend on the path.
    """
    return (advantage_KN.detach() * log_prob(logits_NBL, level_KNB)).mean()


def gumbel_gates(logits_NBL: Tensor, temperature: float, uniform_NBL: Tensor) -> Tensor:
    """One-hot levels [N, B, L] drawn from the selector, with the gradient of the softmax at this temperature.

    Straight-through Gumbel-softmax (Jang et al. 2017). uniform_NBL: random numbers in [0, 1).
    """
    tiny = torch.finfo(uniform_NBL.dtype).tiny
    noise = -(-uniform_NBL.clamp(min=tiny).log()).clamp(min=tiny).log()
    soft = ((logits_NBL + noise) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())


def soft_cross_entropy(logits_NC: Tensor, target_NC: Tensor) -> Tensor:
    """Cross-entropy to another network's logits, whose gradient is stopped: the distillation term, a mean over N."""
    return -(target_NC.detach().softmax(-1) * logits_NC.log_softmax(-1)).sum(-1).mean()

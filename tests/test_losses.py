"""Equations 3 to 8, against hand computation, enumeration of all paths, and sampled frequencies."""

from __future__ import annotations

import itertools

import pytest
import torch

from den import losses

RATIOS = torch.tensor([[0.0, 0.25, 0.5, 1.0], [0.0, 0.25, 0.5, 1.0]])


def test_sparsity_by_hand() -> None:
    level = torch.tensor([[0, 0], [3, 3], [1, 2], [0, 3]])
    expected = 0.1 * torch.tensor([0.0, 1.0, ((0.25 + 0.5) / 2) ** 2, 0.25])
    torch.testing.assert_close(losses.sparsity(level, RATIOS, 0.1), expected)
    torch.testing.assert_close(losses.path_cost(level.expand(3, 4, 2), RATIOS)[1, 2], torch.tensor(0.375))


def test_log_prob_is_the_product_over_blocks() -> None:
    logits = torch.randn(5, 2, 4)
    level = torch.randint(4, (3, 5, 2))
    probs = logits.softmax(2)
    for k, n in itertools.product(range(3), range(5)):
        expected = probs[n, 0, level[k, n, 0]] * probs[n, 1, level[k, n, 1]]
        torch.testing.assert_close(losses.log_prob(logits, level)[k, n].exp(), expected)


def test_probabilities_of_all_paths_sum_to_one() -> None:
    logits = torch.randn(1, 3, 4, dtype=torch.float64)
    paths = torch.tensor(list(itertools.product(range(4), repeat=3))).unsqueeze(1)
    assert float(losses.log_prob(logits, paths).exp().sum()) == pytest.approx(1)


def test_initial_levels_follow_equation_8() -> None:
    level = losses.initial_levels(40_000, 2, 4, 0.75, torch.Generator().manual_seed(0))
    frequency = torch.bincount(level[:, 0] * 4 + level[:, 1], minlength=16) / len(level)
    assert float(frequency[15]) == pytest.approx(0.75 + 0.25 / 16, abs=0.01)
    torch.testing.assert_close(frequency[:15], torch.full((15,), 0.25 / 16), atol=0.004, rtol=0)


def test_sampled_levels_follow_the_selector_and_epsilon() -> None:
    logits = torch.tensor([[[2.0, 0.0, -1.0], [0.0, 0.0, 3.0]]])
    for epsilon in (0.0, 0.5):
        drawn = losses.sample_levels(logits, 40_000, epsilon, torch.Generator().manual_seed(1))
        assert drawn.shape == (40_000, 1, 2)
        for block in (0, 1):
            frequency = torch.bincount(drawn[:, 0, block], minlength=3) / 40_000
            expected = (1 - epsilon) * logits[0, block].softmax(0) + epsilon / 3
            torch.testing.assert_close(frequency, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_selector_gradient_is_the_expectation_of_all_paths(baseline: str) -> None:
    """Equation 7, sampled, against the gradient of equation 6 with every path enumerated."""
    logits = torch.randn(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    paths = torch.tensor(list(itertools.product(range(3), repeat=2))).unsqueeze(1)
    reward = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 2
    exact = (losses.log_prob(logits, paths).exp()[:, 0] * reward).sum()
    (expected,) = torch.autograd.grad(exact, logits)

    batch = 100_000
    many = logits.expand(batch, -1, -1)
    level = losses.sample_levels(many, 4, 0.0, torch.Generator().manual_seed(4))
    drawn_reward = reward[level[..., 0] * 3 + level[..., 1]]
    advantage = losses.leave_one_out(drawn_reward) if baseline == "leave_one_out" else drawn_reward
    loss = losses.selector_loss(many, level, advantage)
    (actual,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(actual, expected, atol=0.02 if baseline == "none" else 0.005, rtol=0)


def test_the_baseline_lowers_the_variance() -> None:
    reward = 5 + torch.rand(4, 1000, generator=torch.Generator().manual_seed(0))
    centred = losses.leave_one_out(reward)
    assert float(centred.square().mean()) < 0.01 * float(reward.square().mean())
    torch.testing.assert_close(centred[0], reward[0] - reward[1:].mean(0))


def test_leaving_one_out_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 sampled path; it needs at least 2"):
        losses.leave_one_out(torch.zeros(1, 3))

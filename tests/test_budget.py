"""A selector that is told its budget: one model for every mean cost, in training form and frozen."""

from __future__ import annotations

import math
from pathlib import Path

import den_cases as cases
import pytest
import torch

import den
from den.budget import GRID, Conditioning, RhoControl, at_budget
from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from den.losses import path_cost


def budgeted(**more) -> den.DEN:
    """A model whose conditioning is not neutral."""
    model = cases.wrn(budget=0.5, **more)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.selector.condition.film[2].weight.normal_(0, 0.3, generator=generator)
        model.selector.condition.price_K.copy_(torch.linspace(3, -3, GRID))
    return model


def images(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_tables_are_interpolated() -> None:
    table = torch.arange(GRID).float() ** 2
    torch.testing.assert_close(
        at_budget(table, torch.tensor([0.1, 0.25, 1.0])), torch.tensor([1.0, (4 + 9) / 2, 100.0])
    )


def test_the_price_is_taken_from_the_logits() -> None:
    model = budgeted()
    selector, condition = model.selector, model.selector.condition
    x = images()
    priced = selector(x, 0.2)
    condition.price_K.zero_()
    plain = selector(x, 0.2)
    torch.testing.assert_close(priced, plain - 1.8 * den.cost_ratios(model))
    assert not torch.allclose(plain, selector(x, 0.8))  # features are read otherwise


@pytest.mark.parametrize("backend", ["grouped", "auto"])
def test_frozen_follows_the_budget_as_the_model_does(backend: str) -> None:
    model = budgeted()
    frozen = den.freeze(model, backend=backend)
    x = images()
    for budget in (None, 0.1, 0.73, torch.linspace(0.05, 1, 16)):
        expected, actual = model(x, budget=budget), frozen(x, budget=budget)
        torch.testing.assert_close(actual.level_probs, expected.level_probs, atol=1e-4, rtol=1e-4)
        assert torch.equal(actual.level, expected.level)
    assert torch.equal(model(x).level, model(x, budget=0.5).level)
    mixed = model(x, budget=torch.linspace(0.05, 1, 16)).level_probs
    torch.testing.assert_close(mixed[3], model(x[3:4], budget=float(torch.linspace(0.05, 1, 16)[3])).level_probs[0])
    assert den.freeze(model, torch.bfloat16)(x, budget=0.3).level.shape == (16, 3)


def test_calibration_makes_the_mean_cost_the_budget() -> None:
    ratio_BL = torch.tensor([[0, 0.25, 0.5, 1]]).expand(6, -1)
    condition = Conditioning(4, ratio_BL, 0.5)
    condition.price_K.fill_(0.7)  # as calibrated before
    base = torch.randn(500, 6, 4, generator=torch.Generator().manual_seed(0))
    condition.calibrate(lambda budget: condition.priced(base * (1 + budget[:, None, None]), budget), 500)
    for budget in (0.1, 0.3, 0.5, 0.9):
        b = torch.full((500,), budget)
        cost = path_cost(condition.priced(base * (1 + budget), b).argmax(2), ratio_BL).mean()
        assert float(cost) == pytest.approx(budget, abs=0.005)


def test_a_saved_model_keeps_its_budgets(tmp_path: Path) -> None:
    model = budgeted()
    den.save(model, tmp_path)
    loaded = den.load(tmp_path)
    x = images()
    assert torch.equal(loaded(x, budget=0.3).level_probs, model(x, budget=0.3).level_probs)
    assert loaded.selector.condition.default == 0.5


def test_rho_rises_while_paths_are_too_dear() -> None:
    control = RhoControl(0.1, target=0.5, rate=0.05, budgets=False)
    cheap, dear = torch.full((8,), 0.3), torch.full((8,), 0.7)
    before = control.rho(None)
    control.update(dear, None)
    raised, log_rho = control.rho(None), control.log_rho_K.item()
    assert raised > before, "rho after a dear step"
    assert log_rho == pytest.approx(math.log(0.1) + 0.05 * 0.2), "log rho rises by the rate times the excess"
    for _ in range(20):
        control.update(cheap, None)
    assert control.rho(None) < before, "rho after many cheap steps"


def test_rho_moves_at_the_budgets_that_were_seen() -> None:
    control = RhoControl(0.1, target=None, rate=0.05, budgets=True)
    before_K = control.log_rho_K.clone()
    control.update(torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.8]))  # dear for the one, cheap for the other
    moved_K = control.log_rho_K - before_K
    expected_K = torch.zeros_like(moved_K)
    expected_K[2], expected_K[8] = 0.05 * 0.3, -0.05 * 0.3
    torch.testing.assert_close(moved_K, expected_K)
    rho_N = control.rho(torch.tensor([0.2, 0.8]))
    assert rho_N[0] > 0.1 > rho_N[1], "rho at each budget"


def test_a_fixed_rho_stays() -> None:
    control = RhoControl(0.1, target=None, rate=0.05, budgets=False)
    control.update(torch.ones(4), None)
    assert control.rho(None) == 0.1


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0.0, "budget is 0.0; it must be above 0 and at most 1"),
        (1.5, "budget is 1.5"),
        (torch.tensor([0.5, 0.5]), r"budget has shape \(2,\); it must be \[N\], here \[16\]"),
        (torch.full((16,), 2.0), "budget holds values that are not above 0"),
    ],
)
def test_bad_budgets_are_named(budget, message: str) -> None:
    model = budgeted()
    for network in (model, den.freeze(model)):
        with pytest.raises(ValueError, match=message):
            network(images(), budget=budget)


def test_budgets_where_there_are_none() -> None:
    plain = cases.wrn()
    for network in (plain, den.freeze(plain)):
        with pytest.raises(ValueError, match="this model's selector was made without one"):
            network(images(), budget=0.5)
    with pytest.raises(ValueError, match="level and budget are both given"):
        budgeted()(images(), level=[0, 0, 0], budget=0.5)
    with pytest.raises(ValueError, match=r"budget is 1\.5; it must be a number above 0 and at most 1"):
        cases.wrn(budget=1.5)
    with pytest.raises(TypeError, match="budget is 'half'"):
        budgeted()(images(), budget="half")


@pytest.mark.slow
def test_one_trained_model_serves_every_budget() -> None:
    """Held-out digits: the mean cost follows the budget, within 0.06, and the accuracy does not fall with it."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    task = den.load_task("digits", subset=700, val_fraction=0.4)
    torch.manual_seed(0)
    model = den.create_model("wrn_14_1", {"digits": 10}, selector=cases.TINY_SELECTOR, base_size=8, budget=0.5)
    config = TrainConfig(
        rho=0.5,
        stages=2,
        batch_size=64,
        estimator=EstimatorConfig(lr=0.05, first_epochs=6, epochs=2, schedule="cosine"),
        selector=SelectorConfig(
            lr=3e-3, epochs=4, baseline="leave_one_out", cost="expected", epsilon_decay=0.9, split="val"
        ),
        progress=False,
    )
    den.Trainer(model, [task], config).fit()
    frozen = den.freeze(model)
    x, y = (torch.cat(parts) for parts in zip(*task.batches("test", 256), strict=True))
    budgets = [0.15, 0.3, 0.45, 0.6, 0.75, 0.9]
    outputs = [frozen(x, budget=budget) for budget in budgets]
    costs = [float(path_cost(out.level, den.cost_ratios(model)).mean()) for out in outputs]
    accuracy = [100 * float((out.logits.argmax(1) == y).float().mean()) for out in outputs]
    print(costs, accuracy)
    assert costs == sorted(costs)
    assert costs == pytest.approx(budgets, abs=0.06)
    assert accuracy[-1] > accuracy[0]

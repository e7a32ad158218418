"""Policies of `evaluate`, and the costs that it tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import den
from den.losses import path_cost
from den.metrics import evaluate
from den.results import read_evaluations, save_results, write_results
from den.tasks import Task, make_task
from tests.den_cases import TINY_SELECTOR, live_in
from tests.test_tasks import image_set

IMAGES = 60


@pytest.fixture(scope="module")
def task() -> Task:
    images = image_set(IMAGES, classes=4)
    return make_task("images", images, images)


@pytest.fixture(scope="module")
def model() -> den.DEN:
    torch.manual_seed(0)
    made = den.create_model("wrn_8_1", {"images": 4}, selector=TINY_SELECTOR, base_size=8)
    return live_in(made).eval()


def test_shuffled_levels_are_the_selectors_given_to_other_images(model: den.DEN, task: Task) -> None:
    chosen, shuffled = (evaluate(model, task, policy=policy, batch_size=16) for policy in ("selector", "shuffled"))
    assert len(chosen.level.unique(dim=0)) > 1, "a selector that tells images apart"
    assert sorted(shuffled.level.tolist()) == sorted(chosen.level.tolist())
    assert not torch.equal(shuffled.level, chosen.level)
    assert float(shuffled.flops.double().mean()) == float(chosen.flops.double().mean())
    assert shuffled.selector_flops == chosen.selector_flops
    assert shuffled.selector_flops
    assert shuffled.probs is None
    for batch in (7, IMAGES):
        assert torch.equal(shuffled.level, evaluate(model, task, policy="shuffled", batch_size=batch).level)
    x, _ = next(iter(task.batches("test", IMAGES, training=False)))
    with torch.inference_mode():
        expected = model(x, level=shuffled.level).logits.argmax(1)
    assert torch.equal(shuffled.prediction, expected)
    assert not torch.equal(shuffled.level, evaluate(model, task, policy="shuffled", seed=1).level)


def test_costs_are_told_in_the_unit_of_training_and_read_back(model: den.DEN, task: Task, tmp_path: Path) -> None:
    table_BL = torch.linspace(0, 1, model.num_levels).square().repeat(model.num_blocks, 1)
    summary = write_results(tmp_path, model, [task], ("random", "full"), tables={"images": table_BL})["images"]
    stored = read_evaluations(tmp_path)["images"]["random"]
    torch.testing.assert_close(stored.own_cost, path_cost(stored.level, table_BL))
    assert summary["random"]["own_cost_mean"] == pytest.approx(float(stored.own_cost.mean()), abs=1e-6)
    assert summary["random"]["own_cost_mean"] != summary["random"]["cost_mean"]
    assert summary["full"]["own_cost_mean"] == summary["full"]["cost_mean"] == 1
    older = save_results(tmp_path, {"images": {"random": replace(stored, own_cost=None)}})  # as older code wrote it
    assert "own_cost_mean" not in older["images"]["random"]
    assert read_evaluations(tmp_path)["images"]["random"].own_cost is None


def test_an_unknown_policy_is_told(model: den.DEN, task: Task) -> None:
    with pytest.raises(ValueError, match="policy is 'best'; it must be one of selector, shuffled, random, full, or"):
        evaluate(model, task, policy="best")

"""Figures 3, 5, 6 and 7, frontiers and curves: what is in them, and that any size of network and tasks can be drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from den.report import compare, curves, models
from den.report.groups import studies
from den.report.images import model_rows, similar_rows
from den.statistics import Spread
from den.tasks import make_task
from tests.report_cases import CLASSES, IMAGES, check_written, evaluation, training_log, write_run
from tests.test_tasks import image_set


def task(name: str):
    images = image_set(IMAGES, classes=CLASSES)
    return make_task(name, images, images)


def test_nearest_is_by_l2_distance_and_never_the_query() -> None:
    probs_NBL = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.9, 0.1]], [[0.5, 0.5]], [[1.0, 0.0]]])
    indices, distances = models.nearest(probs_NBL, probs_NBL[0], 3, exclude=0)
    assert indices == [4, 2, 3]
    assert distances == pytest.approx([0, 0.02**0.5, 0.5**0.5])
    assert models.nearest(probs_NBL, probs_NBL[0], 9)[0] == [0, 4, 2, 3, 1]


def test_most_selected_models() -> None:
    level_NB = torch.tensor([[0, 1], [2, 2], [0, 1], [3, 0], [2, 2], [0, 1]])
    assert models.most_selected(level_NB, 2) == [([0, 1], [0, 2, 5]), ([2, 2], [1, 4])]


def test_queries_are_typical_and_classified_right() -> None:
    found = evaluation(20)
    (query,) = models.typical(found)
    right = found.cost[found.correct]
    assert found.correct[query]
    assert abs(float(found.cost[query]) - float(right.median())) < 0.1
    cheap, middle, dear = models.typical(found, 3)
    assert found.cost[cheap] <= found.cost[middle] <= found.cost[dear]


@pytest.mark.parametrize(("tasks", "blocks", "levels"), [(1, 3, 2), pytest.param(4, 20, 5, marks=pytest.mark.slow)])
def test_figures_of_small_and_large_networks(tasks: int, blocks: int, levels: int, tmp_path: Path) -> None:
    names = [f"task_{i}" for i in range(tasks)]
    found = {name: evaluation(25, blocks=blocks, levels=levels, seed=i) for i, name in enumerate(names)}
    data = {name: task(name) for name in names}
    ratios = [level / (levels - 1) for level in range(levels)]
    rows = similar_rows(data, found)
    assert [len(row[1]) for row in rows] == [tasks] * max(3 * (tasks == 1), tasks)
    paths = models.similar_models(rows, tmp_path / "similar")
    check_written(paths, "query", *(f"nearest in {name}" for name in names), "l2 distance")
    paths = models.images_by_model(model_rows(data, found), ratios, tmp_path / "by_model")
    check_written(paths, "Model A: ", f"level {levels - 1}: all channels", "block left out")
    paths = models.selected_models(found, ratios, tmp_path / "selected")
    count = len(found["task_0"].level.unique(dim=0))
    check_written(
        paths, f"(a) task_0: {count} models for {IMAGES} images", "(b) task_0: mean probability of each level"
    )


def test_one_model_has_one_letter_whoever_takes_it() -> None:
    found = evaluation(25)
    rows = model_rows({name: task(name) for name in "ab"}, {"a": found, "b": found}, images=3)
    letters = [name.split(":")[0] for name, _, _ in rows]
    assert letters == ["Model A", "Model B", "Model C"] * 2
    assert all(len(images) <= 3 for _, _, images in rows)
    assert sum(np.asarray(rows[0][2][0].pixels).shape) > 0


def test_frontier_tells_methods_apart_and_what_lies_below(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{seed}{rho}", seed=seed, train={"rho": rho}, flops=int(4e5 / rho))
        for seed in (0, 1)
        for rho in (1.0, 0.5)
    ]
    runs.append(write_run(tmp_path / "slim", method="slim", policy="fixed", right=29))
    (study,) = studies(runs)
    paths = compare.frontier(study, tmp_path / "f")
    texts = ("rho = 1", "rho = 0.5", "static slim network", "DEN, full path", "DEN (rho = 1), random levels: 30.0%")
    check_written(paths, *texts, "million FLOPs an image, selector included")

    def price(entry, task):
        return Spread(1, 2.5, None) if entry.method == "slim" else None

    drawn = Path(compare.frontier(study, tmp_path / "l", price=price, label="milliseconds an image, batch 1")[1])
    assert "static slim network" in drawn.read_text()
    assert "DEN" not in drawn.read_text()
    assert compare.frontier(study, tmp_path / "n", price=lambda entry, task: None) == []


def test_ablations_are_drawn_where_there_are_some(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(levels), levels=levels, train={"rho": 1.0, "tau": 0.75}) for levels in (2, 4)]
    assert compare.ablations(studies(runs[:1])[0], tmp_path / "a") == []
    runs.append(write_run(tmp_path / "uniform", train={"rho": 1.0, "tau": 0.0}))
    runs.append(write_run(tmp_path / "selector", train={"rho": 1.0, "tau": 0.75, "initial": "selector"}))
    paths = compare.ablations(studies(runs)[0], tmp_path / "a")
    check_written(paths, "2 levels", "4 levels", "uniform", "untrained selector", "equation 8, tau = 0.75")


def test_curves_and_speed_of_training(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(s), seed=s, train={"rho": 1.0}, metrics=training_log()) for s in (0, 1)]
    (study,) = studies(runs)
    paths = curves.training_curves(study.groups[0], tmp_path / "c")
    texts = (
        "entropy of the selector",
        "nats a block",
        "every level alike: 1.39",
        "seed 1",
        "levels taken, %",
        "level 3: all channels",
    )
    check_written(paths, *texts, "selector learns", "mean cost of the paths", "reward")
    paths = compare.training_speed(study.groups, tmp_path / "s")
    check_written(paths, "training images a second", "DEN (rho = 1)", "share of the blocks' parameters")
    silent = studies([write_run(tmp_path / "silent")])[0]
    assert curves.training_curves(silent.groups[0], tmp_path / "c") == []
    assert compare.training_speed(silent.groups, tmp_path / "s") == []


def test_costs_in_another_unit_are_told_with_it(tmp_path: Path) -> None:
    train = {"rho": 1.0, "cost_unit": "flops", "target_cost": 0.5}
    (study,) = studies([write_run(tmp_path / "den", train=train, metrics=training_log())])
    paths = curves.training_curves(study.groups[0], tmp_path / "c")
    check_written(paths, "mean cost of the paths: share of FLOPs", "DEN (cost = 0.5 of FLOPs)")
    check_written(compare.training_speed(study.groups, tmp_path / "s"), "share of the blocks' FLOPs")


def test_budgets_are_a_curve_of_their_own(tmp_path: Path) -> None:
    told = {"model_options": {"selector": {"budget": 0.5}}, "budgets": {0.2: 200_000, 0.5: 400_000, 0.8: 800_000}}
    runs = [write_run(tmp_path / "told", train={"rho": 1.0}, **told)]
    runs.append(write_run(tmp_path / "rho", train={"rho": 1.0}))
    (study,) = studies(runs)
    drawn = Path(compare.frontier(study, tmp_path / "f")[1]).read_text()
    for text in ("DEN, one told its budget", "budget 0.2 of parameters", "budget 0.5 of parameters", "rho = 1"):
        assert text in drawn, text

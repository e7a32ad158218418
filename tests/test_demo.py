"""The demo's recipe: a valid configuration, and a dense twin that is trained alike."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import den
from recipes import demo


def test_dense_twin_is_trained_alike(tmp_path: Path) -> None:
    recipe = demo.demo(tmp_path)
    twin = demo.dense(recipe, tmp_path)
    recipe.train.check()
    twin.train.check()
    own, dense = recipe.train.estimator, twin.train.estimator
    assert dense.first_epochs == own.first_epochs + (recipe.train.stages - 1) * own.epochs + own.settle_epochs
    assert twin.train.tau == 1
    assert (twin.train.stages, twin.train.selector.epochs) == (1, 0)
    same = ("lr", "momentum", "weight_decay", "schedule")
    assert [asdict(own)[name] for name in same] == [asdict(dense)[name] for name in same]
    assert twin.model == recipe.model
    assert twin.train.out != recipe.train.out


def test_model_is_elastic_and_its_selector_light(tmp_path: Path) -> None:
    model = den.create_model(tasks={"digits": 10, "mnist": 10}, **demo.demo(tmp_path).model)
    assert model.num_levels == 4
    top = [3] * model.num_blocks
    full, with_selector = (int(den.flops(model, top, 28, include_selector=s)) for s in (False, True))
    assert with_selector < 1.2 * full


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    command = [sys.executable, "-m", "recipes.demo", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 2
    assert "is there already" in run.stderr
    assert (tmp_path / "precious").exists()

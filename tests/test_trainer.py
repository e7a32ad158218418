"""Algorithm 1 on a small real problem: it runs, learns, resumes to the same numbers, and says what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import den
from den.run_folder import RunFolder
from den.tasks import Task, load_task
from den.trainer import EstimatorConfig, SelectorConfig, TrainConfig, Trainer

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_task("digits", subset=256, val_fraction=0.25)


def small_model(budget: float | None = None) -> den.DEN:
    torch.manual_seed(0)
    return den.create_model("wrn_8_1", {"digits": 10}, selector="light", budget=budget)


def small_config(out: Path | None, **changes) -> TrainConfig:
    config = TrainConfig(
        stages=2,
        batch_size=64,
        estimator=EstimatorConfig(lr=0.05, first_epochs=2, epochs=1, full_share=0.25),
        selector=SelectorConfig(lr=1e-3, epochs=1, baseline="leave_one_out", split="val"),
        out=out,
        progress=False,
    )
    return replace(config, **changes)


def weights(model: den.DEN) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in model.state_dict().values()])


def test_run_folder_holds_the_run(digits: Task, tmp_path: Path) -> None:
    model = small_model()
    before = weights(model)
    summary = Trainer(model, [digits], small_config(tmp_path / "run")).fit()
    assert not torch.equal(before, weights(model))
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    phases = [(r["stage"], r["phase"], r["epoch"]) for r in records]
    assert phases == [
        (0, "estimator", 0),
        (0, "estimator", 1),
        (0, "selector", 0),
        (1, "estimator", 0),
        (1, "selector", 0),
    ]
    assert records[1]["loss"] < records[0]["loss"]
    assert records[3]["lr"] == pytest.approx(0.005)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == json.loads(json.dumps(summary))
    assert set(summary["digits"]) == {"selector", "shuffled", "random", "full"}
    assert summary["digits"]["full"]["cost_mean"] == 1
    loaded = den.load(tmp_path / "run/checkpoint")
    assert torch.equal(weights(loaded), weights(model))


def test_estimator_settles_after_the_last_stage(digits: Task, tmp_path: Path) -> None:
    config = small_config(tmp_path, stages=1)
    config.estimator.settle_epochs = 2
    Trainer(small_model(), [digits], config).fit()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["phase"]) for r in records[-3:]] == [(0, "selector"), (1, "estimator"), (1, "estimator")]
    assert records[-1]["cost"] < 1
    assert Trainer(
        small_model(), [digits], small_config(tmp_path, stages=1, resume=True, estimator=config.estimator)
    ).fit()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(records)


@pytest.mark.parametrize("sandwich", [False, True])
def test_settling_is_on_the_chosen_paths(digits: Task, tmp_path: Path, monkeypatch, sandwich: bool) -> None:
    config = small_config(tmp_path, stages=1)
    config.estimator = replace(config.estimator, settle_epochs=1, full_share=0.0, sandwich=sandwich)
    trainer, taken = Trainer(model := small_model(), [digits], config), []
    forward = model.estimator.forward

    def recorded(x, level_NB, *rest):
        if trainer.loop.position.phase == len(trainer.phases()) - 1 and model.estimator.training:
            n = len(x) // 2 if sandwich else len(x)
            assert (level_NB[: len(x) - n] == model.num_levels - 1).all(), (
                "the other half of a sandwich is the full path"
            )
            taken.append((level_NB[-n:], model.selector(x[-n:]).argmax(2)))
        return forward(x, level_NB, *rest)

    monkeypatch.setattr(model.estimator, "forward", recorded)
    trainer.fit()
    assert taken, "no step of the settling phase was seen"
    for level_NB, chosen_NB in taken:
        assert torch.equal(level_NB, chosen_NB), "an image that settles took another path than its selector's"


def with_options(out: Path, **changes) -> TrainConfig:
    """Every option that has a state of its own or draws at random."""
    config = small_config(out, weighting="uncertainty", dual_rate=1.0, **changes)
    config.estimator = replace(config.estimator, ema=0.5, sandwich=True, rare_boost=0.5, warmup_epochs=1)
    config.selector = replace(config.selector, baseline="moving_average", cost="expected", entropy=0.01)
    return config


@pytest.mark.parametrize(("configure", "budget"), [(small_config, None), (with_options, 0.5)])
def test_killed_run_resumes_to_the_same_numbers(
    digits: Task, tmp_path: Path, monkeypatch, configure, budget: float | None
) -> None:
    whole = small_model(budget)
    expected = Trainer(whole, [digits], configure(tmp_path / "whole")).fit()

    class Killed(Exception):
        pass

    saves = []
    real = RunFolder.append_metrics

    def dying(self, record) -> None:
        real(self, record)
        saves.append(record)
        if len(saves) == 4:
            raise Killed

    monkeypatch.setattr(RunFolder, "append_metrics", dying)
    with pytest.raises(Killed):
        Trainer(small_model(budget), [digits], configure(tmp_path / "part")).fit()
    monkeypatch.setattr(RunFolder, "append_metrics", real)
    resumed = small_model(budget)
    actual = Trainer(resumed, [digits], configure(tmp_path / "part", resume=True)).fit()
    assert actual == expected
    assert torch.equal(weights(resumed), weights(whole))
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_second")}
            for line in path.read_text().splitlines()
        ]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "part/metrics.jsonl")
    ]
    assert lines[0] == lines[1]


def test_checkpoint_lost_between_two_renames_is_found(digits: Task, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "checkpoint.old").mkdir()
    assert folder.has_checkpoint
    assert folder.checkpoint.exists()


def test_plateau_ends_a_phase(digits: Task, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", stages=1)
    config.estimator = EstimatorConfig(lr=1e-9, first_epochs=9, schedule="constant", patience=2)
    config.selector.epochs = 0
    Trainer(small_model(), [digits], config).fit()
    epochs = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert 3 <= epochs < 9


def test_first_stage_may_draw_from_the_untrained_selector(digits: Task, tmp_path: Path) -> None:
    """A.2: a selector that is sure of level 1 gives the estimator nothing else, where equation 8 gives full paths."""
    costs = []
    for initial in ("selector", "equation_8"):
        model = small_model()
        with torch.no_grad():
            model.selector.head.weight.zero_()
            model.selector.head.bias.view(model.num_blocks, -1)[:, 1] = 50.0
        config = small_config(tmp_path / initial, stages=1, initial=initial)
        config.estimator.first_epochs, config.estimator.full_share, config.selector.epochs = 1, 0.5, 0
        Trainer(model, [digits], config).fit()
        costs.append(json.loads((tmp_path / initial / "metrics.jsonl").read_text().splitlines()[0])["cost"])
    assert costs[0] == pytest.approx(0.25)
    assert costs[1] > 0.6


def test_selector_learns_to_save(digits: Task) -> None:
    """With a large rho the cheapest paths win, whatever the accuracy."""
    model = small_model()
    config = small_config(None, rho=50.0, stages=1)
    config.estimator.first_epochs = 1
    config.selector = SelectorConfig(lr=2e-2, epochs=8, paths=8, baseline="leave_one_out", epsilon_decay=0.0)
    summary = Trainer(model, [digits], config).fit()
    assert summary["digits"]["selector"]["cost_mean"] < 0.1
    assert 0.3 < summary["digits"]["random"]["cost_mean"] < 0.6


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rho", -1.0, "rho is -1.0; it must be at least 0"),
        ("tau", 1.5, "tau is 1.5"),
        ("stages", 0, "stages is 0"),
        ("estimator.schedule", "warm", "estimator.schedule is 'warm'; it must be one of constant, step, cosine"),
        ("selector.paths", 1, "selector.paths is 1; it must be at least 2 with the leave_one_out baseline"),
        ("selector.baseline", "critic", "selector.baseline is 'critic'"),
    ],
)
def test_bad_configuration_is_named(digits: Task, field: str, value, message: str) -> None:
    config = small_config(None)
    target = config
    *parents, leaf = field.split(".")
    for parent in parents:
        target = getattr(target, parent)
    setattr(target, leaf, value)
    with pytest.raises(ValueError, match=message):
        Trainer(small_model(), [digits], config)


def test_other_tasks_than_the_models_are_named(digits: Task) -> None:
    model = den.create_model("wrn_8_1", {"mnist": 10}, selector="light")
    with pytest.raises(ValueError, match=r"the model was made for \{'mnist': 10\}"):
        Trainer(model, [digits])


def test_run_folder_is_not_overwritten(digits: Task, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": {"name": "wrn_8_1"}}')
    with pytest.raises(FileExistsError, match="holds a run already"):
        Trainer(small_model(), [digits], small_config(tmp_path)).fit()
    with pytest.raises(ValueError, match="is of another model"):
        Trainer(small_model(), [digits], small_config(tmp_path, resume=True)).fit()

"""What a run folder says of its test images is what was measured, to the last path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import den
from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from den.flops import active_parameters, count_parameters, selector_macs
from den.metrics import evaluate
from den.results import read_evaluations, read_run, save_results, write_results
from den.tasks import Task, load_task
from den.trainer import Trainer
from tests.den_cases import TINY_SELECTOR, live_in, resnet, vgg

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_task("digits", subset=128)


def model() -> den.DEN:
    torch.manual_seed(0)
    return live_in(den.create_model("wrn_8_1", {"digits": 10}, selector=TINY_SELECTOR, base_size=8))


def test_evaluations_are_read_back_as_they_were(digits: Task, tmp_path: Path) -> None:
    network = model()
    policies = {"selector": "selector", "random": "random", "level 1": [1, 1, 1]}
    summary = write_results(tmp_path, network, [digits], policies, seed=3)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    stored = read_evaluations(tmp_path)
    assert {task: list(found) for task, found in stored.items()} == {"digits": sorted(policies)}
    for name, policy in policies.items():
        measured, read = evaluate(network, digits, policy=policy, seed=3), stored["digits"][name]
        for what in ("prediction", "label", "level", "cost", "flops", "parameters"):
            assert torch.equal(getattr(read, what), getattr(measured, what)), f"{name}: {what}"
        assert (read.probs is None) == (name != "selector")
        assert read.accuracy == measured.accuracy == pytest.approx(summary["digits"][name]["accuracy"], abs=1e-4)
        if read.probs is not None:
            torch.testing.assert_close(read.probs, measured.probs, atol=1e-3, rtol=0)
    result = summary["digits"]
    assert result["selector"]["parameters"] == count_parameters(network)
    assert result["level 1"]["parameters_mean"] == count_parameters(network, [1, 1, 1])
    assert result["selector"]["selector_flops"] == 2 * selector_macs(network, (8, 8))
    assert result["random"]["selector_flops"] == 0


@pytest.mark.parametrize("make", [resnet, vgg])
def test_active_parameters_are_those_of_each_path(make) -> None:
    network = make()
    level_NB = torch.randint(network.num_levels, (9, network.num_blocks), generator=torch.Generator().manual_seed(1))
    expected = [count_parameters(network, path) for path in level_NB]
    assert len(set(expected)) > 3
    assert active_parameters(network, level_NB).tolist() == expected


def test_a_trained_run_is_read(digits: Task, tmp_path: Path) -> None:
    config = TrainConfig(
        stages=1,
        seed=5,
        batch_size=64,
        estimator=EstimatorConfig(first_epochs=1),
        selector=SelectorConfig(epochs=1),
        out=tmp_path / "run",
        progress=False,
    )
    summary = Trainer(model(), [digits], config).fit()
    run = read_run(tmp_path / "run")
    assert run.summary == summary
    assert run.own["digits"] == summary["digits"]["selector"]
    assert (run.about["method"], run.about["seed"], run.about["row"]) == ("den", 5, None)
    assert [line["phase"] for line in run.metrics] == ["estimator", "selector"]
    assert run.evaluations["digits"]["full"].accuracy == pytest.approx(summary["digits"]["full"]["accuracy"], abs=1e-4)


def test_what_is_no_finished_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is missing; give a run folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {}, "about": {"policy": "fixed"}}')
    with pytest.raises(FileNotFoundError, match=r"is a run without summary.json yet; finish it"):
        read_run(tmp_path)
    (tmp_path / "summary.json").write_text('{"digits": {"selector": {}}}')
    with pytest.raises(ValueError, match=r"summary.json lacks the policy 'fixed' of task 'digits'"):
        read_run(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json is not valid JSON"):
        read_run(tmp_path)


def test_damaged_evaluations_are_told(digits: Task, tmp_path: Path) -> None:
    evaluation = evaluate(model(), digits, policy="full")
    with pytest.raises(ValueError, match="policy has the name 'a/b'"):
        save_results(tmp_path, {"digits": {"a/b": evaluation}})
    save_results(tmp_path, {"digits": {"full": evaluation}})
    path = tmp_path / "evaluations.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"evaluations.safetensors is damaged"):
        read_evaluations(tmp_path)

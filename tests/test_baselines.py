"""Every competitor, from its name to its run folder: what it writes, that it learns and resumes, bad arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from baseline_cases import OPTIONS, digits, quick, tasks_of

from den import baselines
from den.metrics import evaluate
from den.results import read_evaluations, read_run


def stored(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in network.state_dict().values()])


def test_methods_are_the_papers() -> None:
    assert set(baselines.METHODS) == {
        "independent", "random", "slim", "nestednet", "packnet", "blockdrop", "routing", "cross_stitch", "pruned"
    }  # fmt: skip


@pytest.mark.parametrize("name", baselines.METHODS)
def test_run_folder_is_a_trainers(name: str, tmp_path: Path) -> None:
    tasks, about = tasks_of(name), {"scenario": "test", "row": name}
    config = quick(name, tmp_path / "run", epochs=2, seed=3)
    summary = baselines.train(name, "wrn_8_1", tasks, config, options=OPTIONS, about=about)
    run = read_run(tmp_path / "run")
    assert run.summary == json.loads(json.dumps(summary))
    assert run.about["method"] == name
    assert run.about["seed"] == 3
    assert run.about["row"] == name
    assert run.metrics[1]["loss"] < run.metrics[0]["loss"]
    policy = run.about["policy"]
    network = baselines.load(tmp_path / "run")
    for task in tasks:
        found = read_evaluations(tmp_path / "run")[task.name][policy]
        assert found.accuracy == pytest.approx(summary[task.name][policy]["accuracy"], abs=1e-3)
        assert found.level.shape == (len(task.test), network.num_blocks)
        assert summary[task.name][policy]["parameters"] >= summary[task.name][policy]["parameters_mean"]
        if policy != "random":  # the saved network is the one that was evaluated
            own = "selector" if policy == "selector" else found.level[0]
            again = evaluate(network, task, policy=own)
            assert (again.prediction == found.prediction).float().mean() > 0.99  # frozen, norms are folded
            assert torch.equal(again.flops, found.flops)


@pytest.mark.parametrize("name", ["packnet", "pruned", "blockdrop", "routing"])
def test_killed_run_resumes_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    """Killed after the first epoch of the last phase."""
    epochs = {"packnet": 2, "routing": 3}.get(name, 1)
    changes = {"blockdrop": {"joint_epochs": 2}, "pruned": {"tune_epochs": 2}}.get(name, {})
    method = baselines.METHODS[name]
    tasks = tasks_of(name)
    whole = method("wrn_8_1", tasks, quick(name, tmp_path / "whole", epochs=epochs, **changes), options=OPTIONS)
    expected = whole.fit()
    lines = len((tmp_path / "whole/metrics.jsonl").read_text().splitlines())

    class Killed(Exception):
        pass

    seen: list[dict] = []

    def kill(record: dict) -> None:
        seen.append(record)
        if len(seen) == lines:
            raise Killed

    config = quick(name, tmp_path / "part", epochs=epochs, **changes)
    with pytest.raises(Killed):
        method("wrn_8_1", tasks, config, options=OPTIONS, on_epoch=kill).fit()
    config = quick(name, tmp_path / "part", epochs=epochs, resume=True, **changes)
    resumed = method("wrn_8_1", tasks, config, options=OPTIONS)
    assert resumed.fit() == expected
    assert torch.equal(stored(resumed.network), stored(whole.network))
    assert len((tmp_path / "part/metrics.jsonl").read_text().splitlines()) == lines


def test_seed_decides_the_first_weights() -> None:
    networks = [
        baselines.METHODS["slim"]("wrn_8_1", [digits()], quick("slim", seed=seed), options=OPTIONS).network
        for seed in (0, 0, 1)
    ]
    assert torch.equal(stored(networks[0]), stored(networks[1]))
    assert not torch.equal(stored(networks[0]), stored(networks[2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", baselines.METHODS)
def test_it_learns(name: str) -> None:
    """All digits, twelve epochs: every method is right on nine of ten at its own cost."""
    more = {"blockdrop": {"curriculum_epochs": 6, "joint_epochs": 2}, "pruned": {"tune_epochs": 4}}.get(name, {})
    config = quick(name, epochs=12, lr=0.1, schedule="cosine", **more)
    tasks = tasks_of(name, len(digits(1437).train))
    method = baselines.METHODS[name]("wrn_8_1", tasks, config, options=OPTIONS)
    summary = method.fit()
    least = 80 if name == "random" else 95
    assert all(policies[method.policy]["accuracy"] > least for policies in summary.values()), summary


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    task = digits()
    with pytest.raises(ValueError, match="method is 'oracle'; it must be one of independent, random"):
        baselines.train("oracle", "wrn_8_1", [task])
    with pytest.raises(TypeError, match="config is a SlimConfig; packnet takes a NestedConfig"):
        baselines.train("packnet", "wrn_8_1", [task], baselines.SlimConfig())
    with pytest.raises(ValueError, match=r"share is 1\.5; it must be above 0 and at most 1"):
        baselines.train("slim", "wrn_8_1", [task], quick("slim", share=1.5))
    with pytest.raises(ValueError, match="devices is 2 and nodes 1; routing trains in one process alone"):
        baselines.train("routing", "wrn_8_1", [task], quick("routing", devices=2))
    with pytest.raises(ValueError, match="tasks are named"):
        baselines.train("independent", "wrn_8_1", [task, task])
    with pytest.raises(ValueError, match=r"order is .*must name every task once: a, b"):
        baselines.train("packnet", "wrn_8_1", tasks_of("packnet"), quick("packnet", order=("a", "c")))
    with pytest.raises(ValueError, match="first must be above 0 here"):
        baselines.train("blockdrop", "simple_conv_net", [task], quick("blockdrop"))
    with pytest.raises(ValueError, match="holds no run that can be read"):
        baselines.load(tmp_path)

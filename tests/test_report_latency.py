"""Measured time: what is timed, and that it is the network that was trained."""

from __future__ import annotations

from pathlib import Path

import torch

from den import baselines
from den.dense import dense
from den.report import latency
from den.report.groups import Entry, studies
from den.results import read_run
from den.tasks import make_task
from tests.test_tasks import image_set


def test_independent_networks_are_timed_as_the_plain_network_of_each_task(tmp_path: Path) -> None:
    images = image_set(24, classes=4)
    tasks = [make_task(name, images, images) for name in ("a", "b")]
    config = baselines.METHODS["independent"].Config(epochs=1, batch_size=12, out=tmp_path / "run", progress=False)
    baselines.train("independent", "wrn_8_1", tasks, config, options={"base_size": 8})
    networks = baselines.load(tmp_path / "run")
    x, _ = next(iter(tasks[0].batches("test", 24, training=False)))
    for task in ("a", "b"):
        own = latency._own_network(networks, task)
        with torch.inference_mode():
            torch.testing.assert_close(dense(own, task)(x), networks(x, task).logits, atol=1e-4, rtol=1e-4)
    (study,) = studies([read_run(tmp_path / "run")])
    found = latency.measure(study, lambda task: x, batches=(4,), seconds=0.01)
    assert {task: list(times) for task, times in found["independent networks"].items()} == {"a": [4], "b": [4]}


def test_a_budget_is_told_to_the_selector_that_is_timed(tmp_path: Path, monkeypatch) -> None:
    told = []
    monkeypatch.setattr(latency, "freeze", lambda model: lambda x, task, **given: told.append(given))
    entry = Entry("DEN (budget 0.2 of parameters)", "", "budget 0.2", True, ())
    latency._engine(entry, object(), "a", [torch.zeros(1)])(0)
    assert told == [{"budget": 0.2}]

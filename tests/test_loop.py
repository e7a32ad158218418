"""The training loop by itself, on a plain network: phases, hooks, tasks in sequence, and exact resume of any state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.config import RunConfig
from den.data import ImageSet
from den.loop import Batch, DivergedError, Loop, Means, Phase, Rate
from den.tasks import Task, make_task


def task(name: str, seed: int) -> Task:
    """Images whose mean tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 2
    images = torch.randint(0, 64, (40, 3, 8, 8), generator=generator) + 128 * labels.view(-1, 1, 1, 1)
    images = ImageSet(images.to(torch.uint8), labels, ("dark", "bright"))
    return make_task(name, images, images)


class Run:
    """Two tasks learned one after the other, counting what happens, by a linear network with an average beside it."""

    def __init__(self, out: Path | None, *, resume: bool = False, stop: int | None = None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        self.average = nn.Linear(3, 2)
        self.calls: list[str] = []
        self.records: list[dict] = []
        self.stop = stop
        config = RunConfig(batch_size=16, out=out, resume=resume, progress=False)
        tasks = [task("first", 1), task("second", 2)]
        self.loop = Loop(self.model, tasks, config, extra={"average": self.average}, on_epoch=self.records.append)
        adam = torch.optim.Adam(self.model.parameters())
        self.network = self.loop.setup("network", self.model, adam)

    def step(self, batches: list[Batch], means: Means) -> Tensor:
        self.calls.append("step " + " ".join(batch.task.name for batch in batches))
        noise = torch.rand((), generator=self.loop.generator)
        return torch.stack([F.cross_entropy(self.network(x), y) for _, x, y in batches]).mean() * (0.5 + noise)

    def update_average(self) -> None:
        self.calls.append("after")
        with torch.no_grad():
            self.average.weight.lerp_(self.model[2].weight, 0.1)
        if self.stop is not None and self.loop.steps("learn") + 1 == self.stop:
            raise KeyboardInterrupt

    @torch.no_grad()
    def halve(self) -> None:
        self.calls.append("end")
        self.model[2].weight.mul_(0.5)

    def fit(self) -> Run:
        def phase(stage: int, tasks: list[str], **more) -> Phase:
            return Phase(
                "learn",
                self.step,
                {"network": Rate(0.1, "cosine")},
                2,
                stage,
                tasks=tasks,
                begin=lambda: self.calls.append("begin"),
                before_update=lambda: self.calls.append("before"),
                after_update=self.update_average,
                **more,
            )

        self.loop.run([phase(0, ["first"], end=self.halve), phase(1, ["first", "second"])])
        return self

    @property
    def state(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in (*self.model.parameters(), *self.average.parameters())])


def test_phases_call_their_hooks_on_their_tasks() -> None:
    run = Run(None).fit()
    of_first = ["step first", "before", "after"] * 4  # 40 images make two steps of 16
    of_both = ["step first second", "before", "after"] * 4
    assert run.calls == ["begin", *of_first, "end", "begin", *of_both]
    assert [(r["stage"], r["phase"], r["epoch"]) for r in run.records] == [
        (s, "learn", e) for s in (0, 1) for e in (0, 1)
    ]
    assert run.loop.steps("learn") == 8


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_any_interruption_resumes_to_the_same_state(tmp_path: Path, stop: int) -> None:
    """Killed inside a step of either phase; what the first phase does at its end is done once."""
    expected = Run(tmp_path / "whole").fit()
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "part", stop=stop).fit()
    resumed = Run(tmp_path / "part", resume=True).fit()
    assert torch.equal(resumed.state, expected.state)
    lines = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "part")
    ]
    assert lines[0] == lines[1]
    config = tmp_path / "part" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "started": "long ago"}))
    again = Run(tmp_path / "part", resume=True).fit()
    assert again.calls == []
    assert json.loads(config.read_text())["started"] == "long ago"
    assert torch.equal(again.state, expected.state)


def test_a_run_that_dies_at_the_end_of_a_phase_does_the_end_again(tmp_path: Path) -> None:
    expected = Run(tmp_path / "whole").fit()
    part = Run(tmp_path / "part")

    def dying() -> None:
        part.model[2].weight.data.zero_()
        raise KeyboardInterrupt

    part.halve = dying  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    resumed = Run(tmp_path / "part", resume=True).fit()
    assert resumed.calls[0] == "end"
    assert torch.equal(resumed.state, expected.state)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    learn = run.step

    def diverging(batches: list[Batch], means: Means) -> Tensor:
        return learn(batches, means) * (float("nan") if run.loop.position.epoch == 1 else 1)

    run.step = diverging  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match=r"phase 'learn' is nan in epoch 2, at a learning rate of 0\.05"):
        run.fit()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    resumed = Run(tmp_path, resume=True).fit()  # from behind the first epoch
    assert torch.equal(resumed.state, Run(None).fit().state)


def test_rates_rise_and_fall() -> None:
    rate = Rate(0.1, "step", warmup=0.2)
    assert [rate.at(done) for done in (0, 0.1, 0.2, 0.5, 0.75)] == pytest.approx([0, 0.05, 0.1, 0.01, 0.001])
    cosine = Rate(0.1, "cosine")
    assert [cosine.at(done) for done in (0, 0.5, 1)] == pytest.approx([0.1, 0.0505, 0.001])


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    Run(tmp_path).fit()
    run = Run(tmp_path, resume=True)
    run.model[2] = nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"2.weight is \(2, 3\) instead of \(5, 3\)|holds another model's tensors"):
        run.fit()


def test_unknown_tasks_are_named() -> None:
    loop = Run(None).loop
    phase = Phase("learn", lambda batches, means: torch.zeros(()), {}, 1, tasks=["third"])
    with pytest.raises(ValueError, match=r"has tasks \['third'\]; there are \['first', 'second'\]"):
        loop.run([phase])

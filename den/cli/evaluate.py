"""`den eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from den.cli.common import (
    TABLED,
    Saved,
    UserError,
    check_budget,
    data_source,
    load_model,
    parse_path,
    pick_tasks,
    print_json,
    read_task,
    user_input,
)

if TYPE_CHECKING:
    from den.metrics import Policy
    from den.model import DEN


@dataclass
class Eval:
    """Accuracy, cost and FLOPs of a trained DEN, with its levels chosen by one or several policies.

    Data sets and options are those of training wherever none is given here.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """Run folder of den train, or a folder that den.save wrote."""
    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Tasks to evaluate; none: all of the model's."""
    policy: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY [POLICY ...]")] = TABLED
    """Who chooses the levels: selector; shuffled (the selector's choices, each for another image); random (every level
    alike); full (the top level everywhere); or levels, such as 2 for every block or 0-3-1-2 for a path."""
    budget: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT [FLOAT ...]")] = ()
    """Mean costs that the selector is to keep to, for a model trained with a budget: a row each. None: its own."""
    split: Literal["test", "train", "val"] = "test"
    """Images to evaluate on."""
    data: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Another data set of the same classes, for one task; None: the one of training."""
    root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder that holds the data sets; None: the one of training."""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Side that images are resized to; None: as in training."""
    batch_size: int = 256
    """Images in a batch."""
    seed: int = 0
    """Of the shuffled and the random policy."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:1."""
    backend: Literal["auto", "cpu", "triton", "grouped", "reference"] = "auto"
    """Of den_kernels; auto takes the fastest on this machine."""
    json: bool = False
    """Print JSON."""

    def run(self, arguments: list[str]) -> None:
        """Evaluate and print."""
        if self.batch_size < 1:
            raise UserError(f"batch-size is {self.batch_size}; it must be at least 1")
        from tqdm import tqdm

        from den.freeze import freeze
        from den.metrics import evaluate

        saved = load_model(self.checkpoint, self.device)
        model = saved.model
        if {"selector", "shuffled"} & set(self.policy):
            saved.check_selector("give --policy full, random or levels")
        names = pick_tasks(model, self.task)
        policies = self._policies(model)
        with user_input():
            frozen = freeze(model, backend=self.backend)
        results: dict[str, dict[str, Any]] = {}
        for name in names:
            task = read_task(saved, name, self._given(saved, names))
            with user_input():
                task.split(self.split)
            for text, (policy, budget) in policies.items():
                label = f"{name}, {text}"
                evaluation = evaluate(
                    frozen, task, policy=policy, split=self.split, batch_size=self.batch_size, seed=self.seed,
                    budget=budget,
                    progress=lambda batches, label=label: tqdm(batches, desc=label, leave=False, disable=None),
                )  # fmt: skip
                results.setdefault(name, {})[text] = evaluation.summary()
        if self.json:
            print_json({"checkpoint": str(saved.folder), "split": self.split, "tasks": results})
        else:
            print(evaluation_table(results))

    def _policies(self, model: DEN) -> dict[str, tuple[Policy, float | None]]:
        """What is to be evaluated by its name, and the budget of a selector that is told one."""
        from den.metrics import POLICIES

        if self.budget and "selector" not in self.policy:
            raise UserError(f"budget is for the selector, but policy is {' '.join(self.policy)}")
        policies: dict[str, tuple[Policy, float | None]] = {}
        for text in self.policy:
            if text != "selector":
                policy = text if text in POLICIES else parse_path(text, model.num_blocks, model.num_levels)
                policies[text] = policy, None
                continue
            for budget in self.budget or (None,):
                name = text if budget is None else f"{text} at {check_budget(budget, model):g}"
                policies[name] = text, budget
        return policies

    def _given(self, saved: Saved, names: list[str]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.data is not None:
            if len(names) > 1:
                raise UserError(f"--data is for one task; say which with --task: {', '.join(names)}")
            given = {key: value for key, value in data_source(self.data, self.root).items() if value is not None}
            if given["dataset"] != saved.source.get(names[0], {}).get("dataset"):
                given["subset"] = None
        elif self.root is not None:
            given["root"] = str(self.root)
        if self.image_size is not None:
            given["image_size"] = self.image_size
        return given


def evaluation_table(results: dict[str, dict[str, Any]]) -> str:
    """A row a task and policy."""
    from den.report import format_table

    header = ["task", "policy", "images", "accuracy %", "mean cost", "MFLOPs", "paths", "top path"]
    rows = [
        [
            task,
            policy,
            str(r["images"]),
            f"{r['accuracy']:.2f}",
            f"{r['cost_mean']:.3f} ± {r['cost_std']:.3f}",
            f"{r['flops_mean'] / 1e6:.2f}",
            str(r["unique_paths"]),
            f"{100 * r['top_path_share']:.0f}%",
        ]
        for task, policies in results.items()
        for policy, r in policies.items()
    ]
    return format_table(header, rows)

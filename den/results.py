"""What a run says of its test images: summary.json and evaluations.safetensors, written and read.

summary.json: task -> policy -> `Evaluation.summary()`. evaluations.safetensors: `<task>/<policy>/<what>`, over the test
images in their order: level uint8 [N, B], prediction and label int16 [N], cost float32 [N], flops int64 [N]; where
known, parameters int64 [N] and own_cost float32 [N]; where a selector chose, level_probs float16 [N, B, L].

N test images, B blocks, L levels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from den.metrics import POLICIES, Evaluation, Policy, evaluate
from den.run_folder import RunFolder
from den.tasks import Task

SUMMARY, EVALUATIONS = "summary.json", "evaluations.safetensors"
Evaluations = Mapping[str, Mapping[str, Evaluation]]


def write_results(
    folder: RunFolder | str | os.PathLike[str] | None,
    model: nn.Module,
    tasks: Sequence[Task],
    policies: Sequence[str] | Mapping[str, Policy] = POLICIES,
    *,
    seed: int = 0,
    tables: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the test images of its tasks and write what came of it; returns the summary.

    Args:
        folder: of the run; None: nothing is written.
        model: a DEN, its frozen form, or another model that `evaluate` takes.
        policies: names that `evaluate` knows, or a policy for each name, such as {"level 1": [1, 1, 1]}.
        seed: of the policies that draw.
        tables: the costs [B, L] that a task was trained with, by its name; None: not told.
    """
    named = policies if isinstance(policies, Mapping) else {name: name for name in policies}
    evaluations = {
        task.name: {
            name: evaluate(model, task, policy=policy, seed=seed, cost_BL=(tables or {}).get(task.name))
            for name, policy in named.items()
        }
        for task in tasks
    }
    return save_results(folder, evaluations)


def save_results(folder: RunFolder | str | os.PathLike[str] | None, evaluations: Evaluations) -> dict[str, Any]:
    """Write evaluations, task -> policy, to a run folder (None: nowhere) and return their summary.

    Raises ValueError for a policy's name with a slash.
    """
    summary: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for task, policies in evaluations.items():
        for policy, evaluation in policies.items():
            if "/" in policy:
                raise ValueError(f"policy has the name {policy!r}; it must be without slashes")
            summary.setdefault(task, {})[policy] = evaluation.summary()
            tensors.update({f"{task}/{policy}/{name}": t for name, t in _tensors(evaluation).items()})
    if folder is not None:
        run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
        run.write_tensors(EVALUATIONS, tensors)
        run.write_json(SUMMARY, summary)
    return summary


def _tensors(evaluation: Evaluation) -> dict[str, Tensor]:
    tensors = {
        "level": evaluation.level.to(torch.uint8),
        "prediction": evaluation.prediction.to(torch.int16),
        "label": evaluation.label.to(torch.int16),
        "cost": evaluation.cost.float(),
        "flops": evaluation.flops.long(),
    }
    if evaluation.parameters is not None:
        tensors["parameters"] = evaluation.parameters.long()
    if evaluation.own_cost is not None:
        tensors["own_cost"] = evaluation.own_cost.float()
    if evaluation.probs is not None:
        tensors["level_probs"] = evaluation.probs.half()
    # Clones: safetensors refuses tensors that share memory, as two policies may.
    return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}


def read_evaluations(folder: str | os.PathLike[str]) -> dict[str, dict[str, Evaluation]]:
    """The evaluations of a run folder, task -> policy; empty where it has none.

    Raises ValueError for a file that is damaged.
    """
    path = Path(folder) / EVALUATIONS
    if not path.exists():
        return {}
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    try:
        for key, tensor in load_file(path).items():
            task, policy, name = key.rsplit("/", 2)
            found.setdefault((task, policy), {})[name] = tensor
        evaluations: dict[str, dict[str, Evaluation]] = {}
        for (task, policy), tensors in found.items():
            evaluations.setdefault(task, {})[policy] = _evaluation(tensors)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return evaluations


def _evaluation(tensors: Mapping[str, Tensor]) -> Evaluation:
    probs = tensors.get("level_probs")
    return Evaluation(
        prediction=tensors["prediction"].long(),
        label=tensors["label"].long(),
        level=tensors["level"].long(),
        probs=None if probs is None else probs.float(),
        cost=tensors["cost"],
        flops=tensors["flops"],
        parameters=tensors.get("parameters"),
        own_cost=tensors.get("own_cost"),
    )


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder.

    config, summary: of config.json and summary.json. metrics: the lines of metrics.jsonl.
    """

    path: Path
    config: dict[str, Any]
    summary: dict[str, dict[str, dict[str, Any]]]
    metrics: tuple[dict[str, Any], ...]

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the run is an example of; a run that does not say is a DEN with its selector, of no scenario."""
        seed = self.config.get("train", {}).get("seed", 0)
        unsaid = {"scenario": None, "scale": None, "method": "den", "policy": "selector", "row": None, "seed": seed}
        return {**unsaid, **self.config.get("about", {})}

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Evaluation]]:
        """task -> policy -> `Evaluation`; empty where the run wrote none. Raises ValueError for a damaged file."""
        return read_evaluations(self.path)

    @property
    def own(self) -> dict[str, dict[str, Any]]:
        """task -> the summary of the method's own policy."""
        policy = self.about["policy"]
        return {task: policies[policy] for task, policies in self.summary.items()}


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a finished run.

    Raises:
        FileNotFoundError: the folder is missing, holds no run, or one that is not finished.
        ValueError: a file of it is damaged, or its summary lacks the policy that is its method's own.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing; give a run folder of den train")
    if not (path / "config.json").exists() or (path / "model.safetensors").exists():
        raise FileNotFoundError(f"{path} holds no run (config.json and {SUMMARY} of den train)")
    if not (path / SUMMARY).exists():
        raise FileNotFoundError(f"{path} is a run without {SUMMARY} yet; finish it with den train --resume")
    config, summary = _read_json(path / "config.json"), _read_json(path / SUMMARY)
    run = Run(path, config, summary, _read_lines(path / "metrics.jsonl"))
    policy = run.about["policy"]
    for task, policies in summary.items():
        if not isinstance(policies, dict) or policy not in policies:
            raise ValueError(f"{path / SUMMARY} lacks the policy {policy!r} of task {task!r}")
    return run


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is not what a run writes; it must be an object that is not empty")
    return content


def _read_lines(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.exists():
        return ()
    try:
        return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON lines: {error}") from error

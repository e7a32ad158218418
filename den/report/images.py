"""Which test images the pictures of a run show, and what stands beside them.

N images, C channels, H W space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from den.metrics import Evaluation
from den.report.models import Shown, most_selected, nearest, probabilities, typical
from den.tasks import Task


def first_images(task: Task) -> Tensor:
    """Test images as a network takes them, float [M, C, H, W], 256 at most."""
    return next(iter(task.batches("test", min(256, len(task.test)), training=False)))[0]


def checked(task: Task, evaluation: Evaluation) -> Task:
    """The task itself. Raises ValueError where its test images cannot be those of the evaluation."""
    if len(task.test) != len(evaluation.label) or not torch.equal(task.test.labels.long(), evaluation.label):
        raise ValueError(f"the test images of {task.name!r} are others than those that the run was evaluated on")
    return task


def _pixels(task: Task, index: int) -> Any:
    return task.test[index][0].permute(1, 2, 0).numpy()


def _shown(task: Task, evaluation: Evaluation, index: int, more: str = "") -> Shown:
    name = task.class_names[int(evaluation.label[index])]
    name = name if len(name) <= 14 else f"{name[:13]}…"
    return Shown(_pixels(task, index), f"{name}{more}", bool(evaluation.correct[index]))


def similar_rows(tasks: dict[str, Task], evaluations: dict[str, Evaluation]) -> list[tuple[Shown, dict[str, list]]]:
    """Figure 3's rows: a query of each task (three, of a single task), and the nearest images of every task."""
    queries, count = (3, 6) if len(tasks) == 1 else (1, 4 if len(tasks) <= 3 else 3)
    rows = []
    probs = {task: probabilities(evaluation) for task, evaluation in evaluations.items()}
    for task, evaluation in evaluations.items():
        for query in typical(evaluation, queries):
            found = {}
            for other, others in evaluations.items():
                exclude = query if other == task else None
                indices, distances = nearest(probs[other], probs[task][query], count, exclude)
                found[other] = [
                    _shown(tasks[other], others, i, f"\n{distance:.3f}")
                    for i, distance in zip(indices, distances, strict=True)
                ]
            rows.append((_shown(tasks[task], evaluation, query, f"\n{task}"), found))
    return rows


def model_rows(
    tasks: dict[str, Task], evaluations: dict[str, Evaluation], images: int = 8
) -> list[tuple[str, list[int], list[Shown]]]:
    """Figure 7's rows: the most selected models of each task, six rows at most; a letter a model, whoever takes it."""
    each = max(1, min(4, 6 // len(tasks)))
    rows, letters = [], dict[tuple[int, ...], str]()
    for task, evaluation in evaluations.items():
        for path, members in most_selected(evaluation.level, each):
            letter = letters.setdefault(tuple(path), chr(ord("A") + len(letters)))
            share, cost = 100 * len(members) / len(evaluation.label), float(evaluation.cost[members[0]])
            name = f"Model {letter}: {share:.0f}% of {task}, cost {cost:.2f}"
            chosen = [members[i] for i in _spaced(len(members), images)]
            rows.append((name, path, [_shown(tasks[task], evaluation, i) for i in chosen]))
    return rows


def _spaced(length: int, count: int) -> list[int]:
    """So many places of a sequence, evenly spaced: data sets may be sorted by class."""
    return torch.linspace(0, length - 1, min(count, length)).round().long().tolist()


def path_samples(task: Task, evaluation: Evaluation, count: int = 6) -> list[dict[str, Any]]:
    """Test images from the cheapest path to the dearest, evenly spaced, as `figures.sample_paths` takes them."""
    order = evaluation.cost.argsort(stable=True)
    places = _spaced(len(order), count)
    return [
        {
            "image": _pixels(task, i),
            "task": task.name,
            "path": evaluation.level[i].tolist(),
            "cost": float(evaluation.cost[i]),
            "prediction": task.class_names[int(evaluation.prediction[i])],
            "label": task.class_names[int(evaluation.label[i])],
        }
        for i in order[places].tolist()
    ]

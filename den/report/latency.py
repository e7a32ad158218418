"""Measured time of the methods of a study: all of them take turns in one run, on the same test images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from den import baselines, checkpoint
from den.baselines.independent import Independent, IndependentNetworks
from den.dense import dense
from den.freeze import freeze
from den.model import DEN, create_model
from den.report.groups import BUDGET, Entry, Study
from den.timing import interleaved

BATCHES = (1, 64)
# entry's label -> task -> batch -> milliseconds an image
Latencies = dict[str, dict[str, dict[int, float]]]


@torch.inference_mode()
def measure(
    study: Study,
    images_of: Callable[[str], Tensor],
    *,
    batches: Sequence[int] = BATCHES,
    seconds: float = 2.0,
    device: torch.device | str = "cpu",
) -> Latencies:
    """Milliseconds an image of each method's own result, first seed, on each task.

    A selector's network is frozen and its selector included. The full path, and a fixed one, run as the plain network
    of that path (`den.dense`), and so do independent networks. Random levels are drawn beforehand. Any other method
    whose network is no DEN is left out.

    Args:
        images_of: the normalised test images of a task, float [M, C, H, W].
        batches: sizes. seconds: about how long each task and batch takes.
    """
    entries = [entry for entry in study.entries if entry.own and (_is_den(entry) or _is_independent(entry))]
    models = {entry.label: baselines.load(entry.runs[0].path).to(device) for entry in entries}
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else None
    found: Latencies = {entry.label: {} for entry in entries}
    for task in study.tasks:
        images = images_of(task).to(device)
        for batch in batches:
            count = max(1, min(16, 64 // batch))
            chosen = torch.arange(count * batch, device=images.device) % len(images)
            chunks = images[chosen].contiguous(memory_format=torch.channels_last).split(batch)
            engines = {entry.label: _engine(entry, models[entry.label], task, chunks) for entry in entries}
            times = interleaved(engines, range(count), seconds=seconds, synchronize=wait) if engines else {}
            for label, values in times.items():
                found[label].setdefault(task, {})[batch] = 1000 * sum(values) / (count * batch)
    return {label: tasks for label, tasks in found.items() if tasks}


def _is_den(entry: Entry) -> bool:
    """Whether `den.load` can read the run's model."""
    run = entry.runs[0]
    try:
        config = checkpoint.read_config(run.path / "checkpoint")
    except ValueError:
        return False
    return set(entry.tasks) <= set(config["model"]["tasks"])


def _is_independent(entry: Entry) -> bool:
    """Whether the run's model is a plain network a task, whose weights are there."""
    run = entry.runs[0]
    known = run.config["model"].get("name") == Independent.name
    return known and (run.path / "checkpoint" / checkpoint.TENSORS).is_file()


def _own_network(networks: IndependentNetworks, task: str) -> DEN:
    """A task's network as a DEN of one level."""
    config = networks.config
    more = {**config["options"], "ratios": (1,), "selector": "light"}
    model = create_model(config["model"], {task: config["tasks"][task]}, **more)
    model.estimator.load_state_dict(networks.networks[task].state_dict())
    return model.to(next(networks.parameters()).device).eval()


def _engine(entry: Entry, model: Any, task: str, chunks: Sequence[Tensor]) -> Callable[[int], object]:
    """What runs one of the batches under the entry's policy."""
    if isinstance(model, IndependentNetworks):
        own = dense(_own_network(model, task), task)
        return lambda index: own(chunks[index])
    if entry.policy == "selector" or entry.policy.startswith(BUDGET):
        frozen = freeze(model)
        told = {} if entry.policy == "selector" else {"budget": float(entry.policy.removeprefix(BUDGET))}
        return lambda index: frozen(chunks[index], task, **told)
    if entry.policy == "random":
        frozen = freeze(model)
        generator = torch.Generator().manual_seed(0)
        shape = (len(chunks[0]), model.num_blocks)
        levels = [torch.randint(model.num_levels, shape, generator=generator).to(x.device) for x in chunks]
        return lambda index: frozen(chunks[index], task, levels[index])
    path = None if entry.policy == "full" else _path(entry, task)
    plain = dense(model, task, path)
    return lambda index: plain(chunks[index])


def _path(entry: Entry, task: str) -> list[int]:
    """The one path of a method that has one for all images."""
    evaluation = entry.runs[0].evaluations[task][entry.policy]
    return evaluation.level[0].tolist()

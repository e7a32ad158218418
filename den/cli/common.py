"""What the commands share: errors, finding a model, reading the tasks that it was trained on, writing results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from den.model import DEN
    from den.tasks import Task

DATA_SETS = (
    "cifar10", "cifar100", "stl10", "mnist", "fashion_mnist", "tiny_imagenet", "mini_imagenet", "folder", "digits",
    "mnist_subset",
)  # fmt: skip


TABLED = ("selector", "random", "full")  # policies that a table of accuracies has unless others are asked for


class UserError(Exception):
    """What the user can put right: told in one line, without a traceback."""


BAD_INPUT = (OSError, ValueError, TypeError, RuntimeError)


@contextmanager
def user_input(*kinds: type[Exception]) -> Iterator[None]:
    """Around reading files and checking options: errors of these kinds, by default all that den raises for bad input,
    become a UserError."""
    expected = kinds or BAD_INPUT
    try:
        yield
    except expected as error:
        raise UserError(_message(error)) from error


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


@dataclass(frozen=True)
class Origin:
    """Where the images of a training run came from.

    folder: that tells it, of a checkpoint or a run.
    preprocessing: of each task, as `den.tasks.preprocess` takes it.
    source: of each task, the arguments of `den.tasks.load_task`; empty where the model was not trained by `den train`.
    """

    folder: Path
    preprocessing: dict[str, dict[str, Any]]
    source: dict[str, dict[str, Any]]

    def preprocessing_of(self, task: str) -> dict[str, Any]:
        """Raises UserError where none was saved."""
        if task not in self.preprocessing:
            raise UserError(
                f"{self.folder} does not say how images of {task!r} are prepared; save the model with "
                "den.save(model, folder, meta={'preprocessing': {task.name: task.preprocessing}})"
            )
        return self.preprocessing[task]


@dataclass(frozen=True)
class Saved(Origin):
    """A trained model, and where the images that it was trained on came from.

    method, policy: of the run (`about` in its config.json); those of a DEN where nothing tells.
    """

    model: DEN
    method: str = "den"
    policy: str = "selector"

    @property
    def has_selector(self) -> bool:
        """Whether its selector was trained: that of most competitors is as it was initialised."""
        return self.policy == "selector"

    def check_selector(self, remedy: str) -> None:
        """Raises UserError where the selector was not trained, with what to do instead."""
        if not self.has_selector:
            raise UserError(f"{self.folder} is a run of {self.method}, which trains no selector; {remedy}")


def find_checkpoint(path: Path) -> Path:
    """The model folder that a path means: itself, or the checkpoint of a run folder. Raises UserError."""
    from den.run_folder import RunFolder

    if not path.exists():
        raise UserError(f"{path} is missing; give a run folder of den train, or a folder that den.save wrote")
    run = RunFolder(path)
    if run.has_checkpoint:
        return run.checkpoint
    if (path / "metrics.jsonl").exists() or (path / "summary.json").exists():
        raise UserError(f"{path} is a run without a checkpoint yet; it gets one after its first epoch")
    return path


def load_model(path: Path, device: str) -> Saved:
    """A trained model, in evaluation mode. Raises UserError."""
    from den import checkpoint

    folder = find_checkpoint(path)
    with user_input():
        model = checkpoint.load(folder, device=pick_device(device))
        meta = checkpoint.load_meta(folder)
    about = meta.get("about", {})
    told = {key: about[key] for key in ("method", "policy") if key in about}
    return Saved(folder, meta.get("preprocessing", {}), meta.get("source", {}).get("tasks", {}), model, **told)


def pick_device(name: str) -> torch.device:
    """The device of an option; "auto" is a GPU if there is one. Raises UserError for one that is not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with user_input():
        device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, but torch sees no GPU here; leave --device out, or give cpu")
    return device


def pick_tasks(model: DEN, wanted: Sequence[str]) -> list[str]:
    """The tasks asked for; all of the model's when none is. Raises UserError for one that it does not have."""
    for task in wanted:
        if task not in model.tasks:
            raise UserError(f"task {task!r} is none of the model's; they are {', '.join(model.tasks)}")
    return list(wanted) or list(model.tasks)


def read_task(origin: Origin, task: str, given: Mapping[str, Any]) -> Task:
    """The images of a task as the model was trained on them; `given` options replace saved ones. Raises UserError."""
    from den.tasks import load_task

    options = {**origin.source.get(task, {}), **given}
    if "dataset" not in options:
        raise UserError(f"{origin.folder} does not say where images of {task!r} are; give --data and --root")
    preprocessing = origin.preprocessing_of(task)
    options.setdefault("channels", preprocessing["channels"])
    if "image_size" in given or task not in origin.source:
        options["image_size"] = given.get("image_size") or preprocessing["image_size"]
    with user_input():
        loaded = load_task(**options, name=task)
    if list(loaded.class_names) != preprocessing["class_names"]:
        raise UserError(
            f"{options['dataset']} has the classes {_few(loaded.class_names)}, but the model was trained on "
            f"{_few(preprocessing['class_names'])}"
        )
    return replace(loaded, mean=tuple(preprocessing["mean"]), std=tuple(preprocessing["std"]))


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


def data_source(entry: str, root: Path | None) -> dict[str, Any]:
    """`load_task`'s dataset and root for NAME or NAME:FOLDER."""
    name, _, own = entry.partition(":")
    folder = Path(own) if own else root
    return {"dataset": name, "root": None if folder is None else str(folder.absolute())}


def check_budget(budget: float, model: DEN) -> float:
    """The budget, if the model's selector takes it. Raises UserError."""
    if not model.takes_budget:
        raise UserError(f"budget is {budget:g}, but the model's selector takes none; train one with --budget")
    if not 0 < budget <= 1:
        raise UserError(f"budget is {budget:g}; it must be above 0 and at most 1, a share of the full cost")
    return budget


def parse_path(text: str, num_blocks: int, num_levels: int) -> list[int]:
    """Levels [B] of a path such as 0-3-1-2; one number stands for every block. Raises UserError."""
    parts = text.split("-")
    if not all(part.isdecimal() for part in parts):
        raise UserError(
            f"policy is {text!r}; it must be selector, shuffled, random, full, or levels such as 2 or 0-3-1-2"
        )
    levels = [int(part) for part in parts]
    levels = levels * num_blocks if len(levels) == 1 else levels
    if len(levels) != num_blocks:
        raise UserError(f"policy {text!r} has {len(levels)} levels; the model has {num_blocks} blocks")
    if max(levels) >= num_levels:
        raise UserError(f"policy {text!r} has level {max(levels)}; levels run from 0 to {num_levels - 1}")
    return levels


def print_json(value: Any, *, lines: bool = False) -> None:
    """JSON on standard output; `lines`: one line."""
    print(json.dumps(value, indent=None if lines else 2), flush=True)


def log(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)

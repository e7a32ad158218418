"""The folder of a training run: what is written, where, and how it survives being killed at any moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from den import checkpoint
from den.files import write_whole
from den.model import DEN


class RunFolder:
    """config.json, metrics.jsonl (a line an epoch), summary.json and evaluations.safetensors (den/results.py), and
    checkpoint/ (a model that `den.load` reads, with the trainer's own state beside it).

    Files are written under a temporary name and renamed, the checkpoint as a whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def checkpoint(self) -> Path:
        """The folder that `den.load` reads."""
        return self.path / "checkpoint"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from. A run killed between two renames has it under its old name."""
        old = self.path / "checkpoint.old"
        if not self.checkpoint.exists() and old.exists():
            old.rename(self.checkpoint)
        return self.checkpoint.exists()

    def prepare(self, config: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder and write config.json. A run that goes on keeps the time at which it was started.

        Raises FileExistsError if it holds a run and `resume` is False, ValueError if that run was of another model.
        """
        path = self.path / "config.json"
        if path.exists() and not resume:
            raise FileExistsError(f"{self.path} holds a run already; give another folder, or resume it")
        if path.exists():
            begun = json.loads(path.read_text())
            model = begun["model"]
            config = {**config, **{key: begun[key] for key in ("started",) if key in begun}}
            if model != json.loads(json.dumps(config["model"])):
                raise ValueError(f"{path} is of another model ({model.get('name')}); give another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("config.json", config)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        write_whole(self.path / name, lambda path: path.write_text(json.dumps(value, indent=2) + "\n"))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file, whole or not at all."""
        write_whole(self.path / name, lambda path: save_file(dict(tensors), path))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def truncate_metrics(self, lines: int) -> None:
        """Drop the lines behind the first `lines`: epochs that a resumed run does again."""
        path = self.path / "metrics.jsonl"
        kept = path.read_text().splitlines(keepends=True)[:lines] if path.exists() else []
        write_whole(path, lambda temporary: temporary.write_text("".join(kept)))

    def save_checkpoint(
        self,
        model: nn.Module,
        meta: Mapping[str, Any],
        *,
        extra: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        generator: torch.Generator,
        values: Mapping[str, Any],
    ) -> None:
        """Replace the checkpoint: the model (a DEN as `den.save` writes it), and what goes on from it."""
        fresh, old = self.path / "checkpoint.new", self.path / "checkpoint.old"
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(model, DEN):
            checkpoint.save(model, fresh, meta)
        else:
            fresh.mkdir()
            save_file(_tensors(model), fresh / checkpoint.TENSORS)
        tensors = {"generator": generator.get_state()}
        for name, module in extra.items():
            tensors.update({f"extra.{name}.{key}": tensor for key, tensor in _tensors(module).items()})
        groups = {}
        for name, optimizer in optimizers.items():
            state, groups[name] = _flatten(optimizer.state_dict())
            tensors.update({f"{name}.{key}": tensor for key, tensor in state.items()})
        save_file(tensors, fresh / "trainer.safetensors")
        (fresh / "trainer.json").write_text(json.dumps({**values, "optimizers": groups}, indent=2) + "\n")
        shutil.rmtree(old, ignore_errors=True)
        if self.checkpoint.exists():
            self.checkpoint.rename(old)
        fresh.rename(self.checkpoint)
        shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(
        self,
        model: nn.Module,
        *,
        extra: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        generator: torch.Generator,
    ) -> dict[str, Any]:
        """Put the checkpoint's state into modules, optimizers and generator; returns the plain values saved with it.

        Raises ValueError for a checkpoint that is not a whole one, or of another model.
        """
        checkpoint.load_tensors(model, self.checkpoint / checkpoint.TENSORS)
        try:
            tensors = load_file(self.checkpoint / "trainer.safetensors")
            values = json.loads((self.checkpoint / "trainer.json").read_text())
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.checkpoint} cannot be resumed from: {error}") from error
        generator.set_state(tensors.pop("generator"))
        for name, module in extra.items():
            module.load_state_dict(_under(f"extra.{name}", tensors))
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(_unflatten(_under(name, tensors), values["optimizers"][name]))
        return values


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `name.`, without it."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _flatten(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's tensors as "parameter.name", and its groups of plain values."""
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, entries in state_dict["state"].items()
        for key, value in entries.items()
        if value is not None
    }
    return tensors, state_dict["param_groups"]


def _unflatten(tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": groups}

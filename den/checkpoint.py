"""Models on disk: a folder with `model.safetensors` and `config.json`. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from den.files import write_whole
from den.model import DEN, create_model

VERSION = 1
TENSORS, CONFIG = "model.safetensors", "config.json"


def save(model: DEN, folder: str | os.PathLike[str], meta: Mapping[str, Any] | None = None) -> None:
    """Write a model to a folder, made if missing; each file appears whole or not at all.

    Args:
        model: a DEN.
        folder: where to.
        meta: anything that JSON can hold, kept in config.json: class names, preprocessing of the tasks, ...

    Raises:
        TypeError: model is not a DEN, or meta holds what JSON cannot.
        OSError: the folder cannot be written.
    """
    if not isinstance(model, DEN):
        raise TypeError(f"model is a {type(model).__name__}; it must be a den.DEN (freeze a model after loading it)")
    content = {"format": "den", "version": VERSION, "model": model.config, "meta": dict(meta or {})}
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta cannot be written as JSON: {error}") from error
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TENSORS, lambda path: save_file(tensors, path))
    write_whole(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def load(
    folder: str | os.PathLike[str],
    *,
    selector: nn.Module | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> DEN:
    """Read a model that `save` wrote, in evaluation mode.

    Args:
        folder: of `save`.
        selector: the module, where the model was made with a selector module of the caller's own.
        device: where to put the model.
        backend: of `den_kernels`.

    Raises:
        ValueError: a file is missing, damaged, of a later version, or holds another model's tensors; the message says
            which and what differs.
    """
    folder = Path(folder)
    config = read_config(folder)["model"]
    if selector is not None:
        if config.get("selector") != "custom":
            raise ValueError(f"selector is given, but the model in {folder} brings its own; leave it out")
        config = {**config, "selector": selector}
    try:
        model = create_model(**config, backend=backend)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} describes no model that can be built: {error}") from error
    load_tensors(model, folder / TENSORS)
    return model.to(device).eval()


def load_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The `meta` that was given to `save`. Raises ValueError as `load` does."""
    return read_config(Path(folder))["meta"]


def read_config(folder: Path) -> dict[str, Any]:
    """The checked content of config.json: {"format", "version", "model", "meta"}. Raises ValueError as `load` does."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} is missing; a model folder has {CONFIG} and {TENSORS}, as den.save writes them")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "den":
        raise ValueError(f"{path} is not a den model's; its 'format' must be 'den'")
    version = content.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(f"{path} has version {version!r}; this release of den reads 1 to {VERSION}")
    for key in ("model", "meta"):
        if not isinstance(content.get(key), dict):
            raise ValueError(f"{path} has {key!r} of {content.get(key)!r}; it must be an object")
    return content


def load_tensors(model: nn.Module, path: Path) -> None:
    """Fill the model from a safetensors file whose names and shapes must be its own. Raises ValueError as `load`."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; a model folder has {CONFIG} and {TENSORS}, as den.save writes them")
    wanted = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    differences = [f"{name} is missing" for name in wanted if name not in found]
    differences += [f"{name} is not in the model" for name in found if name not in wanted]
    for name, tensor in wanted.items():
        if name in found and found[name].shape != tensor.shape:
            differences.append(f"{name} is {tuple(found[name].shape)} instead of {tuple(tensor.shape)}")
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise ValueError(f"{path} holds another model's tensors than {CONFIG} describes: {shown}")
    model.load_state_dict(found)

"""`den predict`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from den.cli.common import Saved, UserError, check_budget, load_model, print_json, user_input

if TYPE_CHECKING:
    from den.freeze import FrozenDEN


@dataclass
class Predict:
    """Classify image files: class, probability, the path taken (the level of each block) and its cost, the mean share
    of the blocks' parameters run."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """Run folder of den train, or a folder that den.save wrote."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE_OR_FOLDER [...]")]
    """Image files, and folders to search for image files."""
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Task whose classes are meant; may be left out if the model has one."""
    budget: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Mean cost that the selector is to keep to, for a model trained with a budget; None: its own."""
    batch_size: int = 64
    """Images in a batch."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:1."""
    backend: Literal["auto", "cpu", "triton", "grouped", "reference"] = "auto"
    """Of den_kernels; auto takes the fastest on this machine."""
    json: bool = False
    """Print JSON lines, an object an image."""

    def run(self, arguments: list[str]) -> None:
        """Classify and print."""
        if self.batch_size < 1:
            raise UserError(f"batch-size is {self.batch_size}; it must be at least 1")
        from tqdm import tqdm

        from den.freeze import freeze
        from den.model import check_task
        from den.report import format_table

        files = self._files()
        saved = load_model(self.checkpoint, self.device)
        saved.check_selector("den predict needs one")
        if self.budget is not None:
            check_budget(self.budget, saved.model)
        with user_input():
            task = check_task(self.task, saved.model.tasks)
            frozen = freeze(saved.model, backend=self.backend)
        rows = []
        # Lines of JSON are themselves the progress.
        with tqdm(total=len(files), leave=False, disable=True if self.json else None) as bar:
            for result in self._predictions(saved, frozen, task, files):
                bar.update()
                if self.json:
                    print_json(result, lines=True)
                else:
                    probability, cost = f"{result['probability']:.3f}", f"{result['cost']:.3f}"
                    rows.append([result["file"], result["class"], probability, result["path"], cost])
        if rows:
            print(format_table(["file", "class", "probability", "path", "cost"], rows, left=(0, 1, 3)))

    def _files(self) -> list[Path]:
        from den.data import find_images

        files: list[Path] = []
        for path in self.images:
            if path.is_dir():
                found = find_images(path)
                if not found:
                    raise UserError(f"{path} holds no images (.png, .jpg, ...)")
                files += found
            elif path.exists():
                files.append(path)
            else:
                raise UserError(f"{path} is missing; give image files or folders of them")
        if not files:
            raise UserError("no image is given; give image files or folders of them")
        return files

    def _predictions(self, saved: Saved, frozen: FrozenDEN, task: str, files: list[Path]) -> Iterator[dict[str, Any]]:
        from den.flops import cost_ratios, flops
        from den.losses import path_cost
        from den.tasks import preprocess

        preprocessing = saved.preprocessing_of(task)
        names, size = preprocessing["class_names"], tuple(preprocessing["image_size"])
        ratios = cost_ratios(saved.model)
        for start in range(0, len(files), self.batch_size):
            batch = files[start : start + self.batch_size]
            with user_input():
                x = preprocess(batch, preprocessing)
            out = frozen(x.to(frozen.device), task=task, budget=self.budget)
            best = out.logits.float().softmax(1).max(1)
            level = out.level.cpu()
            columns = (best.values.tolist(), best.indices.tolist(), level.tolist())
            costs, counts = path_cost(level, ratios).tolist(), flops(saved.model, level, size).tolist()
            for file, probability, label, path, cost, count in zip(batch, *columns, costs, counts, strict=True):
                yield {
                    "file": str(file),
                    "task": task,
                    "class": names[label],
                    "label": label,
                    "probability": round(probability, 6),
                    "path": "-".join(map(str, path)),
                    "cost": round(cost, 6),
                    "flops": count,
                }

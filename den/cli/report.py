"""`den report`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from den.cli.common import Origin, UserError, log, print_json, read_task, user_input

if TYPE_CHECKING:
    from den.results import Run
    from den.tasks import Task


@dataclass
class Report:
    """Tables and pictures of finished runs, beside the paper's, in one page that needs no network.

    Runs that differ in their seed alone become mean ± standard deviation; runs on the same tasks are compared. Writes
    report.html, tables.md, report.json, and figures/ (PNG and SVG): Tables 2 to 5 and Figures 3, 5, 6 and 7 of the
    paper with these runs, accuracy against FLOPs and time, training curves.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders of den train, or folders that hold run folders."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder to write, made if missing; files of the same names are replaced."""
    latency: bool = False
    """Measure the time of every method, on this machine's CPU, batches 1 and 64; otherwise no time is told."""
    seconds: float = 2.0
    """About how long each task and batch size is measured."""
    paper_table: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NUMBER [NUMBER ...]")] = ()
    """Printed tables to show whole, such as 2 or 4b, whether or not a run belongs to them."""
    root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder that holds the data sets, for pictures of images; None: the one of training."""
    json: bool = False
    """Print JSON: the files written, and every number of the tables."""

    def run(self, arguments: list[str]) -> None:
        """Read the runs, draw and write."""
        if self.out is None:
            raise UserError("--out is missing; give the folder to write the report to")
        if not self.runs:
            raise UserError("no run is given; give run folders of den train")
        if self.seconds <= 0:
            raise UserError(f"seconds is {self.seconds}; it must be above 0")
        from den.report.build import build
        from den.results import read_run

        with user_input():
            runs = [read_run(folder) for path in self.runs for folder in run_folders(path)]
            report = build(
                runs,
                self.out,
                task_of=self._task_of(),
                paper_tables=self.paper_table,
                latency=self.latency,
                seconds=self.seconds,
                progress=log,
                command=["den", "report", *arguments],
            )
        for sentence in report.missing:
            log(f"left out: {sentence}")
        if self.json:
            print_json({"out": str(self.out), "files": [str(path) for path in report.files], **report.data})
        else:
            print(f"{len(report.files)} files written; open {report.files[0]}")

    def _task_of(self) -> Callable[[Run, str], Task]:
        """Reads the data of a run's task, each once."""
        given: dict[str, Any] = {} if self.root is None else {"root": str(self.root.absolute())}
        read: dict[str, Task] = {}

        def task_of(run: Run, name: str) -> Task:
            source = run.config.get("source", {}).get("tasks", {})
            origin = Origin(run.path, run.config.get("preprocessing", {}), source)
            key = repr((name, origin.source.get(name), origin.preprocessing.get(name)))
            if key not in read:
                try:
                    read[key] = read_task(origin, name, given)
                except UserError as error:
                    raise ValueError(str(error)) from error
            return read[key]

        return task_of


def run_folders(path: Path) -> list[Path]:
    """The run folders that a path means: itself, or, where it is no run, all below it that are finished."""
    if not path.is_dir() or (path / "config.json").exists():
        return [path]
    found = sorted(file.parent for file in path.rglob("summary.json") if (file.parent / "config.json").exists())
    if not found:
        raise FileNotFoundError(f"{path} holds no finished run (config.json and summary.json of den train)")
    return found

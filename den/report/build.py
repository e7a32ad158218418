"""The whole report: from runs to a folder with pictures, tables and one page."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from PIL import Image

from den.files import write_whole
from den.report import compare, curves, figures, html, images, models, sheets
from den.report.groups import SCENARIOS, Entry, Group, Study, backbone, cost_unit, studies
from den.report.latency import BATCHES, Latencies, measure
from den.results import Run
from den.statistics import Spread
from den.tasks import Task
from den.timing import hardware

MOST_TASKS = 4  # of one run's pictures
TaskOf = Callable[[Run, str], Task]


@dataclass
class Report:
    """What was written, and what could not be.

    files: in the order of writing, report.html first. data: what report.json holds. missing: a sentence each.
    """

    files: list[Path] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def build(
    runs: Sequence[Run],
    out: str | os.PathLike[str],
    *,
    task_of: TaskOf,
    paper_tables: Sequence[str] = (),
    latency: bool = False,
    seconds: float = 2.0,
    command: Sequence[str] = (),
    progress: Callable[[str], object] = lambda text: None,
) -> Report:
    """Write report.html, tables.md, report.json and figures/ to a folder, made if missing.

    Args:
        runs: finished ones; see `den.results.read_run`.
        task_of: the data of a run's task, for pictures of its images; raises ValueError or OSError where they are not.
        paper_tables: numbers of printed tables to show whole, whatever the runs are.
        latency: measure the time of the methods, about `seconds` for each task and batch size.
        command: the command line that asks for it, word by word, to be told in the report.
        progress: told what is being done.

    Raises RuntimeError where matplotlib is missing, ValueError for an unknown table or damaged evaluations.
    """
    writer = _Writer(Path(out), task_of, latency, seconds, progress)
    printed = [sheet for number in paper_tables for sheet in sheets.printed(number)]
    found = studies(runs)
    body = [_head(runs, found)]
    for number, study in enumerate(found):
        body += writer.study(study, f"study-{number + 1}")
    if printed:
        body += [html.heading(2, "Tables of the paper", "paper"), *map(writer.table, printed)]
    made = made_by(command)
    body += writer.conditions(runs, made)
    report = writer.report
    report.data["studies"] = [study_data(study, writer.latencies.get(study.key)) for study in found]
    report.data["missing"] = report.missing
    texts = {
        "report.html": html.page("Deep Elastic Networks: report", body),
        "tables.md": "\n\n".join([_in_words(made), *(table.markdown() for table in writer.tables)]) + "\n",
        "report.json": json.dumps(report.data, indent=2) + "\n",
    }
    report.files = [_write(Path(out) / name, text) for name, text in texts.items()] + report.files
    return report


def made_by(command: Sequence[str]) -> dict[str, Any]:
    """What a report was made by: command line, version, git commit (None outside of a checkout), date and machine."""
    import den

    words = shlex.join(command) if command else None
    return {
        "command": words,
        "den": den.__version__,
        "commit": _commit(Path(den.__file__).parents[1]),
        "date": date.today().isoformat(),
        "hardware": hardware(),
    }


def _commit(checkout: Path) -> str | None:
    """The commit of a git checkout, with "-dirty" where files differ from it; None where there is none, or no git."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _in_words(made: dict[str, Any]) -> str:
    command = f"Made by `{made['command']}`" if made["command"] else "Made"
    commit = f", commit {made['commit']}" if made["commit"] else ""
    return f"{command} with den {made['den']}{commit}, on {made['date']}, on {made['hardware']}."


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _head(runs: Sequence[Run], found: Sequence[Study]) -> str:
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    text = (
        f"From {count}. Every image chooses, block by block, how many channels of the network to run; accuracy, FLOPs "
        "and paths are of the test images, seeds are mean ± standard deviation."
    )
    anchors = [(study.title, f"study-{number + 1}") for number, study in enumerate(found)]
    return html.paragraph(text) + html.links([*anchors, ("Runs and conditions", "conditions")])


class _Writer:
    """Writes the parts of a report and keeps account of what came of them."""

    def __init__(
        self, out: Path, task_of: TaskOf, latency: bool, seconds: float, progress: Callable[[str], object]
    ) -> None:
        self.out, self.task_of, self.latency, self.seconds, self.progress = out, task_of, latency, seconds, progress
        self.report = Report()
        self.tables: list[sheets.Sheet] = []
        self.latencies: dict[str, Latencies] = {}

    def study(self, study: Study, anchor: str) -> list[str]:
        """Tables, comparisons and pictures of single runs."""
        self.progress(study.title)
        body = [html.heading(2, study.title, anchor), html.bullets(list(in_short(study)))]
        body.append(self.table(sheets.results(study)))
        tests = sheets.paired_tests(study)
        if tests is not None:
            body.append(html.details("Paired tests over the same test images", [self.table(tests)]))
        body += self.frontiers(study)
        body += [self.table(table) for table in sheets.beside_paper(study)]
        body += [html.heading(3, "Training"), *self.training(study)]
        dens = [group for group in study.groups if group.first.about["policy"] == "selector"]
        for place, group in enumerate(dens):
            parts = [html.heading(3, f"Which model each image gets: {group.label}"), *self.single(study, group)]
            body += parts if place == 0 else [html.details(f"Which model each image gets: {group.label}", parts[1:])]
        return body

    def table(self, table: sheets.Sheet) -> str:
        """A table in the page and in tables.md."""
        self.tables.append(table)
        return html.sheet(table)

    def frontiers(self, study: Study) -> Iterator[str]:
        """Accuracy against FLOPs, against measured time if asked for, and the ablations."""
        yield html.heading(3, "Accuracy against cost")
        name = study.key
        yield self.picture(
            compare.frontier(study, self.path(name, "accuracy_against_flops"), conditions=_conditions(study)),
            "Accuracy against FLOPs. Up and left is better. Large marks are methods; small ones are the same DEN's "
            "other paths. Bars are standard deviations over seeds.",
        )
        if self.latency:
            yield from self.timed_frontiers(study)
        else:
            yield html.paragraph("Latency: not measured (den report --latency measures it here).", soft=True)
        yield self.picture(
            compare.ablations(study, self.path(name, "ablations"), conditions=_conditions(study)),
            "Figure 5 of the paper with our runs: numbers of levels, and model distributions of the first stage.",
        )

    def timed_frontiers(self, study: Study) -> Iterator[str]:
        """Accuracy against milliseconds, a picture a batch size."""
        self.progress(f"{study.title}: measuring time")
        try:
            found = measure(
                study, lambda task: images.first_images(self.task_of(study.groups[0].first, task)), seconds=self.seconds
            )
        except (ValueError, OSError, RuntimeError) as error:
            self.report.missing.append(f"Latency of {study.title}: {error}")
            return
        self.latencies[study.key] = found
        for batch in BATCHES:
            label = f"milliseconds an image, batch {batch}"

            def price(entry: Entry, task: str | None, batch: int = batch) -> Spread | None:
                tasks = found.get(entry.label, {}) if entry.own else {}
                values = [tasks[name][batch] for name in (tasks if task is None else [task]) if name in tasks]
                return Spread(1, sum(values) / len(values), None) if values else None

            yield self.picture(
                compare.frontier(
                    study, self.path(study.key, f"accuracy_against_latency_{batch}"), price=price, label=label,
                    conditions=f"{_conditions(study)}\n{hardware()}",
                ),
                f"Accuracy against measured time, batch {batch}, selector included. All took turns in one run; a "
                "method whose network is neither a DEN nor plain was not timed.",
            )  # fmt: skip

    def training(self, study: Study) -> Iterator[str]:
        """Curves of each group, and the speed of training."""
        yield self.picture(
            compare.training_speed(study.groups, self.path(study.key, "training_speed"), conditions=_conditions(study)),
            "Speed of training: a point an epoch of the estimator. The elastic kernels skip what a path leaves out, "
            "in training too.",
        )
        for place, group in enumerate(study.groups):
            path = self.path(study.key, f"training_{place + 1}_{_plain(group.label)}")
            drawn = self.picture(
                curves.training_curves(group, path, conditions=_conditions(study)),
                f"Training of {group.label}. A line a seed; shaded: the selector learns, the estimator stands still.",
            )
            if drawn:
                yield drawn if place == 0 else html.details(f"Training curves: {group.label}", [drawn])

    def single(self, study: Study, group: Group) -> Iterator[str]:
        """Pictures of a group's first run: where its images go."""
        run = group.first
        where = f"{group.label}, {study.backbone}, seed {run.about['seed']}"
        ratios = run.config["model"].get("ratios")
        tasks = list(run.summary)[:MOST_TASKS]
        name = _plain(group.label)
        if not ratios:
            return
        if len(tasks) < len(run.summary):
            yield html.paragraph(f"Of {len(run.summary)} tasks, the first {len(tasks)}.", soft=True)
        usage = {task: run.summary[task]["selector"]["level_usage"] for task in tasks}
        yield self.picture(
            figures.level_usage(usage, ratios, self.path(study.key, f"{name}_level_usage"), conditions=where),
            "How often each level is taken, block by block.",
        )
        chosen = {task: run.evaluations.get(task, {}).get("selector") for task in tasks}
        found = {task: e for task, e in chosen.items() if e is not None and e.probs is not None}
        if len(found) < len(tasks):
            self.report.missing.append(f"Figures 3, 6 and 7 of {run.path}: it kept no level probabilities")
            return
        yield self.picture(
            models.selected_models(found, ratios, self.path(study.key, f"{name}_selected_models"), conditions=where),
            "Figure 6 of the paper with our run: (a) how many test images take each model, (b) the mean probability of "
            "each level.",
        )
        try:
            loaded = {task: images.checked(self.task_of(run, task), evaluation) for task, evaluation in found.items()}
        except (ValueError, OSError) as error:
            self.report.missing.append(f"Pictures with images of {run.path}: {error}")
            return
        yield self.picture(
            models.similar_models(
                images.similar_rows(loaded, found), self.path(study.key, f"{name}_similar_models"), conditions=where
            ),
            "Figure 3 of the paper with our run: a query (an image of median cost, classified right) and the images of "
            "every task whose model distributions are nearest to its own by l2 distance. Red: classified wrong.",
        )
        yield self.picture(
            models.images_by_model(
                images.model_rows(loaded, found),
                ratios,
                self.path(study.key, f"{name}_images_by_model"),
                conditions=where,
            ),
            "Figure 7 of the paper with our run: the most selected models of each task, and test images that "
            "selected them, evenly over the data set.",
        )
        samples = [sample for task, data in loaded.items() for sample in images.path_samples(data, found[task])]
        yield self.picture(
            figures.sample_paths(samples, ratios, self.path(study.key, f"{name}_sample_paths"), conditions=where),
            "Test images from the cheapest path to the dearest.",
        )

    def conditions(self, runs: Sequence[Run], made: dict[str, Any]) -> list[str]:
        """The runs, what is missing, and what this was made by."""
        header = (
            "run",
            "method",
            "scenario",
            "scale",
            "seed",
            "model",
            "tasks",
            "started",
            "minutes",
            "threads",
            "training",
        )
        rows = tuple(_run_row(run) for run in runs)
        notes = ["Minutes of training, without evaluation."]
        if any("started" not in run.config for run in runs):
            notes.append("Started: where a run does not tell it, the date of its config.json.")
        table = sheets.Sheet("Runs", header, rows, left=(0, 1, 2, 3, 5, 6, 7, 10), notes=tuple(notes))
        body = [html.heading(2, "Runs and conditions", "conditions"), self.table(table)]
        if self.report.missing:
            body += [html.heading(3, "Left out"), html.bullets(self.report.missing)]
        self.report.data = {**made, "runs": [run_data(run) for run in runs]}
        return [*body, html.paragraph(_in_words(made).replace("`", ""), soft=True)]

    def path(self, *names: str) -> Path:
        """Where a picture goes."""
        return self.out / "figures" / "_".join(names)

    def picture(self, files: Sequence[Path], caption: str) -> str:
        """A picture in the page; nothing where none was drawn."""
        if not files:
            return ""
        self.report.files += files
        with Image.open(files[0]) as image:
            width = image.width / 150
        return html.picture(files[0], caption, width)


def _conditions(study: Study) -> str:
    scale = f", {study.scale} scale" if study.scale else ""
    name = SCENARIOS.get(study.scenario or "", study.scenario or "").partition(",")[0]
    return f"{name}{scale}, {study.backbone}".lstrip(", ")


def _plain(text: str) -> str:
    text = text.replace(".", "-")
    return "_".join("".join(c if c.isascii() and (c.isalnum() or c == "-") else " " for c in text).split())


def _run_row(run: Run) -> tuple[str, ...]:
    train, about = run.config.get("train", {}), run.about
    data = run_data(run)
    epochs = f"{len(run.metrics)} epochs"
    when = (data["started"], f"{data['minutes']:.1f}", str(data["threads"] or sheets.DASH))
    batch = f", batch {train['batch_size']}" if "batch_size" in train else ""
    told = [
        str(about[key]) if about[key] is not None else sheets.DASH for key in ("method", "scenario", "scale", "seed")
    ]
    return (str(run.path), *told, backbone(run), ", ".join(run.summary), *when, epochs + batch)


def in_short(study: Study) -> Iterator[str]:
    """A sentence a method: mean accuracy, and the share of the full network's FLOPs."""
    for entry in study.entries:
        accuracy, full = entry.spread(None, "accuracy"), sheets.full_flops(study, entry)
        flops = entry.flops(None, selector=True) or entry.flops(None)
        if not entry.own or accuracy is None:
            continue
        seeds = f", {accuracy.seeds} seeds" if accuracy.seeds > 1 else ""
        share = f" at {flops.mean / full:.2f} of the full network's FLOPs" if full and flops else ""
        selector = ", its selector's included" if entry.policy == "selector" and share else ""
        yield f"{entry.label}: {sheets.told(accuracy, 2)}%{share}{selector}{seeds}."


# For programs


def run_data(run: Run) -> dict[str, Any]:
    """A run's path as it was given, the date of its start, minutes of training, and threads (None: not logged)."""
    begun = date.fromtimestamp((run.path / "config.json").stat().st_mtime).isoformat()
    return {
        "path": str(run.path),
        "started": str(run.config.get("started", begun))[:10],
        "minutes": round(sum(line.get("seconds", 0) for line in run.metrics) / 60, 1),
        "threads": run.config.get("threads"),
    }


def study_data(study: Study, latencies: Latencies | None = None) -> dict[str, Any]:
    """A study as plain values: for each method and task, mean and deviation of every number that is known."""
    keys = ("accuracy", "flops_mean", "selector_flops", "cost_mean", "own_cost_mean", "parameters", "parameters_mean",
            "unique_paths")  # fmt: skip
    methods = []
    for entry in study.entries:
        tasks = {}
        for task in study.tasks:
            spreads = {key: entry.spread(task, key) for key in keys}
            tasks[task] = {key: {"mean": s.mean, "std": s.std} for key, s in spreads.items() if s is not None}
        about = entry.runs[0].about
        methods.append(
            {
                "label": entry.label,
                "method": entry.method,
                "policy": entry.policy,
                "own": entry.own,
                "row": about["row"],
                "cost_unit": cost_unit(entry.runs[0]),
                "seeds": [run.about["seed"] for run in entry.runs],
                "runs": [str(run.path) for run in entry.runs],
                "tasks": tasks,
                "milliseconds": (latencies or {}).get(entry.label) if entry.own else None,
            }
        )
    head = {"scenario": study.scenario, "scale": study.scale, "backbone": study.backbone}
    return {**head, "tasks": list(study.tasks), "methods": methods}

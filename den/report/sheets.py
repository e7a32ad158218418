"""Tables of a report: the results of a study, its figures beside the paper's, and paired tests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from den import paper
from den.report.groups import Entry, Study, told
from den.report.tables import format_table
from den.statistics import Spread, bootstrap_seeds, correct, mcnemar, spread

MOST_TASKS = 4  # told one by one; of more, their mean
DASH = "-"


@dataclass(frozen=True)
class Sheet:
    """A table. spans: a line above the header, text and number of columns. left: columns of text.

    strong: rows that stand out. notes: sentences below it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    spans: tuple[tuple[str, int], ...] = ()
    left: tuple[int, ...] = (0,)
    strong: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table in Markdown, its spans as parts of the header."""
        header = list(self.header)
        start = 0
        for text, width in self.spans:
            if text:
                header[start : start + width] = [f"{text}: {name}" for name in header[start : start + width]]
            start += width
        parts = [f"### {self.title}", format_table(header, self.rows, markdown=True, left=self.left)]
        return "\n\n".join([*parts, *(f"- {note}" for note in self.notes)])


# The results of a study


def results(study: Study) -> Sheet:
    """A row a method and policy: accuracy of each task, FLOPs in both conventions, cost and parameters."""
    tasks = _tasks(study)
    seeds = any(len(entry.runs) > 1 for entry in study.entries)
    header = ("method", *(name or "mean" for name in tasks), *_OURS, "seeds")
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for entry in study.entries:
        if entry.own:
            strong.add(len(rows))
        accuracy = [told(entry.spread(task, "accuracy"), 2) for task in tasks]
        rows.append((entry.label, *accuracy, *_ours(entry, study), str(len(entry.runs))))
    notes = [
        "FLOPs are those of the estimator for an image, in both conventions: 2 x multiply-adds, and multiply-adds. "
        "The selector's come on top. Share: of the full network's FLOPs, without and with the selector.",
        "Parameters are counted as in the paper: convolutions and hidden fully connected layers.",
    ]
    if seeds:
        notes.append("Several seeds: mean ± standard deviation (over n - 1).")
    spans = (("", 1), ("accuracy, %", len(tasks)), ("FLOPs an image, millions", 3), ("share of full", 2),
             ("", 1), ("parameters, millions", 2), ("", 1))  # fmt: skip
    return Sheet("Results on the test images", header, tuple(rows), spans, strong=frozenset(strong), notes=tuple(notes))


_OURS = ("2 x MACs", "MACs", "selector, 2 x", "without", "with selector", "cost", "stored", "used")


def _tasks(study: Study) -> list[str | None]:
    """What has a column of accuracy: each task, if few, and their mean (None)."""
    tasks: list[str | None] = [*study.tasks] if len(study.tasks) <= MOST_TASKS else []
    return [*tasks, None] if len(study.tasks) > 1 else tasks


def _ours(entry: Entry, study: Study) -> tuple[str, ...]:
    """The cells of `_OURS`."""
    full = full_flops(study, entry)
    flops, both = entry.flops(None), entry.flops(None, selector=True)
    return (
        told(flops, 2, 1e-6),
        told(flops, 2, 0.5e-6),
        told(entry.spread(None, "selector_flops"), 2, 1e-6),
        told(flops, 3, 1 / full) if full else DASH,
        told(both, 3, 1 / full) if full else DASH,
        told(entry.spread(None, "cost_mean"), 3),
        told(entry.spread(None, "parameters"), 3, 1e-6),
        told(entry.spread(None, "parameters_mean"), 3, 1e-6),
    )


def full_flops(study: Study, entry: Entry) -> float | None:
    """FLOPs of the full network: of the same runs, if they know them, else of the study's dense network."""
    group = next(group for group in study.groups if group.runs is entry.runs)
    candidates = [e for e in group.entries() if e.policy in ("full", "H")]
    candidates += [g.own for g in study.groups if g.first.about["method"] in ("dense", "independent")]
    candidates += [e for e in study.entries if e.policy == "full"]
    for candidate in candidates:
        found = candidate.flops(None)
        if found is not None:
            return found.mean
    return None


# Beside the paper


def beside_paper(study: Study) -> list[Sheet]:
    """The paper's tables that a study belongs to, our figures beside each printed row, and our other rows below."""
    placed = [(table, _places(study, table)) for table in _candidates(study)]
    return [_paper_sheet(study, table, places) for table, places in placed if any(entries for _, entries in places)]


def printed(number: str) -> list[Sheet]:
    """The paper's table of a number, such as "2", alone. Raises ValueError for another number."""
    found = [table for table in paper.TABLES if table.number.startswith(number) and number]
    if not found:
        numbers = sorted({table.number for table in paper.TABLES})
        raise ValueError(f"table is {number!r}; it must be 2, 3, 4, 5 or one of {', '.join(numbers)}")
    return [
        Sheet(_title(table), _paper_header(table), tuple(_paper_cells(row) for row in table.rows), notes=table.notes)
        for table in found
    ]


def _candidates(study: Study) -> list[paper.Table]:
    """Tables of the study's scenario: those of its backbone, or else of its family; of its tasks, if there are such."""
    tables = [table for table in paper.TABLES if table.scenario == study.scenario]
    tables = [table for table in tables if _of_task(study, table)] or tables
    same = [table for table in tables if table.model == study.backbone]
    family = [table for table in tables if table.model.split("_")[0] == study.backbone.split("_")[0]]
    if same or family:
        return same or family
    named = {_plain(group.first.about["row"]) for group in study.groups if group.first.about["row"]}
    shared = {table: len(named & {_plain(row.name) for row in table.rows}) for table in tables}
    return [table for table in tables if shared[table] and shared[table] == max(shared.values())][:1]


def _of_task(study: Study, table: paper.Table) -> bool:
    return any(set(names) & set(study.tasks) for names in table.tasks)


def _places(study: Study, table: paper.Table) -> list[tuple[paper.Row, list[Entry]]]:
    """Each printed row, and our entries of the same method."""
    return [(row, [entry for entry in study.entries if _stands_beside(entry, row, study, table)]) for row in table.rows]


def _stands_beside(entry: Entry, row: paper.Row, study: Study, table: paper.Table) -> bool:
    about = entry.runs[0].about
    if row.level is not None and (entry.method != "nestednet" or entry.policy != row.level):
        return False
    if about["row"] is not None and entry.policy == about["policy"]:
        return _plain(about["row"]) in (_plain(row.name), _plain(re.sub(r"\s*\([A-Z].*\)$", "", row.name)))
    if row.method == "random":
        return entry.policy == "random" and entry.method in ("den", "random")
    if not entry.own or row.method not in _alike(entry.method):
        return False
    train, model = entry.runs[0].config.get("train", {}), entry.runs[0].config.get("model", {})
    sizes = {model.get("image_size"), *(p["image_size"][0] for p in _preprocessing(entry))}
    rho = train.get("rho") if train.get("target_cost") is None else None  # else it moved
    return (row.rho is None or row.rho == rho) and (row.image_size is None or row.image_size in sizes)


def _alike(method: str) -> tuple[str, ...]:
    """Methods that one printed "Baseline" stands for: the backbone trained by itself."""
    return ("dense", "independent") if method in ("dense", "independent") else (method,)


def _preprocessing(entry: Entry) -> Iterator[dict[str, Any]]:
    yield from entry.runs[0].config.get("preprocessing", {}).values()


def _plain(name: str) -> str:
    return re.sub(r"\[\d+\]|\s|\*", "", name.replace("\u03c1", "rho")).casefold()


def _title(table: paper.Table) -> str:
    return f"Table {table.number} of the paper: {table.title}"


def _paper_header(table: paper.Table) -> tuple[str, ...]:
    return ("method", *table.columns, "FLOPs", "parameters")


def _paper_cells(row: paper.Row) -> tuple[str, ...]:
    return (row.name, *row.accuracy, row.flops, row.parameters)


def _paper_sheet(study: Study, table: paper.Table, places: Sequence[tuple[paper.Row, list[Entry]]]) -> Sheet:
    tasks = _tasks_beside(study, table)
    rows: list[tuple[str, ...]] = []
    strong, used = set[int](), set[str]()
    width = len(table.columns) + 3
    for row, entries in places:
        cells = _paper_cells(row)
        for entry in entries:
            strong.add(len(rows))
            used.add(entry.label)
            rows.append((*cells, *_our_cells(entry, study, tasks)))
            cells = ("",) * width
        if not entries:
            rows.append((*cells, "not run", *[DASH] * (len(tasks) + 6)))
    for entry in study.entries:
        if entry.own and entry.label not in used:
            rows.append(("(not in the paper)", *[""] * (width - 1), *_our_cells(entry, study, tasks)))
    header = (*_paper_header(table), "method", *(task or "mean" for task in tasks), "2 x MACs", "MACs", "full / ours",
              "stored", "used", "seeds")  # fmt: skip
    spans = (("the paper", width), (f"ours{_scale(study)}", 1), ("accuracy, %", len(tasks)), ("FLOPs, millions", 2),
             ("", 1), ("parameters, millions", 2), ("", 1))  # fmt: skip
    left = (0, width)
    return Sheet(
        _title(table), header, tuple(rows), spans, left, frozenset(strong), (*_caveats(study, table), *table.notes)
    )


def _tasks_beside(study: Study, table: paper.Table) -> list[str | None]:
    """Our tasks of the table's columns, in their order; all, where they are others."""
    ours = [next((name for name in names if name in study.tasks), None) for names in table.tasks]
    if all(ours):
        return [*ours, None] if len(ours) > 1 else list(ours)
    return _tasks(study)


def _scale(study: Study) -> str:
    return f", {study.scale} scale" if study.scale else ""


def _caveats(study: Study, table: paper.Table) -> list[str]:
    found = []
    if study.backbone != table.model:
        found.append(f"Ours is {study.backbone}, not {table.backbone}: read the order of the methods, not the figures.")
    if not all(set(names) & set(study.tasks) for names in table.tasks if names):
        found.append("Ours are other data sets than the paper's; the columns name them.")
    return found


def _our_cells(entry: Entry, study: Study, tasks: Sequence[str | None]) -> tuple[str, ...]:
    flops, full = entry.flops(None), full_flops(study, entry)
    values = entry.values(None, "flops_mean")
    ratio: Spread | None = spread([full / value for value in values]) if full and values and all(values) else None
    return (
        entry.label,
        *(told(entry.spread(task, "accuracy"), 2) for task in tasks),
        told(flops, 2, 1e-6),
        told(flops, 2, 0.5e-6),
        f"{told(ratio, 2)}x" if ratio else DASH,
        told(entry.spread(None, "parameters"), 3, 1e-6),
        told(entry.spread(None, "parameters_mean"), 3, 1e-6),
        str(len(entry.runs)),
    )


# Paired tests


def paired_tests(study: Study) -> Sheet | None:
    """Each DEN against each other method on the same test images; None where there are no two with evaluations."""
    dens = [group.own for group in study.groups if group.first.about["method"] == "den"]
    others = [
        group.own
        for group in study.groups
        if group.first.about["method"] in ("slim", "random", "dense", "independent", "blockdrop")
    ]
    rows = []
    for den in dens:
        for other in sorted(others, key=lambda entry: entry.method != "slim"):
            rows += [row for task in study.tasks if (row := _paired(den, other, task)) is not None]
    if not rows:
        return None
    header = (
        "A",
        "B",
        "task",
        "A - B, points",
        "95% interval",
        "p",
        "only A right",
        "only B right",
        "p (McNemar)",
        "seeds",
    )
    notes = (
        "Difference of the mean accuracies over the same test images. Interval and p: bootstrap over images and, where "
        "there are several, seeds. McNemar: exact, of the first seed of each.",
        "Read it where both take the same FLOPs: see the table of results.",
    )
    return Sheet("Paired tests", header, tuple(rows), left=(0, 1, 2), notes=notes)


def _paired(a: Entry, b: Entry, task: str) -> tuple[str, ...] | None:
    correct_a, correct_b = _correct(a, task), _correct(b, task)
    if correct_a is None or correct_b is None or not _same_images(a, b, task):
        return None
    difference, exact = bootstrap_seeds(correct_a, correct_b), mcnemar(correct_a[0], correct_b[0])
    return (
        a.label,
        b.label,
        task,
        f"{difference.points:+.2f}",
        f"{difference.low:+.2f} to {difference.high:+.2f}",
        f"{difference.p:.2g}",
        str(exact.only_a),
        str(exact.only_b),
        f"{exact.p:.2g}",
        f"{len(correct_a)}, {len(correct_b)}",
    )


def _same_images(a: Entry, b: Entry, task: str) -> bool:
    """Whether all runs of both saw the same labels in the same order."""
    runs = [(run, entry.policy) for entry in (a, b) for run in entry.runs]
    labels = [run.evaluations[task][policy].label for run, policy in runs]
    return all(torch.equal(labels[0], other) for other in labels[1:])


def _correct(entry: Entry, task: str) -> Any:
    """bool [S, N]; None where a run kept no evaluations, or they are of unequal images."""
    found = [run.evaluations.get(task, {}).get(entry.policy) for run in entry.runs]
    if any(evaluation is None for evaluation in found):
        return None
    arrays = [correct(e.prediction.numpy(), e.label.numpy()) for e in found if e is not None]
    return np.stack(arrays) if len({len(array) for array in arrays}) == 1 else None

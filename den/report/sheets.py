"""Tables of a report: the results of a study, its figures beside the paper's, and paired tests."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from den import paper
from den.report.groups import UNITS, Entry, Study, cost_unit, told
from den.report.tables import format_table
from den.statistics import Spread, bootstrap_seeds, correct, mcnemar, spread

MOST_TASKS = 4  # told one by one; of more, their mean
DASH = "-"
NEAR = 0.1  # of the FLOPs of two methods that are compared at equal cost


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
    units = {cost_unit(run) for entry in study.entries for run in entry.runs} - {"parameters"}
    costs = ("parameters", "unit of training") if units else ("parameters",)
    header = ("method", *(name or "mean" for name in tasks), *_OURS, *costs, "stored", "used", "seeds")
    rows: list[tuple[str, ...]] = []
    strong: set[int] = set()
    for entry in study.entries:
        if entry.own:
            strong.add(len(rows))
        accuracy = [told(entry.spread(task, "accuracy"), 2) for task in tasks]
        own = (_own_cost(entry),) if units else ()
        parameters = (told(entry.spread(None, key), 3, 1e-6) for key in ("parameters", "parameters_mean"))
        cost = told(entry.spread(None, "cost_mean"), 3)
        rows.append((entry.label, *accuracy, *_ours(entry, study), cost, *own, *parameters, str(len(entry.runs))))
    notes = [
        "FLOPs are those of the estimator for an image, in both conventions: 2 x multiply-adds, and multiply-adds. "
        "The selector's come on top. Share: of the full network's FLOPs, without and with the selector.",
        "Cost is that of equation 5, the mean over blocks of the share of parameters run.",
        "Parameters are counted as in the paper: convolutions and hidden fully connected layers.",
    ]
    if units:
        notes.append("Unit of training: the cost that a DEN was trained on, and held to where it was to meet one.")
    if any(entry.policy == "shuffled" for entry in study.entries):
        notes.append(
            "Levels shuffled over images: the selector's, each image's given to another one. The cost is the same, and "
            "what the accuracy falls by is what fitting paths to images brings."
        )
    if seeds:
        notes.append("Several seeds: mean ± standard deviation (over n - 1).")
    spans = (("", 1), ("accuracy, %", len(tasks)), ("FLOPs an image, millions", 3), ("share of full", 2),
             ("cost, share of", len(costs)), ("parameters, millions", 2), ("", 1))  # fmt: skip
    return Sheet("Results on the test images", header, tuple(rows), spans, strong=frozenset(strong), notes=tuple(notes))


_OURS = ("2 x MACs", "MACs", "selector, 2 x", "without", "with selector")


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
    )


def _own_cost(entry: Entry) -> str:
    """The cost in the unit of training, with its name: that of older runs is known where it is of parameters."""
    unit = cost_unit(entry.runs[0])
    cost = entry.spread(None, "own_cost_mean") or (entry.spread(None, "cost_mean") if unit == "parameters" else None)
    return DASH if cost is None else f"{told(cost, 3)} {UNITS[unit]}"


def full_flops(study: Study, entry: Entry, task: str | None = None) -> float | None:
    """FLOPs of the full network on a task (None: the mean): of the same runs, if they know them, else of the study's
    dense network."""
    group = next(group for group in study.groups if group.runs is entry.runs)
    candidates = [e for e in group.entries() if e.policy in ("full", "H")]
    candidates += [g.own for g in study.groups if g.first.about["method"] in ("dense", "independent")]
    candidates += [e for e in study.entries if e.policy == "full"]
    for candidate in candidates:
        found = candidate.flops(task)
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
    same = [table for table in tables if table.model == _without_size(study.backbone)]
    family = [table for table in tables if table.model.split("_")[0] == study.backbone.split("_")[0]]
    if same or family:
        return same or family
    named = {_plain(group.first.about["row"]) for group in study.groups if group.first.about["row"]}
    shared = {table: len(named & {_plain(row.name) for row in table.rows}) for table in tables}
    return [table for table in tables if shared[table] and shared[table] == max(shared.values())][:1]


def _without_size(backbone: str) -> str:
    """A backbone's name without an image size behind it: both of SimpleConvNet's have rows in one table."""
    return re.sub(r"_(84|224)$", "", backbone)


def _of_task(study: Study, table: paper.Table) -> bool:
    return any(set(names) & set(study.tasks) for names in table.tasks)


def _places(study: Study, table: paper.Table) -> list[tuple[paper.Row, list[Entry]]]:
    """Each printed row of the study's image size, and our entries of the same method."""
    sizes = {size for entry in study.entries for size in _printed_sizes(entry, table)}
    rows = [row for row in table.rows if not sizes or row.image_size in (None, *sizes)]
    return [(row, [entry for entry in study.entries if _stands_beside(entry, row, table)]) for row in rows]


def _printed_sizes(entry: Entry, table: paper.Table) -> set[int]:
    """The image sizes of the table's rows that are nearest to an entry's; none, where it has rows of one alone."""
    printed = {row.image_size for row in table.rows if row.image_size is not None}
    config = entry.runs[0].config
    ours = [config.get("model", {}).get("image_size")]
    ours += [told["image_size"][0] for told in config.get("preprocessing", {}).values()]
    return {min(printed, key=lambda size: abs(size - own)) for own in ours if own} if printed else set()


def _stands_beside(entry: Entry, row: paper.Row, table: paper.Table) -> bool:
    about = entry.runs[0].about
    if row.level is not None and (entry.method != "nestednet" or entry.policy != row.level):
        return False
    if about["row"] is not None and entry.policy == about["policy"]:
        return _plain(about["row"]) in (_plain(row.name), _plain(re.sub(r"\s*\([A-Z].*\)$", "", row.name)))
    if row.method == "random":
        return entry.policy == "random" and entry.method in ("den", "random")
    if not entry.own or row.method not in _alike(entry.method):
        return False
    if row.rho is not None and entry.detail != f"rho = {row.rho:g}":  # another, of another unit, or one that moved
        return False
    return row.image_size is None or row.image_size in _printed_sizes(entry, table)


def _alike(method: str) -> tuple[str, ...]:
    """Methods that one printed "Baseline" stands for: the backbone trained by itself."""
    return ("dense", "independent") if method in ("dense", "independent") else (method,)


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
    if _without_size(study.backbone) != table.model:
        found.append(f"Ours is {study.backbone}, not {table.backbone}: read the order of the methods, not the figures.")
    unnamed = not any(table.tasks)  # Table 3's: parts of one data set, which the small scale does without
    if study.scale == "small" if unnamed else not all(set(names) & set(study.tasks) for names in table.tasks):
        found.append("Ours are other data sets than the paper's" + ("." if unnamed else "; the columns name them."))
    return found


def _our_cells(entry: Entry, study: Study, tasks: Sequence[str | None]) -> tuple[str, ...]:
    task = tasks[0] if len(tasks) == 1 else None  # a table of one task has that task's cost
    flops, full = entry.flops(task), full_flops(study, entry, task)
    values = entry.values(task, "flops_mean")
    ratio: Spread | None = spread([full / value for value in values]) if full and values and all(values) else None
    return (
        entry.label,
        *(told(entry.spread(name, "accuracy"), 2) for name in tasks),
        told(flops, 2, 1e-6),
        told(flops, 2, 0.5e-6),
        f"{told(ratio, 2)}x" if ratio else DASH,
        told(entry.spread(task, "parameters"), 3, 1e-6),
        told(entry.spread(task, "parameters_mean"), 3, 1e-6),
        str(len(entry.runs)),
    )


# Paired tests


def paired_tests(study: Study) -> Sheet | None:
    """Each DEN against the other methods at its FLOPs, and against its own levels shuffled over the images, on the same
    test images; None where there are no two with evaluations."""
    pairs: list[tuple[Entry, Entry]] = []
    for group in study.groups:
        if group.first.about["method"] == "den":
            entries = list(group.entries())
            pairs += [(den, other) for den in entries if den.own for other in _at_its_cost(den, study)]
            pairs += [(group.own, entry) for entry in entries if entry.policy == "shuffled"]
    rows = [row for a, b in pairs for task in study.tasks if (row := _paired(a, b, task)) is not None]
    if not rows:
        return None
    header = ("A", "B", "task", "FLOPs, B / A", "A - B, points", "95% interval", "p", "only A right", "only B right",
              "p (McNemar)", "seeds")  # fmt: skip
    notes = [
        "Difference of the mean accuracies over the same test images. Interval and p: bootstrap over images and, where "
        "there are several, seeds. McNemar: exact, of the first seed of each.",
        f"Of each method those whose mean FLOPs, selector included, are within {100 * NEAR:.0f}% of the DEN's; where "
        "none is, the nearest one, and then A - B is what the difference in FLOPs brings, too.",
    ]
    if any(b.policy == "shuffled" for _, b in pairs):
        notes.append("Against levels shuffled over images: what the DEN gains by fitting its paths to the images.")
    return Sheet("Paired tests", header, tuple(rows), left=(0, 1, 2), notes=tuple(notes))


def _at_its_cost(den: Entry, study: Study) -> Iterator[Entry]:
    """Of each other method the results at a DEN's FLOPs, or the nearest one."""
    for method in ("slim", "random", "dense", "independent", "blockdrop"):
        others = [group.own for group in study.groups if group.first.about["method"] == method]
        away = {id(other): abs(_times_flops(den, other, None) - 1) for other in others}
        near = [other for other in others if away[id(other)] <= NEAR]
        yield from near or sorted(others, key=lambda other: away[id(other)])[:1]


def _times_flops(a: Entry, b: Entry, task: str | None) -> float:
    """FLOPs of b as a multiple of a's, selectors included; infinite where not known."""
    ours, theirs = ((e.flops(task, selector=True) or e.flops(task)) for e in (a, b))
    return theirs.mean / ours.mean if ours and theirs and ours.mean else math.inf


def _paired(a: Entry, b: Entry, task: str) -> tuple[str, ...] | None:
    correct_a, correct_b = _correct(a, task), _correct(b, task)
    if correct_a is None or correct_b is None or not _same_images(a, b, task):
        return None
    difference = bootstrap_seeds(correct_a, correct_b, paired=a.runs is b.runs)
    exact = mcnemar(correct_a[0], correct_b[0])
    return (
        a.label,
        b.label,
        task,
        f"{_times_flops(a, b, task):.2f}",
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

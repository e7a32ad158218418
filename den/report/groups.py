"""Runs put together for comparison: those alike but for the seed are one method, those on the same tasks one study."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from den.results import Run
from den.statistics import Spread, spread

METHODS = {
    "den": "DEN",
    "dense": "dense network",
    "independent": "independent networks",
    "random": "random selector",
    "slim": "static slim network",
    "nestednet": "NestedNet",
    "packnet": "PackNet*",
    "blockdrop": "BlockDrop",
    "routing": "Routing Networks",
    "cross_stitch": "Cross-stitch",
    "pruned": "channel pruning",
}
SCENARIOS = {
    "m1": "M1, tasks of different image scales",
    "m2": "M2, many small tasks",
    "m3": "M3, hierarchical classification",
    "c1": "C1, network compression",
    "levels": "Ablation of A.2, number of levels",
    "initial": "Ablation of A.2, initial distribution",
}
# Settings in which runs of one method may differ and still be that method: whose, where and how it was run.
INCIDENTAL = {
    "about", "seed", "out", "root", "resume", "progress", "accelerator", "devices", "nodes", "command", "started",
    "threads",
}  # fmt: skip
UNITS = {"parameters": "parameters", "flops": "FLOPs", "latency": "measured time"}  # of cost: the share of what
BUDGET = "budget "  # begins the policy of a selector that is told one


def told(value: Spread | None, digits: int, scale: float = 1.0) -> str:
    """A number in a table: "97.10 ± 0.32"; of one seed its value, and a dash where it is not known."""
    if value is None:
        return "-"
    mean = f"{value.mean * scale:.{digits}f}"
    return mean if value.std is None else f"{mean} ± {value.std * scale:.{digits}f}"


@dataclass(frozen=True)
class Entry:
    """A method's result: runs that differ in their seed alone, under one policy.

    label: what it is called; unique in its study. detail: the part of it that a curve through several entries of a
    method varies, such as "rho = 1". own: whether the policy is what the method is about, not a probe of it.
    """

    label: str
    detail: str
    policy: str
    own: bool
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        """As in `about`."""
        return self.runs[0].about["method"]

    @property
    def tasks(self) -> list[str]:
        """Names, in the run's order."""
        return list(self.runs[0].summary)

    def values(self, task: str | None, key: str) -> list[float]:
        """A number of the summary for each run; task None: its mean over the tasks. Empty unless all runs know it."""
        wanted = self.tasks if task is None else [task]
        summaries = [[run.summary[name][self.policy] for name in wanted] for run in self.runs]
        if any(summary.get(key) is None for row in summaries for summary in row):
            return []
        return [statistics.fmean(summary[key] for summary in row) for row in summaries]

    def spread(self, task: str | None, key: str) -> Spread | None:
        """Over the runs; None where it is not known."""
        values = self.values(task, key)
        return spread(values) if values else None

    def flops(self, task: str | None, *, selector: bool = False) -> Spread | None:
        """FLOPs an image, 2 x multiply-adds; with the selector's, if asked for. None where not known."""
        values = self.values(task, "flops_mean")
        more = self.values(task, "selector_flops") if selector else [0.0] * len(values)
        return spread([a + b for a, b in zip(values, more, strict=True)]) if values and more else None


def cost_unit(run: Run) -> str:
    """What a run's costs are a share of, in training: a key of `UNITS`. A competitor's are of parameters."""
    return run.config.get("train", {}).get("cost_unit", "parameters")


def told_budget(run: Run) -> float | None:
    """The budget of a DEN that is told one, where none is given; None: it is told none."""
    selector = run.config.get("model", {}).get("selector")
    return selector.get("budget") if isinstance(selector, dict) else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone. label: without the policy; difference: from groups of that label."""

    runs: tuple[Run, ...]
    difference: str = ""

    @property
    def first(self) -> Run:
        """The run that pictures of one run show: that of the lowest seed."""
        return self.runs[0]

    @cached_property
    def detail(self) -> str:
        """What this method is usually varied in: rho of a DEN, its budget, or the cost it is to meet, with the unit; a
        slim network's share."""
        train = self.first.config.get("train", {})
        if self.first.about["method"] == "den":
            unit, budget, target = cost_unit(self.first), told_budget(self.first), train.get("target_cost")
            if budget is not None:
                return _of_budget(budget, unit)
            if target is not None:
                return f"cost = {target:g} of {UNITS[unit]}"
            if "rho" in train:  # the paper's S(z) is of parameters
                return f"rho = {train['rho']:g}" + (f" on {UNITS[unit]}" if unit != "parameters" else "")
        shares = [run.config.get("train", {}).get("share") for run in self.runs]
        known = [share for share in shares if share is not None]  # each seed's own, where it follows another run's
        return f"share {statistics.fmean(known):.2g}" if known else ""

    @property
    def label(self) -> str:
        """Such as "DEN (rho = 1)"."""
        return self._label(self.detail)

    def _label(self, detail: str) -> str:
        method = self.first.about["method"]
        inside = ", ".join(filter(None, (detail, self.difference)))
        return METHODS.get(method, method) + (f" ({inside})" if inside else "")

    def entries(self) -> Iterator[Entry]:
        """The method's own result, and after it what other policies of the same runs come to."""
        about = self.first.about
        yield Entry(self.label, self.detail, about["policy"], True, self.runs)
        # Of other methods, what was not trained for says nothing: a dense network at random levels.
        probes = {"den": None, "nestednet": None, "random": ["full"]}.get(about["method"], [])
        for policy in next(iter(self.first.summary.values())):
            if policy == about["policy"] or (probes is not None and policy not in probes):
                continue
            if all(policy in policies for run in self.runs for policies in run.summary.values()):
                own = about["method"] == "nestednet"  # each of its levels is a result
                if policy.startswith(BUDGET):  # and each budget
                    detail = _of_budget(float(policy.removeprefix(BUDGET)), cost_unit(self.first))
                    if detail != self.detail:
                        yield Entry(self._label(detail), detail, policy, True, self.runs)
                    continue
                yield Entry(f"{self.label}, {_of_policy(policy)}", self.detail, policy, own, self.runs)

    @property
    def own(self) -> Entry:
        """The method's own result."""
        return next(self.entries())


def _of_policy(policy: str) -> str:
    return {
        "random": "random levels",
        "full": "full path",
        "selector": "levels of the selector",
        "shuffled": "levels shuffled over images",
    }.get(policy, policy)


def _of_budget(budget: float, unit: str) -> str:
    return f"budget {budget:g} of {UNITS[unit]}"


@dataclass(frozen=True)
class Study:
    """Groups of one backbone on the same tasks, whose figures may be compared."""

    scenario: str | None
    scale: str | None
    backbone: str
    tasks: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def title(self) -> str:
        """Scenario, scale, backbone and tasks."""
        name = SCENARIOS.get(self.scenario or "", self.scenario or "")
        scale = f" ({self.scale} scale)" if self.scale else ""
        tasks = ", ".join(self.tasks) if len(self.tasks) <= 4 else f"{len(self.tasks)} tasks"
        return f"{name}{scale}: {self.backbone} on {tasks}" if name else f"{self.backbone} on {tasks}"

    @property
    def key(self) -> str:
        """For file names: letters, digits and underscores."""
        text = "_".join(filter(None, (self.scenario, self.scale, self.backbone, *self.tasks[:4])))
        return "".join(c if c.isascii() and c.isalnum() else "_" for c in text)

    @property
    def entries(self) -> list[Entry]:
        """Of all groups."""
        return [entry for group in self.groups for entry in group.entries()]


def studies(runs: Sequence[Run]) -> list[Study]:
    """Runs by scenario, scale, backbone and tasks, and in each by everything in their configuration but the seed.

    Folders seed0, seed1, ... beside each other are one method also where a setting follows from the seed, as a static
    network's share of FLOPs does that is to be that of a DEN.
    """
    by_study: dict[tuple, dict[str, list[Run]]] = {}
    for run in runs:
        where = (run.about["scenario"], run.about["scale"], backbone(run), tuple(run.summary))
        beside = re.fullmatch(r"seed\d+", run.path.name)
        method = str(run.path.absolute().parent) if beside else json.dumps(_settings(run), sort_keys=True)
        by_study.setdefault(where, {}).setdefault(method, []).append(run)
    found = []
    for (scenario, scale, name, tasks), alike in by_study.items():
        groups = [Group(tuple(sorted(members, key=lambda run: run.about["seed"]))) for members in alike.values()]
        order = {method: place for place, method in enumerate(METHODS)}
        groups.sort(key=lambda group: order.get(group.first.about["method"], len(order)))
        found.append(Study(scenario, scale, name, tasks, tuple(_told_apart(groups))))
    return found


def backbone(run: Run) -> str:
    """Name of the backbone, as `den.create_model` takes it; a competitor's network of its own keeps it under model."""
    model = run.config.get("model", {})
    return str(model.get("model") or model.get("name") or "")


def _settings(run: Run) -> dict[str, Any]:
    """What a run's method is, flat: its model, training and data, without what is incidental."""
    flat: dict[str, Any] = {key: run.about[key] for key in ("method", "policy", "row")}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key not in INCIDENTAL:
                    visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    visit("", {key: value for key, value in run.config.items() if key != "preprocessing"})
    return flat


def _told_apart(groups: Sequence[Group]) -> list[Group]:
    """Groups of one label get what they differ in."""
    result = []
    for group in groups:
        alike = [other for other in groups if other.label == group.label]
        result.append(Group(group.runs, _difference(group, alike)) if len(alike) > 1 else group)
    return result


def _difference(group: Group, alike: Sequence[Group]) -> str:
    settings = [_settings(other.first) for other in alike]
    own = _settings(group.first)
    keys = [key for key in own if len({json.dumps(other.get(key)) for other in settings}) > 1]
    told = [f"{key.split('.')[-1]} {_short(own[key])}" for key in keys[:3]]
    return ", ".join(told) or f"variant {alike.index(group) + 1}"


def _short(value: Any) -> str:
    return "-".join(f"{v:g}" for v in value) if isinstance(value, list) and value else str(value)

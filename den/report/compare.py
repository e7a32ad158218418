"""Pictures across runs: accuracy against what an image costs, ablations (Figure 5), and speed of training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from den.report.groups import BUDGET, METHODS, UNITS, Entry, Group, Study, cost_unit
from den.report.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    legend,
    level_colours,
    panel_grid,
    write,
)  # fmt: skip
from den.statistics import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = {  # method: mark, size, colour
    "den": ("*", 190, BLUE),
    "dense": ("s", 80, BLACK),
    "independent": ("s", 80, BLACK),
    "random": ("X", 80, VERMILION),
    "slim": ("D", 55, ORANGE),
    "nestednet": ("P", 80, GREEN),
    "packnet": ("v", 75, SKY),
    "blockdrop": ("^", 75, PURPLE),
    "routing": ("<", 75, GREY),
    "cross_stitch": (">", 75, GREY),
    "pruned": ("d", 75, GREY),
}
OTHER = ("o", 60, GREY)
TOLD = ("p", 120, SKY)  # a DEN told its budget
PROBES = {"random": ("X", "DEN, random levels"), "full": ("^", "DEN, full path")}
MOST_PANELS = 4  # tasks; of more, their mean is drawn alone
RANGE = 25  # points of accuracy below the best at which an entry is still drawn
Price = Callable[[Entry, str | None], Spread | None]


def frontier(
    study: Study, path: str | os.PathLike[str], *, price: Price | None = None, label: str = "", conditions: str = ""
) -> list[Path]:
    """A panel a task and one of their mean: accuracy of each method over what an image costs; bars are deviations.

    price: of an entry on a task (None: the mean of the tasks); None: million FLOPs, the selector's included. An entry
        without a price is left out.
    label: of the prices.

    Returns the files written; none where nothing has a price.
    """
    price = price or _mflops
    label = label or "million FLOPs an image, selector included"
    entries = [e for e in study.entries if (e.own or (e.method == "den" and e.policy in PROBES)) and price(e, None)]
    if not entries:
        return []
    tasks: list[str | None] = [*study.tasks] if len(study.tasks) <= MOST_PANELS else []
    if len(study.tasks) > 1:
        tasks.append(None)
    figure, axes = panel_grid(len(tasks), width=5.0, height=4.0)
    for axis, task in zip(axes, tasks, strict=True):
        _frontier_panel(axis, entries, task, price)
        axis.set_title(task if task is not None else f"mean of {len(study.tasks)} tasks")
        axis.set_xlabel(label)
        axis.set_ylabel("accuracy on test images, %")
    legend(figure, axes)
    return write(figure, path, "Accuracy against cost", conditions)


def _mflops(entry: Entry, task: str | None) -> Spread | None:
    """The selector's included, where they are known."""
    found = entry.flops(task, selector=True) or entry.flops(task)
    return None if found is None else Spread(found.seeds, found.mean / 1e6, found.std and found.std / 1e6)


def _frontier_panel(axis: Axes, entries: Sequence[Entry], task: str | None, price: Price) -> None:
    points = [(entry, price(entry, task), entry.spread(task, "accuracy")) for entry in entries]
    known = [(entry, x, y) for entry, x, y in points if x is not None and y is not None]
    best = max(y.mean for _, _, y in known)
    floor = best - RANGE
    series: dict[str, list[tuple[Entry, Spread, Spread]]] = {}
    for entry, x, y in known:
        if y.mean >= floor:
            series.setdefault(_series(entry), []).append((entry, x, y))
    for name, members in series.items():
        _draw_series(axis, name, sorted(members, key=lambda member: member[1].mean))
    axis.margins(0.15)
    axis.set_xlim(left=0)
    low, high = axis.get_ylim()
    hidden = [f"{entry.label}: {y.mean:.1f}%" for entry, _, y in known if y.mean < floor]
    if hidden:
        text = "below the picture:\n" + "\n".join(hidden)
        axis.text(0.98, 0.03, text, transform=axis.transAxes, ha="right", va="bottom", fontsize=8, color=GREY)
        low -= 0.07 * (1 + len(hidden)) * (high - low)  # room for the text
    axis.set_ylim(low, min(high, 101))
    axis.grid(alpha=0.25)


def _series(entry: Entry) -> str:
    """What entries have in common that one curve joins."""
    if not entry.own:
        return PROBES[entry.policy][1]
    name = METHODS.get(entry.method, entry.method)
    if entry.detail.startswith(BUDGET):
        return f"{name}, one told its budget"
    rest = entry.label.removeprefix(name).strip(" ()").removeprefix(entry.detail).strip(" ,()")
    return f"{name} ({rest})" if rest and entry.method != "nestednet" else name


def _draw_series(axis: Axes, name: str, members: Sequence[tuple[Entry, Spread, Spread]]) -> None:
    first = members[0][0]
    told = first.own and first.detail.startswith(BUDGET)
    mark, size, colour = TOLD if told else MARKS.get(first.method, OTHER)
    face = "none" if first.method in ("dense", "independent") else colour  # hollow: others often lie on top of it
    if not first.own:
        mark, size, face = PROBES[first.policy][0], 45, "none"
    xs, ys = [x.mean for _, x, _ in members], [y.mean for _, _, y in members]
    axis.errorbar(
        xs, ys, [y.std or 0 for _, _, y in members], [x.std or 0 for _, x, _ in members],
        fmt="none", ecolor=colour, elinewidth=1, alpha=0.6, zorder=2,
    )  # fmt: skip
    if len(members) > 1 and first.own:
        axis.plot(xs, ys, "-", color=colour, lw=1, alpha=0.6, zorder=2)
        above = first.method == "den" and not told  # others may be at a DEN's place
        nearer, further = (10, 20) if above else (-17, -27)
        for place, (entry, x, y) in enumerate(members):  # in turn: neighbours may be near
            where, text = (0, further if place % 2 else nearer), entry.detail or entry.policy
            axis.annotate(
                text, (x.mean, y.mean), where, textcoords="offset points", ha="center", fontsize=8, color=colour
            )
    axis.scatter(xs, ys, s=size, marker=mark, facecolors=face, edgecolors=colour, label=name, zorder=3)


def ablations(study: Study, path: str | os.PathLike[str], *, conditions: str = "") -> list[Path]:
    """Figure 5: DENs of several numbers of levels, and of several initial distributions: accuracy over FLOPs.

    Returns the files written; none where the study has a DEN of one kind alone.
    """
    groups = [group for group in study.groups if group.first.about["method"] == "den"]
    kinds: list[tuple[str, Callable[[Group], str]]] = [
        ("(a) number of levels", lambda group: f"{len(group.first.config['model'].get('ratios', []))} levels"),
        ("(b) initial distribution", initial_distribution),
    ]
    drawn = [(title, name) for title, name in kinds if len({name(group) for group in groups}) > 1]
    if not drawn:
        return []
    figure, axes = panel_grid(len(drawn), width=5.0, height=4.2)
    marks = "o^sDvPX"
    for axis, (title, name) in zip(axes, drawn, strict=True):
        names = sorted({name(group) for group in groups})
        for place, (value, colour) in enumerate(zip(names, level_colours(len(names) + 1), strict=False)):
            own = [group.own for group in groups if name(group) == value]
            priced = [(_mflops(entry, None), entry.spread(None, "accuracy")) for entry in own]
            points = sorted((x.mean, y.mean, y.std or 0) for x, y in priced if x is not None and y is not None)
            xs, ys, bars = zip(*points, strict=True)
            axis.errorbar(xs, ys, bars, fmt=f"-{marks[place % len(marks)]}", color=colour, label=value)
        axis.set_title(title)
        axis.set_xlabel("million FLOPs an image, selector included")
        axis.set_ylabel("accuracy on test images, %")
        axis.margins(0.15)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9, frameon=False)
    return write(figure, path, "Ablations (Figure 5)", conditions)


def initial_distribution(group: Group) -> str:
    """The model distribution of the first stage, in the words of A.2."""
    train = group.first.config.get("train", {})
    if train.get("initial") == "selector":
        return "untrained selector"
    tau = train.get("tau", 0)
    return "uniform" if tau == 0 else f"equation 8, tau = {tau:g}"


def training_speed(groups: Sequence[Group], path: str | os.PathLike[str], *, conditions: str = "") -> list[Path]:
    """Images a second over the mean cost of the paths: a point an epoch of the estimator, first seed of each group.

    Costs are as they were logged, in the run's own unit.

    Returns the files written; none where no run logged both.
    """
    logged = [(group, [line for line in group.first.metrics if _speed_is_known(line)]) for group in groups]
    series = [(group, lines) for group, lines in logged if lines]
    if not series:
        return []
    figure, axes = panel_grid(1, width=6.4, height=4.4)
    colours = level_colours(len(series) + 1)
    for place, (group, lines) in enumerate(series):
        mark, size, _ = MARKS.get(group.first.about["method"], OTHER)
        xs, ys = [line["cost"] for line in lines], [line["images_per_second"] for line in lines]
        axes[0].scatter(xs, ys, s=size / 2, marker=mark, color=colours[place], label=group.label, alpha=0.8)
    units = list(dict.fromkeys(UNITS[cost_unit(group.first)] for group, _ in series))
    axes[0].set_xlabel(f"mean cost of the paths in an epoch: share of the blocks' {' or '.join(units)}")
    axes[0].set_ylabel("training images a second")
    axes[0].set_xlim(0, 1.05)
    axes[0].set_ylim(0, 1.08 * axes[0].get_ylim()[1])
    axes[0].grid(alpha=0.25)
    legend(figure, axes)
    return write(figure, path, "Speed of training against the cost of the paths", conditions)


def _speed_is_known(line: Mapping[str, Any]) -> bool:
    return "images_per_second" in line and "cost" in line and line["phase"] != "selector"

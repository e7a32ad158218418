"""Training curves: what metrics.jsonl says, epoch by epoch, of runs that differ in their seed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from den.report.groups import UNITS, Group, cost_unit
from den.report.style import (
    GREY,
    level_colours,
    panel_grid,
    patch,
    place_legend,
    share_of_channels,
    write,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADE = "#DCE9F5"  # behind the epochs of the selector
CURVES = (  # phase (None: every), key, title
    ("estimator", "loss", "loss of the estimator"),
    ("estimator", "accuracy", "accuracy on training images, %"),
    ("selector", "reward", "reward: loss + S(z), minimised"),
    ("selector", "entropy", "entropy of the selector, nats a block"),
    (None, "cost", "mean cost of the paths: share of {unit}"),
)


def training_curves(group: Group, path: str | os.PathLike[str], *, conditions: str = "") -> list[Path]:
    """A panel each for loss, accuracy, reward, entropy, cost and level usage, over the epochs in their order; a line a
    seed, and the selector's epochs shaded.

    Level usage, `level_0`, `level_1`, ... of metrics.jsonl, is the first seed's. Panels without figures are left out.

    Returns the files written; none where there are no metrics.
    """
    runs = [run.metrics for run in group.runs if run.metrics]
    if not runs:
        return []
    wanted = [
        curve for curve in CURVES if any(curve[1] in line and curve[0] in (None, line["phase"]) for line in runs[0])
    ]
    if not any(line["phase"] == "estimator" for line in runs[0]):  # a method with phases of its own
        wanted = [(None, key, title) for _, key, title in CURVES if any(key in line for line in runs[0])]
    levels = _level_lines(runs[0])
    figure, axes = panel_grid(len(wanted) + bool(levels), width=4.8, height=2.7)
    for axis, (phase, key, title) in zip(axes, wanted, strict=False):
        for place, lines in enumerate(runs):
            points = [
                (x + 1, line[key]) for x, line in enumerate(lines) if key in line and phase in (None, line["phase"])
            ]
            style = "o-" if len(points) < 40 else "-"
            xs, ys = zip(*points, strict=True)
            axis.plot(xs, ys, style, ms=3, lw=1, color=level_colours(len(runs) + 1)[place])
        axis.set_title(title.format(unit=UNITS[cost_unit(group.first)]))
    _entropy_of_chance(group, axes, wanted)
    if levels:
        _usage_over_epochs(axes[-1], levels)
        axes[-1].set_title("levels taken, %" + ("" if len(runs) == 1 else " (first seed)"))
    for axis in axes:
        _shade(axis, runs[0])
        axis.set_xlim(0.5, max(map(len, runs)) + 0.5)
        axis.set_xlabel("epoch")
    _legend(figure, group, len(runs), levels)
    return write(figure, path, f"Training: {group.label}", conditions)


def _level_lines(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[float]]]:
    """Epoch and share of each level, in percent, where they were logged."""
    found = []
    for x, line in enumerate(lines):
        shares: list[float] = []
        while f"level_{len(shares)}" in line:
            shares.append(100 * line[f"level_{len(shares)}"])
        if shares:
            found.append((x + 1, shares))
    return found


def _usage_over_epochs(axis: Axes, levels: Sequence[tuple[int, list[float]]]) -> None:
    xs = [x for x, _ in levels]
    base = [0.0] * len(xs)
    count = len(levels[0][1])
    for level, colour in enumerate(level_colours(count)):
        shares = [values[level] for _, values in levels]
        axis.bar(xs, shares, 0.9, base, color=colour)
        base = [low + share for low, share in zip(base, shares, strict=True)]
    axis.set_ylim(0, 100)


def _entropy_of_chance(group: Group, axes: Sequence[Axes], wanted: Sequence[tuple]) -> None:
    """A line where every level of a block is as likely as any other."""
    usage = next(iter(group.first.own.values())).get("level_usage")
    if not usage or len(usage[0]) < 2:
        return
    for axis, (_, key, _) in zip(axes, wanted, strict=False):
        if key == "entropy":
            chance = math.log(len(usage[0]))
            axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
            near = axis.get_ylim()[1] > chance / 3
            if near:
                axis.axhline(chance, color=GREY, lw=1, ls="--")
                axis.set_ylim(0, 1.2 * max(chance, axis.get_ylim()[1] / 1.2))
            place = (0.98, chance) if near else (0.98, 0.97 * axis.get_ylim()[1])
            axis.text(
                *place, f"every level alike: {chance:.2f}", transform=axis.get_yaxis_transform(), ha="right",
                va="bottom" if near else "top", fontsize=8, color=GREY,
            )  # fmt: skip


def _shade(axis: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    for x, line in enumerate(lines):
        if line["phase"] == "selector":
            axis.axvspan(x + 0.5, x + 1.5, color=SHADE, lw=0, zorder=0)


def _legend(figure: Any, group: Group, count: int, levels: Sequence[tuple[int, list[float]]]) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    seeds = [run.about["seed"] for run in group.runs if run.metrics]
    if count > 1:
        colours = level_colours(count + 1)
        handles += [Line2D([], [], color=colours[i], label=f"seed {seed}") for i, seed in enumerate(seeds)]
    else:
        handles.append(Line2D([], [], color=level_colours(2)[0], label=f"seed {seeds[0]}"))
    if any(line["phase"] == "selector" for line in group.first.metrics):
        handles.append(patch(SHADE, "selector learns"))
    if levels:
        ratios = group.first.config["model"].get("ratios") or []
        names = [share_of_channels(r) for r in ratios]
        for level, colour in enumerate(level_colours(len(levels[0][1]))):
            name = f": {names[level]}" if level < len(names) else ""
            handles.append(patch(colour, f"level {level}{name}"))
    place_legend(figure, handles, [handle.get_label() for handle in handles])

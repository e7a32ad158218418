"""Pictures of one run: its policies, how often each level is taken, its time, and the paths of some images."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from den.report.style import (
    BLACK,
    BLUE,
    GREY,
    NARROWEST,
    PURPLE,
    UNUSED,
    VERMILION,
    faster,
    legend,
    level_colours,
    new_figure,
    panels,
    patch,
    place_legend,
    share_of_channels,
    ticks,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Name in a summary: label, mark, size, colour. What is not here is a fixed level.
POLICIES = {
    "dense": ("dense network, trained alike", "s", 130, BLACK),
    "full": ("DEN, every block at its top level", "^", 70, PURPLE),
    "random": ("DEN, random levels", "X", 80, VERMILION),
    "shuffled": ("DEN, levels shuffled over images", "P", 80, GREY),
    "selector": ("DEN, levels chosen by the selector", "*", 220, BLUE),
}
RANGE = 30  # points of accuracy below the best at which a fixed path is still drawn
MARGIN = 4  # points of accuracy left below the lowest policy


def accuracy_against_flops(
    summary: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    conditions: str = "",
    selector_flops: Mapping[str, float] | None = None,
) -> list[Path]:
    """A panel a task: accuracy of each policy over the FLOPs that it takes.

    summary: task -> policy -> `accuracy` in percent and `flops_mean` an image. Policies: dense and those of `evaluate`;
        any other is a fixed path, drawn as a line under its own name.
    conditions: what the reader must know, in the title: data, model, seeds.
    selector_flops: of each task's selector; given, they are added to the points of the selector and of its levels
        shuffled.

    Returns the files written.
    """
    figure, axes = panels(len(summary), width=5.2, height=4.2)
    for axis, (task, results) in zip(axes, summary.items(), strict=True):
        named = [result["accuracy"] for policy, result in results.items() if policy in POLICIES]
        best = max(result["accuracy"] for result in results.values())
        floor = min([best - RANGE, *(accuracy - MARGIN for accuracy in named)])
        _fixed_paths(axis, {name: result for name, result in results.items() if name not in POLICIES}, floor)
        for policy, (label, mark, size, colour) in POLICIES.items():
            if policy in results:
                extra = (selector_flops or {}).get(task, 0) if policy in ("selector", "shuffled") else 0
                x, y = (results[policy]["flops_mean"] + extra) / 1e6, results[policy]["accuracy"]
                face = "none" if policy == "dense" else colour  # hollow: the full path often lies on top of it
                axis.scatter(x, y, s=size, marker=mark, label=label, zorder=3, facecolors=face, edgecolors=colour)
        axis.set_title(task)
        axis.set_xlabel("million FLOPs an image" + (", selector included" if selector_flops else ""))
        axis.set_ylabel("accuracy on test images, %")
        axis.margins(0.12)
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, floor), min(high, 101))
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    legend(figure, axes)
    return write(figure, path, "Accuracy against FLOPs", conditions)


def _fixed_paths(axis: Axes, results: Mapping[str, Mapping[str, Any]], floor: float) -> None:
    """A line through the fixed paths; those below the picture are told in words at its lower edge."""
    points = sorted((r["flops_mean"] / 1e6, r["accuracy"], name) for name, r in results.items())
    shown = [point for point in points if point[1] >= floor]
    if shown:
        xs, ys = [x for x, _, _ in shown], [y for _, y, _ in shown]
        axis.plot(xs, ys, "o-", color=GREY, ms=5, lw=1, label="DEN, one path for every image")
    for x, y, name in shown:
        axis.annotate(name, (x, y), (5, -12), textcoords="offset points", fontsize=8, color=GREY)
    hidden = [f"{name}: {y:.1f}%" for _, y, name in points if y < floor]
    if hidden:
        text = "below the picture: " + ", ".join(hidden)
        axis.text(0.98, 0.03, text, transform=axis.transAxes, ha="right", fontsize=8, color=GREY)


def level_usage(
    usage: Mapping[str, Sequence[Sequence[float]]],
    ratios: Sequence[float],
    path: str | os.PathLike[str],
    *,
    conditions: str = "",
) -> list[Path]:
    """A panel a task: for each block, the share of images that took each level, stacked.

    usage: task -> [blocks][levels] shares, `level_usage` of a summary.
    ratios: share of a block's channels at each level.
    """
    figure, axes = panels(len(usage), width=5.2, height=3.8, sharey=True)
    colours = level_colours(len(ratios))
    for axis, (task, blocks) in zip(axes, usage.items(), strict=True):
        base = [0.0] * len(blocks)
        for level, ratio in enumerate(ratios):
            shares = [100 * block[level] if level < len(block) else 0.0 for block in blocks]
            label = f"level {level}: {share_of_channels(ratio)}"
            places = range(1, len(blocks) + 1)
            axis.bar(places, shares, 0.85, base, color=colours[level], edgecolor="white", lw=0.5, label=label)
            for place, bottom, share in zip(places, base, shares, strict=True):
                if share >= 12 and len(blocks) <= 20:
                    ink = "white" if level < len(ratios) / 2 else "black"
                    middle = bottom + share / 2
                    axis.text(place, middle, f"{share:.0f}", ha="center", va="center", fontsize=7, color=ink)
            base = [low + share for low, share in zip(base, shares, strict=True)]
        axis.set_title(task)
        axis.set_xlabel("block, from input to output")
        axis.set_xticks(ticks(len(blocks)))
        axis.set_ylim(0, 100)
    axes[0].set_ylabel("share of test images, %")
    legend(figure, axes)
    return write(figure, path, "How often each level is taken", conditions)


def latency_bars(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, conditions: str = ""
) -> list[Path]:
    """A panel a batch size: milliseconds an image, dense beside frozen DEN, for each task.

    rows: as for `table`.
    """
    batches = list(rows[0]["ms"])
    figure, axes = panels(len(batches), width=1.8 + 1.7 * len(rows), height=3.9)
    for axis, batch in zip(axes, batches, strict=True):
        pairs = [row["ms"][batch] for row in rows]
        top = max(max(pair) for pair in pairs)
        for shift, index, label, colour, hatch in (
            (-0.2, 0, "dense network", GREY, ""),
            (0.2, 1, "frozen DEN, selector included", BLUE, "//"),
        ):
            places = [place + shift for place in range(len(rows))]
            heights = [pair[index] for pair in pairs]
            axis.bar(places, heights, 0.38, color=colour, hatch=hatch, edgecolor="white", label=label)
            for place, height, pair in zip(places, heights, pairs, strict=True):
                text = f"{height:.3g}" if index == 0 else f"{height:.3g}\n{faster(pair[0] / pair[1])}"
                axis.text(place, height + 0.02 * top, text, ha="center", va="bottom", fontsize=8.5)
        axis.set_xticks(range(len(rows)), [row["task"] for row in rows])
        axis.set_title(f"batch {batch}")
        axis.set_ylim(0, 1.25 * top)
        axis.set_xlim(-0.6, len(rows) - 0.4)
    axes[0].set_ylabel("milliseconds an image")
    legend(figure, axes)
    return write(figure, path, "Time an image: dense against frozen DEN", conditions)


def sample_paths(
    samples: Sequence[Mapping[str, Any]],
    ratios: Sequence[float],
    path: str | os.PathLike[str],
    *,
    conditions: str = "",
    columns: int = 6,
) -> list[Path]:
    """Images with the sub-network that each took: a strip of bars below each, one a block, as high as its width.

    samples: each with `image` (array [H, W] or [H, W, 3], values 0 to 1 or 0 to 255), `path` (a level for each block),
        `prediction`, `label` and `cost`; and `task`, if there are several.
    """
    import numpy as np

    columns = min(columns, len(samples))
    lines = -(-len(samples) // columns)
    figure = new_figure(max(NARROWEST, 1.75 * columns), 2.85 * lines + 1.0)
    grid = figure.add_gridspec(3 * lines, columns, height_ratios=[3, 1, 0.15] * lines)
    colours = [
        UNUSED if ratio == 0 else colour for ratio, colour in zip(ratios, level_colours(len(ratios)), strict=True)
    ]
    for number, sample in enumerate(samples):
        line, column = divmod(number, columns)
        image = np.asarray(sample["image"])
        picture = figure.add_subplot(grid[3 * line, column])
        brightest = 255 if image.max() > 1 else 1
        picture.imshow(image, cmap="gray", interpolation="nearest", vmin=0, vmax=brightest)
        picture.set_axis_off()
        right = sample["prediction"] == sample["label"]
        verdict = f"{sample['prediction']}" if right else f"{sample['prediction']} (truth: {sample['label']})"
        caption = textwrap.fill(f"{sample['task']}: {verdict}" if "task" in sample else verdict, 26)
        ink = BLACK if right else VERMILION
        picture.set_title(f"{caption}\ncost {sample['cost']:.2f}", fontsize=8.5, color=ink)
        strip = figure.add_subplot(grid[3 * line + 1, column])
        levels = sample["path"]
        for block, level in enumerate(levels):
            strip.bar(block, 1, 0.85, color=UNUSED)
            strip.bar(block, ratios[level], 0.85, color=colours[level])
        strip.set_xlim(-0.6, len(levels) - 0.4)
        strip.set_ylim(0, 1)
        strip.set_axis_off()
    handles = [patch(colours[level], f"level {level}: {share_of_channels(r)}") for level, r in enumerate(ratios)]
    place_legend(figure, handles, [handle.get_label() for handle in handles])
    subtitle = (
        "a bar a block, from input to output; its height: the share of the block's channels that ran\n"
        "cost: the mean share of the blocks' parameters"
    )
    return write(figure, path, "The sub-network that each image took", "\n".join(filter(None, (subtitle, conditions))))

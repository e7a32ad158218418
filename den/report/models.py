"""Which model each image gets: Figures 3, 6 and 7 of the paper.

A model is a path, a level for each block. N images, B blocks, L levels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from den.metrics import Evaluation
from den.report.style import (
    BLACK,
    BLUE,
    NARROWEST,
    UNUSED,
    VERMILION,
    level_colours,
    new_figure,
    patch,
    place_legend,
    share_of_channels,
    write,
)  # fmt: skip

CELL = 1.15  # inches that an image takes


@dataclass(frozen=True)
class Shown:
    """An image of a figure, with what is written above it.

    pixels: an array [H, W] or [H, W, 3]. right: whether it was classified right; None: not told.
    """

    pixels: Any
    caption: str
    right: bool | None = None


# What is shown


def probabilities(evaluation: Evaluation) -> Tensor:
    """C(x) of equation 3 of every image, [N, B, L]. Raises ValueError where no selector chose."""
    if evaluation.probs is None:
        raise ValueError("the evaluation has no level probabilities; only the policy 'selector' has them")
    return evaluation.probs


def nearest(
    probs_NBL: Tensor, query_BL: Tensor, count: int, exclude: int | None = None
) -> tuple[list[int], list[float]]:
    """The images whose model distributions are nearest to a query's by l2 distance (section 4.5), the nearest first.

    exclude: an image that may not be among them, the query itself. Returns their numbers and distances.
    """
    distance_N = (probs_NBL - query_BL).flatten(1).norm(dim=1)
    if exclude is not None:
        distance_N[exclude] = float("inf")
    values, indices = distance_N.sort(stable=True)
    count = min(count, len(values) - (exclude is not None))
    return indices[:count].tolist(), values[:count].tolist()


def typical(evaluation: Evaluation, count: int = 1) -> list[int]:
    """Images as queries: of median cost, or evenly from the cheapest to the dearest; of those classified right."""
    order = evaluation.cost.argsort(stable=True)
    right = order[evaluation.correct[order]]
    order = right if len(right) >= count else order
    places = [(2 * place + 1) * len(order) // (2 * count) for place in range(count)]
    return order[places].tolist()


def most_selected(level_NB: Tensor, count: int) -> list[tuple[list[int], list[int]]]:
    """The models that most images take, the most frequent first: path [B], and the numbers of its images."""
    paths, inverse, counts = level_NB.unique(dim=0, return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:count]
    return [(paths[i].tolist(), (inverse == i).nonzero().flatten().tolist()) for i in order.tolist()]


# Pictures


def similar_models(
    rows: Sequence[tuple[Shown, Mapping[str, Sequence[Shown]]]], path: str | os.PathLike[str], *, conditions: str = ""
) -> list[Path]:
    """Figure 3: a row a query, which stands first; then the images of each task of the nearest model distribution."""
    tasks = list(rows[0][1])
    counts = [max(len(row[task]) for _, row in rows) for task in tasks]
    gap, line_height = 0.3, CELL + 0.5
    starts = [CELL + gap + sum(counts[:i]) * CELL + i * gap for i in range(len(tasks))]
    figure, axis = _board(starts[-1] + counts[-1] * CELL, 0.25 + line_height * len(rows), below=0.1)
    axis.text(0, 0.12, "query", fontsize=9.5, color=BLUE, va="center")
    for task, start in zip(tasks, starts, strict=True):
        axis.text(start, 0.12, f"nearest in {task}", fontsize=9.5, va="center")
    for line, (query, found) in enumerate(rows):
        y = 0.25 + line * line_height
        _image(axis, query, 0, y, frame=BLUE)
        for task, start in zip(tasks, starts, strict=True):
            for place, shown in enumerate(found[task]):
                _image(axis, shown, start + place * CELL, y)
    text = "under an image's class: the l2 distance of its model distribution from the query's"
    title = "Images with similar model distributions (Figure 3)"
    return write(figure, path, title, "\n".join(filter(None, (text, conditions))))


def selected_models(
    evaluations: Mapping[str, Evaluation],
    ratios: Sequence[float],
    path: str | os.PathLike[str],
    *,
    conditions: str = "",
) -> list[Path]:
    """Figure 6, a row a task: (a) how many images take each model, (b) the mean probability of each level of a block.

    evaluations: of the selector, with level probabilities.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    blocks = next(iter(evaluations.values())).level.shape[1]
    figure = new_figure(5.0 + max(4.2, 0.42 * blocks + 1.6), 2.9 * len(evaluations) + 0.6)
    grid = figure.add_gridspec(len(evaluations), 2, width_ratios=[4.4, max(4.2, 0.42 * blocks + 1.6)])
    for line, (task, evaluation) in enumerate(evaluations.items()):
        counts = evaluation.level.unique(dim=0, return_counts=True)[1].sort(descending=True).values.tolist()
        left = figure.add_subplot(grid[line, 0])
        left.bar(range(1, len(counts) + 1), counts, 1.0 if len(counts) > 60 else 0.85, color=BLUE)
        left.spines[["top", "right"]].set_visible(False)
        left.set_xlabel("model, the most frequent first")
        left.set_ylabel("test images")
        models = f"{len(counts)} model{'s' if len(counts) > 1 else ''}"
        share = f"the first takes {100 * counts[0] / sum(counts):.0f}%"
        left.set_title(f"(a) {task}: {models} for {sum(counts)} images; {share}", fontsize=10)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        mean_LB = probabilities(evaluation).mean(0).t().numpy()
        right = figure.add_subplot(grid[line, 1])
        right.imshow(mean_LB, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis")
        for level, row in enumerate(mean_LB.tolist()):
            for block, value in enumerate(row):
                ink = "white" if value < 0.6 else "black"
                right.text(block, level, f"{value:.2f}".lstrip("0") if value < 0.995 else "1", ha="center", va="center",
                           fontsize=7, color=ink)  # fmt: skip
        right.set_xticks(range(blocks), [str(b + 1) for b in range(blocks)], fontsize=8)
        right.set_yticks(range(len(ratios)), [f"{level}: {_short(ratio)}" for level, ratio in enumerate(ratios)])
        right.set_xlabel("block, from input to output")
        right.set_title(f"(b) {task}: mean probability of each level", fontsize=10)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), "viridis")
    figure.colorbar(scale, ax=figure.axes[1::2], shrink=0.8, pad=0.02)
    return write(figure, path, "Selected models on the test images (Figure 6)", conditions)


def images_by_model(
    rows: Sequence[tuple[str, Sequence[int], Sequence[Shown]]],
    ratios: Sequence[float],
    path: str | os.PathLike[str],
    *,
    conditions: str = "",
) -> list[Path]:
    """Figure 7: a row a model: its name, its levels as bars (as high as the block's width), images that selected it."""
    columns = max(len(images) for _, _, images in rows)
    strip = max(2.3, 0.16 * len(rows[0][1]))
    head, line_height = 0.25, CELL + 0.55
    figure, axis = _board(strip + 0.3 + columns * CELL, line_height * len(rows), below=0.5)
    colours = level_colours(len(ratios))
    for line, (name, levels, images) in enumerate(rows):
        y = line * line_height
        axis.text(0, y + head / 2, name, fontsize=9.5, va="center")
        width = strip / len(levels)
        for block, level in enumerate(levels):
            _bar(axis, block * width, y + head, 0.85 * width, 1, UNUSED)
            _bar(axis, block * width, y + head, 0.85 * width, ratios[level], colours[level])
        for place, shown in enumerate(images):
            _image(axis, shown, strip + 0.3 + place * CELL, y + head)
    named = [UNUSED if ratio == 0 else colour for ratio, colour in zip(ratios, colours, strict=True)]
    handles = [patch(named[level], f"level {level}: {share_of_channels(r)}") for level, r in enumerate(ratios)]
    place_legend(figure, handles, [handle.get_label() for handle in handles])
    text = (
        "a bar a block, from input to output; its height: the share of the block's channels\n"
        "cost: the mean share of the blocks' parameters"
    )
    title = "The most selected models and their images (Figure 7)"
    return write(figure, path, title, "\n".join(filter(None, (text, conditions))))


def _board(width: float, height: float, below: float) -> tuple[Any, Any]:
    """One pair of axes in inches, y downwards, to place images on: many axes would take many seconds."""
    figure = new_figure(max(NARROWEST, width), height + 0.75 + below)
    axis = figure.subplots()
    axis.set_xlim(0, max(NARROWEST, width))
    axis.set_ylim(height, 0)
    axis.set_aspect("equal", anchor="NW")
    axis.set_axis_off()
    return figure, axis


def _image(axis: Any, shown: Shown, x: float, y: float, frame: str | None = None) -> None:
    from matplotlib.patches import Rectangle

    side = 0.94 * CELL
    limits = axis.get_xlim(), axis.get_ylim()
    brightest = 255 if shown.pixels.max() > 1 else 1
    extent = (x, x + side, y + side, y)
    axis.imshow(shown.pixels, cmap="gray", interpolation="nearest", vmin=0, vmax=brightest, extent=extent)
    axis.set_xlim(limits[0])
    axis.set_ylim(limits[1])
    if frame:
        axis.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=frame, linewidth=3))
    ink = VERMILION if shown.right is False else BLACK
    axis.text(x + side / 2, y + side + 0.04, shown.caption, ha="center", va="top", fontsize=8, color=ink)


def _bar(axis: Any, x: float, y: float, width: float, share: float, colour: Any) -> None:
    """A bar that stands on the lower edge of a row of images."""
    from matplotlib.patches import Rectangle

    height = 0.94 * CELL
    axis.add_patch(Rectangle((x, y + (1 - share) * height), width, share * height, color=colour, linewidth=0))


def _short(ratio: float) -> str:
    return "out" if ratio == 0 else "all" if ratio == 1 else f"{100 * ratio:.3g}%"

"""Pictures and tables of a finished run, from plain data: what summary.json holds, and small arrays.

Pictures need matplotlib, which is imported when one is drawn; no display is used. Each is written as PNG and SVG.
Colours are Okabe and Ito's, and viridis, told apart by the colour-blind; marks and labels tell the same without colour.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
BLACK, GREY, UNUSED = "#000000", "#7F7F7F", "#E4E4E4"
# Name in a summary: label, mark, size, colour. What is not here is a fixed level.
POLICIES = {
    "dense": ("dense network, trained alike", "s", 130, BLACK),
    "full": ("DEN, every block at its top level", "^", 70, PURPLE),
    "random": ("DEN, random levels", "X", 80, VERMILION),
    "selector": ("DEN, levels chosen by the selector", "*", 220, BLUE),
}
NARROWEST = 5.8  # inches
RANGE = 30  # points of accuracy below the best at which a fixed path is still drawn
MARGIN = 4  # points of accuracy left below the lowest policy
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "svg.hashsalt": "den",  # the same picture is the same file
    "svg.fonttype": "none",
}


# Tables


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False, left: Sequence[int] = (0,)
) -> str:
    """A table in plain text, or in Markdown.

    left: columns aligned to the left; the others, numbers, to the right.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    if markdown:
        widths = [max(3, width) for width in widths]

    def line(row: Sequence[str]) -> list[str]:
        return [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]

    if markdown:
        rule = [":" + "-" * (w - 1) if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (line(header), rule, *map(line, rows)))
    texts = ["  ".join(cells).rstrip() for cells in (line(header), ["-" * w for w in widths], *map(line, rows))]
    return "\n".join(texts)


def table(rows: Sequence[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """The table of a run: a row a task.

    rows: each with `task`; `dense_accuracy`, `random_accuracy`, `accuracy` in percent; `cost`, the mean share of the
        blocks' parameters run; `dense_flops`, `flops` an image; `ms`, {batch: (dense, frozen DEN with its selector)}
        milliseconds an image.
    """
    batches = list(rows[0]["ms"]) if rows else []
    header = ["task", "dense %", "random %", "DEN %", "cost", "dense MFLOPs", "DEN MFLOPs"]
    for batch in batches:
        header += [f"dense ms, batch {batch}", f"DEN ms, batch {batch}"]
    body = []
    for row in rows:
        cells = [row["task"], *(f"{row[key]:.2f}" for key in ("dense_accuracy", "random_accuracy", "accuracy"))]
        cells += [f"{row['cost']:.3f}", f"{row['dense_flops'] / 1e6:.2f}", f"{row['flops'] / 1e6:.2f}"]
        for batch in batches:
            dense, frozen = row["ms"][batch]
            cells += [f"{dense:.3f}", f"{frozen:.3f} ({dense / frozen:.2f}x)"]
        body.append(cells)
    return format_table(header, body, markdown=markdown)


# Pictures


def accuracy_against_flops(
    summary: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    conditions: str = "",
    selector_flops: Mapping[str, float] | None = None,
) -> list[Path]:
    """A panel a task: accuracy of each policy over the FLOPs that it takes.

    summary: task -> policy -> `accuracy` in percent and `flops_mean` an image. Policies: dense, full, random, selector;
        any other is a fixed path, drawn as a line under its own name.
    conditions: what the reader must know, in the title: data, model, seeds.
    selector_flops: of each task's selector; given, they are added to the point of the selector.

    Returns the files written.
    """
    figure, axes = _panels(len(summary), width=5.2, height=4.2)
    for axis, (task, results) in zip(axes, summary.items(), strict=True):
        named = [result["accuracy"] for policy, result in results.items() if policy in POLICIES]
        best = max(result["accuracy"] for result in results.values())
        floor = min([best - RANGE, *(accuracy - MARGIN for accuracy in named)])
        _fixed_paths(axis, {name: result for name, result in results.items() if name not in POLICIES}, floor)
        for policy, (label, mark, size, colour) in POLICIES.items():
            if policy in results:
                extra = (selector_flops or {}).get(task, 0) if policy == "selector" else 0
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
    _legend(figure, axes)
    return _finish(figure, path, "Accuracy against FLOPs", conditions)


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
    figure, axes = _panels(len(usage), width=5.2, height=3.8, sharey=True)
    colours = _level_colours(len(ratios))
    for axis, (task, blocks) in zip(axes, usage.items(), strict=True):
        base = [0.0] * len(blocks)
        for level, ratio in enumerate(ratios):
            shares = [100 * block[level] if level < len(block) else 0.0 for block in blocks]
            label = f"level {level}: {_share_of_channels(ratio)}"
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
        axis.set_xticks(_ticks(len(blocks)))
        axis.set_ylim(0, 100)
    axes[0].set_ylabel("share of test images, %")
    _legend(figure, axes)
    return _finish(figure, path, "How often each level is taken", conditions)


def latency_bars(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, conditions: str = ""
) -> list[Path]:
    """A panel a batch size: milliseconds an image, dense beside frozen DEN, for each task.

    rows: as for `table`.
    """
    batches = list(rows[0]["ms"])
    figure, axes = _panels(len(batches), width=1.8 + 1.7 * len(rows), height=3.9)
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
                text = f"{height:.3g}" if index == 0 else f"{height:.3g}\n{_faster(pair[0] / pair[1])}"
                axis.text(place, height + 0.02 * top, text, ha="center", va="bottom", fontsize=8.5)
        axis.set_xticks(range(len(rows)), [row["task"] for row in rows])
        axis.set_title(f"batch {batch}")
        axis.set_ylim(0, 1.25 * top)
        axis.set_xlim(-0.6, len(rows) - 0.4)
    axes[0].set_ylabel("milliseconds an image")
    _legend(figure, axes)
    return _finish(figure, path, "Time an image: dense against frozen DEN", conditions)


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
    figure = _figure(max(NARROWEST, 1.75 * columns), 2.85 * lines + 1.0)
    grid = figure.add_gridspec(3 * lines, columns, height_ratios=[3, 1, 0.15] * lines)
    colours = [
        UNUSED if ratio == 0 else colour for ratio, colour in zip(ratios, _level_colours(len(ratios)), strict=True)
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
    handles = [_patch(colours[level], f"level {level}: {_share_of_channels(r)}") for level, r in enumerate(ratios)]
    _place_legend(figure, handles, [handle.get_label() for handle in handles])
    subtitle = "a bar a block, from input to output; its height: the share of the block's channels that ran"
    return _finish(
        figure, path, "The sub-network that each image took", "\n".join(filter(None, (subtitle, conditions)))
    )


# What the pictures share


def _figure(width: float, height: float) -> Figure:
    """An empty figure. Raises RuntimeError naming the extra, where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("pictures need matplotlib: pip install 'den-kernels[report]'") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
    return figure


def _panels(count: int, *, width: float, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = _figure(max(NARROWEST, width * count), height)
    import matplotlib

    with matplotlib.rc_context(STYLE):
        axes = figure.subplots(1, count, squeeze=False, sharey=sharey)[0]
    return figure, list(axes)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend below all panels, a handle for each label."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    _place_legend(figure, list(handles.values()), list(handles))


def _place_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    fitting = max(1, int(figure.get_figwidth() // 2.75))
    rows = -(-len(handles) // fitting)
    columns = -(-len(handles) // rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def _finish(figure: Figure, path: str | os.PathLike[str], title: str, conditions: str) -> list[Path]:
    """Write the figure as PNG and SVG beside each other, each whole or not at all."""
    import matplotlib

    fitting = int(10.5 * figure.get_figwidth())  # characters
    lines = [textwrap.fill(line, fitting) for line in (title, *conditions.splitlines())]
    figure.suptitle("\n".join(lines), fontsize=11)
    written = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        target = Path(path).with_suffix(f".{kind}")
        target.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(content, format=kind, dpi=150, metadata=metadata)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_bytes(content.getvalue())
        temporary.replace(target)
        written.append(target)
    return written


def _patch(colour: Any, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _level_colours(count: int) -> list[Any]:
    """From dark (the cheapest level) to light."""
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return [scale(0.05 + 0.9 * level / max(1, count - 1)) for level in range(count)]


def _share_of_channels(ratio: float) -> str:
    if ratio == 0:
        return "block left out"
    return "all channels" if ratio == 1 else f"{100 * ratio:g}% of channels"


def _ticks(count: int) -> range:
    return range(1, count + 1, 1 if count <= 12 else 2)


def _faster(ratio: float) -> str:
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"

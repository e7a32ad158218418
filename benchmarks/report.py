"""The tables and the plot of a run's results.

    python -m benchmarks.report RESULTS.json --out DIR

prints the efficiency table, and writes `efficiency.md` and, for each network, `NAME.png` and `NAME.svg`: speed-up over
the fastest dense engine against the FLOP ratio.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.table import LARGEST_RATIO, Conditions, Row, as_markdown, as_text, headline, read_json, skip_shares

COLOURS = {1: "#0072b2", 8: "#009e73", 64: "#d55e00", 256: "#cc79a7"}
MARKERS = {"full": "o", "paper": "D", "level2": "s", "uniform": "^", "level1": "v", "top1-of-4": "P"}
TICKS = (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and write the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what `make bench BENCH_ARGS='--table-json RESULTS.json'` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the table in Markdown and the plots")
    options = parser.parse_args(arguments)
    rows, conditions = read_json(options.results)
    networks = [row for row in rows if row.group == "network"]
    options.out.mkdir(parents=True, exist_ok=True)
    text = as_markdown(networks, conditions) + "".join(f"\n{line}.\n" for line in skip_shares(networks))
    (options.out / "efficiency.md").write_text(text)
    for case in dict.fromkeys(row.case for row in networks):
        figure = plot([row for row in networks if row.case == case], conditions)
        for suffix in ("png", "svg"):
            figure.savefig(options.out / f"{case.replace('@', '-')}.{suffix}", dpi=150)
        plt.close(figure)
    print("\n".join([*as_text(rows, conditions), "", *skip_shares(rows)]))


def plot(rows: Sequence[Row], conditions: Conditions) -> Figure:
    """Speed-up against FLOP ratio, a panel for each form of the DEN and a series for each batch.

    Filled marks have the selector's time in them, hollow ones are at given levels. Rows in which nearly nothing is left
    to run have no place on the axis: the caption tells their share of dense time.
    """
    panels = list(dict.fromkeys((row.dtype, row.den) for row in rows))
    width = 5.4 * len(panels) + 0.4
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 6.2), squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        _panel(axis, [row for row in rows if (row.dtype, row.den) == panel])
    axes[0][0].legend(handles=_legend(rows), fontsize=7.5, loc="lower right", framealpha=0.9)
    axes[0][0].set_ylabel("measured speed-up over the fastest dense engine")
    figure.suptitle(f"{rows[0].case}: what the saved FLOPs save in time", y=0.985)
    caption = textwrap.fill(" ".join([*headline(rows, conditions), *_skip_caption(rows)]), int(17.5 * width))
    lines = caption.count("\n") + 1
    figure.text(0.02, 0.01, caption, fontsize=7, va="bottom", color="#444444")
    figure.tight_layout(rect=(0, 0.015 + 0.022 * lines, 1, 0.99))
    return figure


def _panel(axis: Axes, rows: Sequence[Row]) -> None:
    shown = [row for row in rows if row.flop_ratio <= LARGEST_RATIO]
    highest = max([2.0, *(row.flop_ratio for row in shown)]) * 1.25
    axis.plot([0.8, highest], [0.8, highest], color="#888888", linewidth=1, zorder=1)
    for batch in sorted({row.batch for row in shown}):
        series = sorted((row for row in shown if row.batch == batch), key=lambda row: row.flop_ratio)
        colour = COLOURS.get(batch, "black")
        ratios = [row.flop_ratio for row in series]
        axis.plot(ratios, [row.speedup(row.headline_ms) for row in series], color=colour, linewidth=1.2, zorder=2)
        for row in series:
            place: dict[str, Any] = {"marker": MARKERS.get(row.mix, "x"), "color": colour, "markersize": 7}
            axis.plot(row.flop_ratio, row.speedup(row.headline_ms), **place, zorder=4)
            if row.selector_ms is not None:
                axis.plot(row.flop_ratio, row.speedup(row.den_ms), **place, markerfacecolor="white", zorder=3)
    for scale in (axis.set_xscale, axis.set_yscale):
        scale("log")
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_locator(FixedLocator(TICKS))
        direction.set_minor_locator(NullLocator())
        direction.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.set_xlim(0.85, highest)
    axis.grid(color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel("FLOPs of the full network over those of the levels")
    engines = ", ".join(dict.fromkeys(row.dense_engine for row in shown))
    axis.set_title(f"{rows[0].dtype}, {rows[0].den}\nfastest dense engine: {engines}", fontsize=9)


def _legend(rows: Sequence[Row]) -> list[Line2D]:
    rows = [row for row in rows if row.flop_ratio <= LARGEST_RATIO]
    batches = [
        Line2D([], [], color=COLOURS.get(batch, "black"), label=f"batch {batch}")
        for batch in sorted({row.batch for row in rows})
    ]
    mixes = [
        Line2D([], [], color="#555555", linestyle="", marker=MARKERS.get(mix, "x"), label=mix)
        for mix in dict.fromkeys(row.mix for row in sorted(rows, key=lambda row: row.flop_ratio))
    ]
    kinds = [
        Line2D([], [], color="#555555", linestyle="", marker="o", label="selector included"),
        Line2D([], [], color="#555555", linestyle="", marker="o", markerfacecolor="white", label="levels given"),
    ]
    if all(row.selector_ms is None for row in rows):
        kinds = []
    return [*batches, *mixes, *kinds, Line2D([], [], color="#888888", linewidth=1, label="efficiency 1")]


def _skip_caption(rows: Sequence[Row]) -> list[str]:
    shares: dict[str, list[str]] = {}
    for row in rows:
        if row.mix == "skip":
            share = f"{100 * row.headline_ms / row.dense_ms:.0f}% at batch {row.batch}"
            shares.setdefault(f"{row.dtype} {row.den}", []).append(share)
    forms = "; ".join(f"{form} {', '.join(found)}" for form, found in shares.items())
    return [f"Every block skipped, share of dense time, selector included: {forms}."] if forms else []


if __name__ == "__main__":
    main()

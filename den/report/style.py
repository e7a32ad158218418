"""What the pictures share: colours, an empty figure, legends, and writing both files.

matplotlib is imported when a picture is drawn; no display is used. Colours are Okabe and Ito's, and viridis, told apart
by the colour-blind; marks and labels tell the same without colour.
"""

from __future__ import annotations

import functools
import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from den.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
BLACK, GREY, UNUSED = "#000000", "#7F7F7F", "#E4E4E4"
NARROWEST = 5.8  # inches
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "svg.hashsalt": "den",  # the same picture is the same file
    "svg.fonttype": "none",
}


def new_figure(width: float, height: float) -> Figure:
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


def panels(count: int, *, width: float, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Panels beside each other, each of this size in inches."""
    figure = new_figure(max(NARROWEST, width * count), height)
    import matplotlib

    with matplotlib.rc_context(STYLE):
        axes = figure.subplots(1, count, squeeze=False, sharey=sharey)[0]
    return figure, list(axes)


def panel_grid(count: int, *, width: float, height: float, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """Panels in rows of so many, each of this size in inches; places that are left over stay empty."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(max(NARROWEST, width * columns), height * rows)
    import matplotlib

    with matplotlib.rc_context(STYLE):
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend below all panels, a handle for each label."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    place_legend(figure, list(handles.values()), list(handles))


def place_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below all panels, as many entries beside each other as fit; the figure grows by what more rows take."""
    fitting = max(1, int(figure.get_figwidth() // 2.75))
    rows = -(-len(handles) // fitting)
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    columns = -(-len(handles) // rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def write(figure: Figure, path: str | os.PathLike[str], title: str, conditions: str) -> list[Path]:
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
        write_whole(target, functools.partial(Path.write_bytes, data=content.getvalue()))
        written.append(target)
    return written


def patch(colour: Any, label: str) -> Any:
    """A handle of a legend: a filled rectangle."""
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def level_colours(count: int) -> list[Any]:
    """From dark (the cheapest level) to light."""
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return [scale(0.05 + 0.9 * level / max(1, count - 1)) for level in range(count)]


def share_of_channels(ratio: float) -> str:
    """A level in words."""
    if ratio == 0:
        return "block left out"
    return "all channels" if ratio == 1 else f"{100 * ratio:.3g}% of channels"


def ticks(count: int) -> range:
    """Numbers of blocks, from 1, at which an axis is marked."""
    return range(1, count + 1, 1 if count <= 12 else 2)


def faster(ratio: float) -> str:
    """A ratio of times in words."""
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"

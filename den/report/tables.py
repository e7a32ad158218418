"""Tables in plain text and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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

"""The efficiency table of a run: rows, the conditions that they hold under, as JSON, text and Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Behind this ratio nearly nothing is left to run, and a quotient of two small numbers says nothing.
LARGEST_RATIO = 20.0
SELECTOR = "+selector"
CLOCK_NAMES = {"wall": "wall time", "cpu": "processor time"}

Conditions = Mapping[str, Any]


@dataclass(frozen=True)
class Time:
    """Of one engine: median and quartiles in milliseconds of a batch, and of how many runs."""

    ms: float
    low_ms: float
    high_ms: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Time:
        """From the seconds of each run."""
        ms = [1e3 * value for value in seconds]
        low, middle, high = statistics.quantiles(ms, method="inclusive") if len(ms) > 1 else ms * 3
        return cls(middle, low, high, len(ms))


@dataclass(frozen=True)
class Row:
    """One case, its engines timed in turn.

    den: the engine under test, at given levels; `den + SELECTOR` is the same with the selector's work, the headline
        where the case has one.
    flop_ratio: FLOPs of the full network over those that the levels leave, the estimator's alone.
    dense: names of the engines in `times` that always do the full network's work.
    disturbance: share of the machine that others took while the case was timed, None where unknown.
    thread_speedup: how many times faster all threads multiplied than one, beside it; None with one thread, or unknown.
    """

    group: str
    case: str
    den: str
    dtype: str
    batch: int
    mix: str
    flop_ratio: float
    times: dict[str, Time]
    dense: list[str]
    disturbance: float | None = None
    thread_speedup: float | None = None

    @property
    def dense_engine(self) -> str:
        """The fastest dense engine: what speed-ups refer to."""
        return min(self.dense, key=lambda name: self.times[name].ms)

    @property
    def dense_ms(self) -> float:
        return self.times[self.dense_engine].ms

    @property
    def den_ms(self) -> float:
        """At given levels."""
        return self.times[self.den].ms

    @property
    def selector_ms(self) -> float | None:
        """With the selector's work."""
        found = self.times.get(self.den + SELECTOR)
        return None if found is None else found.ms

    @property
    def headline_ms(self) -> float:
        return self.den_ms if self.selector_ms is None else self.selector_ms

    def speedup(self, ms: float) -> float:
        """Dense time over `ms`."""
        return self.dense_ms / ms

    def efficiency(self, ms: float) -> float | None:
        """Speed-up over FLOP ratio; None where the ratio is too large to mean anything."""
        return self.speedup(ms) / self.flop_ratio if self.flop_ratio <= LARGEST_RATIO else None

    def asdict(self) -> dict[str, Any]:
        """Plain values, the derived ones among them."""
        derived = {
            "dense_engine": self.dense_engine,
            "speedup": self.speedup(self.headline_ms),
            "efficiency": self.efficiency(self.headline_ms),
            "speedup_without_selector": self.speedup(self.den_ms),
            "efficiency_without_selector": self.efficiency(self.den_ms),
            "selector_included": self.selector_ms is not None,
        }
        return {**asdict(self), **derived}


def write_json(rows: Sequence[Row], conditions: Conditions, path: Path) -> None:
    """The table as JSON, renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    content = {"conditions": dict(conditions), "rows": [row.asdict() for row in rows]}
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def read_json(path: Path) -> tuple[list[Row], Conditions]:
    """What `write_json` wrote. Raises ValueError for another file."""
    try:
        content = json.loads(path.read_text())
        return [row_of(row) for row in content["rows"]], content["conditions"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of `make bench` (--table-json): {error!r}") from None


def row_of(values: Mapping[str, Any]) -> Row:
    """The row that `Row.asdict` told. Raises KeyError or TypeError for other values."""
    fields = {name: values[name] for name in Row.__dataclass_fields__ if name in values}
    return Row(**{**fields, "times": {name: Time(**time) for name, time in fields["times"].items()}})


def headline(rows: Sequence[Row], conditions: Conditions) -> list[str]:
    """The conditions in words: what a figure needs beside it."""
    shares = [row.disturbance for row in rows if row.disturbance is not None]
    facts = conditions
    lines = [
        f"{facts['cpu']}, {facts['threads']} of {facts['cores']} cores, {facts['date']}; "
        f"torch {facts['torch']}, ONNX Runtime {facts['onnxruntime']}, OpenVINO {facts['openvino']}; "
        f"cpu kernels {facts['cpu_kernels']}; {CLOCK_NAMES[facts['clock']]}.",
        "Medians of runs taken in turn, results checked first. speed-up = dense / DEN; efficiency = speed-up / FLOP "
        "ratio; dense is the fastest dense engine of that dtype. FLOPs are the estimator's: the selector's time is "
        "pure cost.",
    ]
    if shares:
        lines.append(
            f"Others took {100 * statistics.median(shares):.0f}% of the machine during the median row, "
            f"{100 * max(shares):.0f}% during the worst."
        )
    speedups = [row.thread_speedup for row in rows if row.thread_speedup is not None]
    if speedups:
        lines.append(
            f"{facts['threads']} threads multiplied matrices {statistics.median(speedups):.2f}x as fast as one beside "
            f"the median row, {min(speedups):.2f}x beside the worst; on cores of their own {facts['threads']}x."
        )
    return lines


def as_text(rows: Sequence[Row], conditions: Conditions) -> list[str]:
    """Lines of the table, a part for each group of rows."""
    lines = headline(rows, conditions)
    for group in dict.fromkeys(row.group for row in rows):
        part = sorted((row for row in rows if row.group == group), key=lambda r: (r.case, r.den, r.dtype, r.batch))
        lines += ["", group, *aligned(_text_cells(part))]
    return lines


def _text_cells(rows: Sequence[Row]) -> list[list[str]]:
    selector = any(row.selector_ms is not None for row in rows)
    others = list(dict.fromkeys(name for row in rows for name in row.times if name.removesuffix(SELECTOR) != row.den))
    head = ["case", "den", "dtype", "batch", "mix", "FLOPs", "fastest dense", "dense ms"]
    head += ["DEN ms", "speed-up", "efficiency"]
    head += [f"{SELECTOR} ms", "speed-up", "efficiency"] if selector else []
    head += [f"{name} ms" for name in others]
    cells = [head]
    for row in rows:
        line = [row.case, row.den, row.dtype, str(row.batch), row.mix, flops_cell(row)]
        line += [row.dense_engine, _ms(row.dense_ms), *_figures(row, row.den_ms)]
        line += _figures(row, row.selector_ms) if selector else []
        line += [_ms(row.times[name].ms) if name in row.times else "" for name in others]
        cells.append(line)
    return cells


def as_markdown(rows: Sequence[Row], conditions: Conditions) -> str:
    """For each network and form of the DEN its efficiency table and the medians of all engines."""
    parts = ["\n".join(headline(rows, conditions))]
    for case, den, dtype in dict.fromkeys((row.case, row.den, row.dtype) for row in rows):
        part = [row for row in rows if (row.case, row.den, row.dtype) == (case, den, dtype)]
        parts += [f"## {case}, {dtype}, {den}", markdown(efficiency_cells(part), left=(1, 3))]
        parts += ["Medians of all engines, ms:", markdown(_engine_cells(part), left=(1,))]
    return "\n\n".join(parts) + "\n"


def efficiency_cells(rows: Sequence[Row]) -> list[list[str]]:
    head = ["batch", "levels", "FLOPs", "fastest dense", "dense ms", "DEN ms", "speed-up", "efficiency"]
    selector = any(row.selector_ms is not None for row in rows)
    head += ["with selector ms", "speed-up", "efficiency"] if selector else []
    cells = [head]
    for row in sorted(rows, key=lambda row: row.batch):
        line = [str(row.batch), row.mix, flops_cell(row), row.dense_engine, _ms(row.dense_ms)]
        line += _figures(row, row.den_ms)
        line += _figures(row, row.selector_ms) if selector else []
        cells.append(line)
    return cells


def _engine_cells(rows: Sequence[Row]) -> list[list[str]]:
    names = list(dict.fromkeys(name for row in rows for name in row.times))
    cells = [["batch", "levels", *names]]
    for row in sorted(rows, key=lambda row: row.batch):
        cells.append([str(row.batch), row.mix, *(_ms(row.times[n].ms) if n in row.times else "" for n in names)])
    return cells


def skip_shares(rows: Sequence[Row]) -> list[str]:
    """For each case in which every block is skipped: what is left, as a share of dense time."""
    return [
        f"{row.case}, {row.dtype}, {row.den}, batch {row.batch}: every block skipped takes "
        f"{100 * row.den_ms / row.dense_ms:.1f}% of dense time"
        + ("" if row.selector_ms is None else f", {100 * row.selector_ms / row.dense_ms:.1f}% with the selector")
        for row in rows
        if row.mix == "skip"
    ]


def flops_cell(row: Row) -> str:
    """The share of the full network's FLOPs, as 1/ratio."""
    return f"1/{row.flop_ratio:.2f}" if row.flop_ratio <= LARGEST_RATIO else "~0"


def _figures(row: Row, ms: float | None) -> list[str]:
    if ms is None:
        return ["", "", ""]
    efficiency = row.efficiency(ms)
    return [_ms(ms), f"{row.speedup(ms):.2f}x", "" if efficiency is None else f"{efficiency:.2f}"]


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def markdown(cells: list[list[str]], left: Sequence[int]) -> str:
    rule = [":--" if i in left else "--:" for i in range(len(cells[0]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:]))

"""The efficiency table of a run: rows, the conditions that they hold under, as text and as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from den_kernels.backends import available_backends, load

# Behind this ratio nearly nothing is left to run, and a quotient of two small numbers says nothing.
LARGEST_RATIO = 20.0


@dataclass
class Row:
    """One case. Times are medians in milliseconds of a batch, taken in turn with each other."""

    group: str
    case: str
    backend: str
    dtype: str
    batch: int
    mix: str
    flop_ratio: float
    dense_engine: str
    dense_ms: float
    den_ms: float
    selector_ms: float | None = None
    others_ms: dict[str, float] = field(default_factory=dict)

    @property
    def headline_ms(self) -> float:
        """The selector included, where the case has one."""
        return self.den_ms if self.selector_ms is None else self.selector_ms

    def speedup(self, ms: float | None = None) -> float:
        """Dense time over `ms` (the headline's)."""
        return self.dense_ms / (self.headline_ms if ms is None else ms)

    def efficiency(self, ms: float | None = None) -> float | None:
        """Speed-up over FLOP ratio; None where the ratio is too large to mean anything."""
        return self.speedup(ms) / self.flop_ratio if self.flop_ratio <= LARGEST_RATIO else None


def row(
    group: str,
    case: str,
    backend: str,
    dtype: str,
    batch: int,
    mix: str,
    flop_ratio: float,
    medians: dict[str, float],
    dense: list[str],
) -> Row:
    """A row from the medians (seconds) of `take_turns`; `dense` names the dense engines among them."""
    ms = {name: 1e3 * seconds for name, seconds in medians.items()}
    fastest = min(dense, key=lambda name: ms[name])
    own, with_selector = f"den[{backend}]", f"den[{backend}]+selector"
    others = {name: value for name, value in ms.items() if name not in (own, with_selector, fastest)}
    return Row(
        group,
        case,
        backend,
        dtype,
        batch,
        mix,
        flop_ratio,
        fastest,
        ms[fastest],
        ms[own],
        ms.get(with_selector),
        others,
    )


def conditions() -> dict[str, str | int]:
    """What the figures depend on."""
    isa = load("cpu").supported_isas()[0] if load("cpu").unavailable() is None else "not built"
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "backends": ", ".join(available_backends()),
        "cpu_kernels": isa,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def as_json(rows: list[Row]) -> str:
    """Conditions and rows with their derived figures."""
    listed = [
        {
            **asdict(r),
            "speedup": r.speedup(),
            "efficiency": r.efficiency(),
            "speedup_without_selector": r.speedup(r.den_ms),
            "efficiency_without_selector": r.efficiency(r.den_ms),
        }
        for r in rows
    ]
    return json.dumps({"conditions": conditions(), "rows": listed}, indent=1) + "\n"


def write_json(rows: list[Row], path: Path) -> None:
    """The table as JSON, renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(as_json(rows))
    part.replace(path)


def as_text(rows: list[Row]) -> list[str]:
    """Lines of the table, a part for each group of rows."""
    facts = conditions()
    lines = [
        f"{facts['cpu']}, {facts['threads']} threads of {facts['cores']} cores, torch {facts['torch']}, "
        f"cpu kernels: {facts['cpu_kernels']}",
        "Medians taken in turn, results checked first. speed-up = dense / DEN; efficiency = speed-up / FLOP ratio;",
        "dense is the fastest dense engine that ran. FLOPs are the estimator's: the selector's time is pure cost.",
    ]
    for group in dict.fromkeys(r.group for r in rows):
        part = sorted((r for r in rows if r.group == group), key=lambda r: (r.case, r.backend, r.dtype, r.batch))
        lines += ["", f"{group}", *_columns(part)]
    return lines


def _columns(rows: list[Row]) -> list[str]:
    selector = any(r.selector_ms is not None for r in rows)
    others = list(dict.fromkeys(name for r in rows for name in r.others_ms))
    head = ["case", "backend", "dtype", "batch", "mix", "FLOPs", "dense ms", "DEN ms", "speed-up", "efficiency"]
    head += ["+selector ms", "speed-up", "efficiency"] if selector else []
    head += [f"{name} ms" for name in others]
    body = []
    for r in rows:
        ratio = f"1/{r.flop_ratio:.2f}" if r.flop_ratio <= LARGEST_RATIO else "~0"
        cells = [r.case, r.backend, r.dtype, str(r.batch), r.mix, ratio, _ms(r.dense_ms), *_figures(r, r.den_ms)]
        cells += _figures(r, r.selector_ms) if selector else []
        cells += [_ms(r.others_ms.get(name)) for name in others]
        body.append(cells)
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    engines = ", ".join(sorted({r.dense_engine for r in rows}))
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *body)]
    return [*lines, f"fastest dense engine: {engines}"]


def _figures(r: Row, ms: float | None) -> list[str]:
    if ms is None:
        return ["", "", ""]
    efficiency = r.efficiency(ms)
    return [_ms(ms), f"{r.speedup(ms):.2f}x", "" if efficiency is None else f"{efficiency:.2f}"]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 1 else f"{value:.2f}"

"""Pictures and tables of finished runs, from plain data: what summary.json holds, and small arrays.

Each picture is written as PNG and SVG.
"""

from __future__ import annotations

from den.report.figures import POLICIES, accuracy_against_flops, latency_bars, level_usage, sample_paths
from den.report.tables import format_table, table

__all__ = [
    "POLICIES",
    "accuracy_against_flops",
    "format_table",
    "latency_bars",
    "level_usage",
    "sample_paths",
    "table",
]

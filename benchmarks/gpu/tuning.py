"""The time that is left goes into tiles: `den_kernels.tune` into DIR/tables, to be put into the package from there."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.gpu.context import Context
from den_kernels import tune

BATCHES = (256, 64, 1, 8)
NETWORKS = ("wrn_32_4", "resnet_50")
CASE_S = 5.0


def run(context: Context) -> bool:
    """Search block by block. Whether nothing is left."""
    table = tune.Table(context.results.path.parent / "tables", context.device)
    context.results.put("tuning", "table", str(table.path.relative_to(context.results.path.parent)))
    shapes = [shape for name in NETWORKS for shape in tune.NETWORKS[name]()]
    batches: tuple[int, ...] = BATCHES
    if context.dry:
        shapes, batches = [tune.BlockShape(16, 16, 16, 4)], (1,)
    cases = {
        f"{shape.name}, batch {samples}": functools.partial(search, shape, samples, table, context)
        for samples in batches
        for shape in shapes
    }
    return context.each("tuning", cases, lambda key: CASE_S)


def search(
    shape: tune.BlockShape, samples: int, table: tune.Table, context: Context
) -> dict[str, dict[str, float]] | None:
    """Microseconds of the block with the tiles found for each of its launches, and before; None where time ran out."""
    found: dict[str, Any] = {}
    for problem, outcome in tune.tune([shape], [samples], context.dtype, context.device, table, context.deadline):
        if outcome is not None:
            found[problem.key] = {"us": outcome.us, "heuristic_us": outcome.heuristic_us}
        context.results.put("tuning", "entries", len(table.content["entries"]))
    return None if context.out_of_time() else found

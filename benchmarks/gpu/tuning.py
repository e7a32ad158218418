"""The time that is left goes into tiles: `den_kernels.tune` into DIR/tables, to be put into the package from there."""

from __future__ import annotations

import time

from benchmarks.gpu.context import Context
from den_kernels import tune

BATCHES = (256, 64, 1, 8)
NETWORKS = ("wrn_32_4", "resnet_50")
SEARCH_S = 20.0


def run(context: Context) -> bool:
    """Search launch by launch. Whether nothing is left."""
    folder = context.results.path.parent / "tables"
    table = tune.Table(folder, context.device)
    batches: tuple[int, ...]
    if context.dry:
        shapes, batches = [tune.BlockShape(16, 16, 16, 4)], (1,)
    else:
        shapes, batches = [shape for name in NETWORKS for shape in tune.NETWORKS[name]()], BATCHES
    deadline = context.deadline if context.dry else context.deadline - SEARCH_S
    for _ in tune.tune(shapes, batches, context.dtype, context.device, table, deadline):
        context.results.put("tuning", "entries", len(table.content["entries"]))
    context.results.put("tuning", "table", str(table.path.relative_to(context.results.path.parent)))
    return time.monotonic() < deadline

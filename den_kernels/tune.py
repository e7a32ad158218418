"""Measure which tiles the Triton kernels run best with on this GPU, and write them where the kernels look them up.

    python -m den_kernels.tune --network wrn_32_4 --batches 1 8 64 256

For every residual block of the network and every batch size, each launch's candidates are compiled in parallel and
timed in turn in a CUDA graph of the whole block at evenly mixed levels, after their result was found equal to the
heuristic's. The table, `tables/<device>.json` of the backend, is rewritten after every launch's search, and what it
already holds is not searched again: an interrupted run goes on. Nothing is tuned at run time.

Suffixes: N samples, C channels, H W space, L levels.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import den_kernels as dk
from den_kernels.backends import load
from den_kernels.backends.triton import configs, launch, tile_tables
from den_kernels.backends.triton.configs import Asked, Problem, TileConfig

RATIOS = (0.0, 0.25, 0.5, 1.0)
# Largest difference of a candidate from the heuristic's tile, over the largest value: another order of summation.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WORKERS = os.cpu_count() or 1  # that compile


class BlockShape(NamedTuple):
    """A residual block by what its launches depend on.

    size: of the square map that it reads. leads: whether no block stands in front that could activate this map for it.
    """

    in_channels: int
    hidden_channels: int
    out_channels: int
    size: int
    kernels: tuple[int, ...] = (3, 3)
    strides: tuple[int, ...] = (1, 1)
    groups: tuple[int, ...] = (1, 1)
    preactivation: bool = False
    projection: bool = False
    leads: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden channels of each of the four levels, in whole groups."""
        groups = max(self.groups)
        return tuple(round(ratio * groups) * (self.hidden_channels // groups) if groups > 1
                     else int(ratio * self.hidden_channels) for ratio in RATIOS)  # fmt: skip

    @property
    def name(self) -> str:
        """In words; another for each shape."""
        channels = f"{self.in_channels} to {self.hidden_channels} to {self.out_channels}, {self.size}x{self.size}"
        parts = (("kernels", self.kernels), ("strides", self.strides), ("groups", self.groups))
        form = [f"{part} {'-'.join(map(str, values))}" for part, values in parts]
        form += ["pre-activation"] * self.preactivation + ["projection"] * self.projection + ["leads"] * self.leads
        return ", ".join([channels, *form])


def _wide(factor: int) -> list[BlockShape]:
    """Of a wide residual network at 32x32, whatever its depth."""
    shapes, channels, size = [], 16, 32
    for stage in range(3):
        width = 16 * factor * 2**stage
        stride = 1 if stage == 0 else 2
        form: dict[str, Any] = {"strides": (stride, 1), "leads": stage == 0}
        shapes.append(BlockShape(channels, width, width, size, preactivation=True, **form))
        channels, size = width, size // stride
        shapes.append(BlockShape(width, width, width, size, preactivation=True))
    return shapes


def _basic() -> list[BlockShape]:
    """Of a residual network of basic blocks at 32x32, whatever its depth."""
    shapes, channels, size = [], 64, 32
    for stage in range(4):
        width, stride = 64 * 2**stage, 1 if stage == 0 else 2
        if stage:
            shapes.append(BlockShape(channels, width, width, size, strides=(stride, 1)))
        channels, size = width, size // stride
        shapes.append(BlockShape(width, width, width, size))
    return shapes


def _bottleneck(
    size: int, stages: int, hidden: int, out: int, paths: int = 1, projection: bool = False
) -> list[BlockShape]:
    """Of a network of bottlenecks: each stage halves the map and doubles the channels; `paths` are groups."""
    shapes, channels = [], 64
    for stage in range(stages):
        stride = 1 if stage == 0 else 2
        form: dict[str, Any] = {"kernels": (1, 3, 1), "groups": (1, paths, 1)}
        widths = hidden * 2**stage, out * 2**stage
        shapes.append(BlockShape(channels, *widths, size, strides=(1, stride, 1), projection=projection, **form))
        channels, size = widths[1], size // stride
        shapes.append(BlockShape(channels, *widths, size, strides=(1, 1, 1), **form))
    return shapes


NETWORKS: dict[str, Callable[[], list[BlockShape]]] = {
    "wrn_32_4": functools.partial(_wide, 4),
    "resnet_42": _basic,
    "resnext_29_4x64d": functools.partial(_bottleneck, 32, 3, 256, 64, 4),
    "resnet_50": functools.partial(_bottleneck, 56, 4, 64, 256, 1, True),
}


def _block(shape: BlockShape, dtype: torch.dtype, device: torch.device) -> dk.FusedResidualBlock:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    ends = [shape.in_channels, *[shape.hidden_channels] * (len(shape.kernels) - 1), shape.out_channels]
    weights = [
        (random(o, i // g, k, k) / (k * k * i // g) ** 0.5).to(dtype)
        for i, o, k, g in zip(ends, ends[1:], shape.kernels, shape.groups, strict=False)
    ]
    tables = [random(1, len(RATIOS), o) / 4 for o in ends[1:]]
    pre = random(1, shape.in_channels) if shape.preactivation else None
    projection = None
    if shape.projection:
        weight = random(shape.out_channels, shape.in_channels, 1, 1) / shape.in_channels**0.5
        projection = weight.to(dtype), tables[-1], tables[-1]
    return dk.FusedResidualBlock(
        weights,
        [table + 1 for table in tables],
        tables,
        shape.widths,
        strides=shape.strides,
        groups=shape.groups,
        pre_scale=pre,
        pre_shift=pre,
        projection=projection,
        relu=not shape.preactivation,
        backend="triton",
    )


class BlockCall:
    """A block of this shape on a batch, at levels that are evenly mixed; where pre-activations are handed on, behind
    another block that does."""

    def __init__(self, shape: BlockShape, samples: int, dtype: torch.dtype, device: torch.device):
        blocks = [_block(shape, dtype, device)]
        if shape.preactivation and not shape.leads:
            inside = shape.in_channels
            front = BlockShape(inside, inside, inside, shape.size, preactivation=True)
            blocks.insert(0, _block(front, dtype, device))
        self.chain = dk.FusedChain(blocks)
        x = torch.randn(samples, shape.in_channels, shape.size, shape.size, generator=torch.Generator().manual_seed(1))
        self.x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
        level = torch.arange(samples, device=device).flip(0) % len(RATIOS)
        self.plan = dk.plan_levels(level[:, None].expand(-1, len(blocks)), len(RATIOS))

    def __call__(self) -> Tensor:
        return self.chain(self.x, self.plan)


def median_us(call: Callable[[], object], device: torch.device, rep_ms: float = 20.0) -> float:
    """Median microseconds of a call: in a CUDA graph on a GPU, of three calls by the clock elsewhere."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return 1e3 * do_bench_cudagraph(call, rep=rep_ms, return_mode="median")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


class Found(NamedTuple):
    """The outcome of one launch's search. complete: whether there was time to try every candidate."""

    tile: TileConfig
    us: float
    heuristic: TileConfig
    heuristic_us: float
    tried: int
    refused: int
    complete: bool


def search(
    call: Callable[[], Tensor],
    problem: Problem,
    asked: Asked,
    best: dict[Problem, TileConfig],
    device: torch.device,
    deadline: float = float("inf"),
) -> Found:
    """The fastest tile of one launch of `call`, the others as in `best`: first the blocks, then warps and stages.

    deadline: of `time.monotonic`, when the best so far is taken.
    """
    with configs.searching({**best, problem: asked.tile}):
        expected = call()
        baseline = median_us(call, device)
    times, refused, complete = {asked.tile: baseline}, 0, True

    def consider(tiles: Sequence[TileConfig]) -> TileConfig:
        nonlocal refused, complete
        new = [tile for tile in tiles if tile not in times]
        for i, tile in enumerate(new):
            if time.monotonic() > deadline:
                complete = False
                break
            if i % WORKERS == 0:
                _compile(call, problem, new[i : i + WORKERS], best)
            us = _measured(call, problem, tile, best, expected, device)
            refused += us is None
            if us is not None:
                times[tile] = us
        return min(times, key=lambda tile: times[tile])

    winner = consider(configs.candidates(asked.facts))
    winner = consider(configs.variations(winner, asked.facts.kind))
    return Found(winner, times[winner], asked.tile, baseline, len(times), refused, complete)


def _compile(call: Callable[[], Tensor], problem: Problem, tiles: Sequence[TileConfig], best) -> None:
    """Compile the kernels of these tiles in parallel; one that cannot be is met again, and refused, by `_measured`."""
    with contextlib.suppress(Exception), launch.compiling(WORKERS):
        for tile in tiles:
            with configs.searching({**best, problem: tile}):
                call()


def _measured(call, problem: Problem, tile: TileConfig, best, expected: Tensor, device: torch.device) -> float | None:
    """Microseconds with this tile; None where it cannot be compiled, or the GPU cannot run it.

    Raises RuntimeError for a wrong result, or where an error has cost this process its use of the GPU.
    """
    with configs.searching({**best, problem: tile}):
        try:
            result = call()
        except Exception:  # the compiler's own are of many kinds
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the GPU is lost
            return None
        error = ((result.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
        if not error <= TOLERANCE[expected.dtype]:
            raise RuntimeError(f"{problem.key}: {tile} is off by {error:.1e} of the largest value; nothing was written")
        return median_us(call, device)


class Table:
    """A device's table on its way: read where there is one, written after every entry."""

    def __init__(self, folder: Path, device: torch.device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        self.path = folder / f"{tile_tables.slug(name)}.json"
        self.content: dict[str, Any] = {"device": name, "capability": None, "entries": {}}
        if device.type == "cuda":
            self.content["capability"] = list(torch.cuda.get_device_capability(device))
        if self.path.exists():
            self.content = tile_tables.read(self.path)

    def __contains__(self, problem: Problem) -> bool:
        """Whether nothing is left to search."""
        entry = self.content["entries"].get(problem.key)
        return entry is not None and entry.get("complete", True)

    def tile(self, problem: Problem) -> TileConfig:
        return TileConfig(**self.content["entries"][problem.key]["tile"])

    def add(self, problem: Problem, found: Found) -> None:
        """Keep what was found, with its conditions."""
        import triton

        self.content["entries"][problem.key] = {
            "tile": found.tile._asdict(),
            "us": round(found.us, 2),
            "heuristic": found.heuristic._asdict(),
            "heuristic_us": round(found.heuristic_us, 2),
            "tried": found.tried,
            "complete": found.complete,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
        }
        tile_tables.write(self.content, self.path)


def tune(
    shapes: Sequence[BlockShape],
    batches: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    table: Table,
    deadline: float = float("inf"),
) -> Iterator[tuple[Problem, Found | None]]:
    """Search what the table lacks, batch by batch; yields each launch, with None for one that it had.

    deadline: of `time.monotonic`; what a search has found by then is kept, and the next run makes it anew.
    """
    for samples in batches:
        for shape in shapes:
            if time.monotonic() > deadline:
                return
            call = BlockCall(shape, samples, dtype, device)
            with launch.compiling(WORKERS), configs.searching({}) as asked:
                call()
            best = {problem: table.tile(problem) for problem in asked if problem in table}
            for problem, told in asked.items():
                if problem in best:
                    yield problem, None
                    continue
                if time.monotonic() > deadline:
                    return
                found = search(call, problem, told, best, device, deadline)
                best[problem] = found.tile
                if found.complete or found.tried > 1:
                    table.add(problem, found)
                yield problem, found


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, telling of each launch."""
    parser = argparse.ArgumentParser(prog="python -m den_kernels.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["wrn_32_4"], help="whose blocks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256], help="batch sizes, first ones first")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="for everything; a search that is cut is made anew"
    )
    parser.add_argument("--out", type=Path, default=tile_tables.FOLDER, help="folder of the tables (the package's own)")
    options = parser.parse_args(arguments)
    if min(options.batches) < 1:
        parser.error(f"--batches is {options.batches}; batch sizes must be at least 1")
    dtype = getattr(torch, options.dtype)
    reason = load("triton").unavailable()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = reason or load("triton").rejects(device, dtype)
    if reason:
        print(f"nothing to tune here: {reason}", file=sys.stderr)
        return 1
    shapes = list(dict.fromkeys(shape for name in options.network for shape in NETWORKS[name]()))
    table, deadline = Table(options.out, device), time.monotonic() + options.seconds
    for problem, found in tune(shapes, options.batches, dtype, device, table, deadline):
        if found is None:
            print(f"{problem.key}: in the table", flush=True)
        else:
            tile = (
                "x".join(map(str, found.tile[:3])) + f", {found.tile.num_warps} warps, {found.tile.num_stages} stages"
            )
            gain = found.heuristic_us / found.us
            print(
                f"{problem.key}: {tile}; block {found.us:.1f} us, {gain:.2f}x the heuristic's speed, of "
                f"{found.tried} tried, {found.refused} refused",
                flush=True,
            )
    print(f"{len(table.content['entries'])} entries in {table.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

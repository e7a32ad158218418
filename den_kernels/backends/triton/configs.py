"""Which tile a launch uses: decided by shape, dtype, batch size and device, never by level values or by timing.

Autotuning at run time would break graph capture and repeatability. A device's table (`tile_tables`), measured once by
`python -m den_kernels.tune`, says which tile is fastest; where it has no entry, the heuristic picks from `tiles`. Both
are few enough to compile every one offline (tests/test_triton_compile.py).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from den_kernels.backends.triton import tile_tables
from den_kernels.backends.triton.tile_tables import Problem, TileConfig

# What a search tries in place of table and heuristic, and where it notes what launches asked for.
_search: contextvars.ContextVar[tuple[Mapping[Problem, TileConfig], dict[Problem, Asked]] | None] = (
    contextvars.ContextVar("search", default=None)
)


class Asked(NamedTuple):
    """What a launch told `tile` about itself, and the tile that it got."""

    tile: TileConfig
    facts: Facts


class Facts(NamedTuple):
    """What the heuristic goes by; see `choose`."""

    kind: str
    samples: int
    rows: int
    reduction: int
    columns: int
    elastic_in: bool
    elastic_out: bool
    through_registers: bool
    vectors: bool
    multiprocessors: int


@contextlib.contextmanager
def searching(tiles: Mapping[Problem, TileConfig]) -> Iterator[dict[Problem, Asked]]:
    """Within, launches take ``tiles``, or else the heuristic's, whatever table there is: for a tuner.

    Yields what they ask for, in their order.
    """
    asked: dict[Problem, Asked] = {}
    token = _search.set((tiles, asked))
    try:
        yield asked
    finally:
        _search.reset(token)


def tile(problem: Problem, device: torch.device, facts: Facts) -> TileConfig:
    """The tile of a launch: the device's table says which, or else the heuristic."""
    search = _search.get()
    if search is None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return _settled(problem, device, facts)
    tried, asked = search
    found = tried.get(problem) or choose(**facts._asdict())
    asked[problem] = Asked(found, facts)
    return found


@functools.lru_cache(maxsize=4096)
def _settled(problem: Problem, device: torch.device, facts: Facts) -> TileConfig:
    return tile_tables.lookup(problem, device) or choose(**facts._asdict())


def reload_tables() -> None:
    """Read the devices' tables anew at the next launch, after one was written; tiles already chosen are forgotten."""
    _settled.cache_clear()
    tile_tables._of_device.cache_clear()


# Shared memory of a pipelined tile is about stages * (block_m + block_n) * block_k * bytes: the largest of these takes
# 96 KiB, so every tile fits the smallest of the targets (99 KiB on sm_89). Warps are where the offline compiles stop
# spilling: activations that pass through registers on their way (pre-activation, an exact mask) need more of them.
def _half(block_m: int, block_n: int, block_k: int, through_registers: bool) -> TileConfig:
    large = block_m * block_n * block_k >= 128 * 64 * 64
    wide = block_m * block_n >= 64 * 128 or max(block_m, block_n) * block_k >= 128 * 64
    warps = 8 if large or (through_registers and wide) else 4
    return TileConfig(block_m, block_n, block_k, warps, 3 if (block_m + block_n) * block_k > 128 * 64 else 4)


def _tf32(block_m: int, block_n: int, block_k: int, through_registers: bool) -> TileConfig:
    return TileConfig(block_m, block_n, block_k, 8 if block_m * block_n >= 128 * 64 else 4, 3)


def _fp32(block_m: int, block_n: int, block_k: int, through_registers: bool) -> TileConfig:
    """Exact float32 has no tensor cores: both operands of a step sit in registers, so steps are short."""
    return TileConfig(block_m, block_n, block_k, 4, 3 if through_registers else 2)


# kind -> (sizes of M, N and K in ascending order, how a tile of those sizes is run)
_FAMILIES = {
    "half": ((16, 32, 64, 128), (16, 32, 64, 128), (32, 64), _half),
    "tf32": ((16, 32, 64, 128), (16, 32, 64), (32,), _tf32),
    "fp32": ((16, 32, 64), (16, 32, 64), (16,), _fp32),
}


def kind(dtype: torch.dtype, precision: str) -> str:
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "fp32"
    return "half"


def tiles(kind: str, through_registers: bool) -> list[TileConfig]:
    """Every tile that `choose` can return."""
    sizes_m, sizes_n, sizes_k, make = _FAMILIES[kind]
    return [make(m, n, k, through_registers) for m in sizes_m for n in sizes_n for k in sizes_k]


# What a search tries beside `tiles`: blocks that only some shapes and GPUs have room for.
_LARGER = {"half": 256, "tf32": 128, "fp32": 64}
_STAGES = {"half": (2, 3, 4, 5), "tf32": (2, 3, 4), "fp32": (2, 3)}


def candidates(facts: Facts) -> list[TileConfig]:
    """Tiles that a search times first: every size that the problem can fill, the heuristic's warps and stages."""
    sizes_m, sizes_n, sizes_k, make = _FAMILIES[facts.kind]
    larger = _LARGER[facts.kind]
    all_m, all_n = (tuple(dict.fromkeys((*sizes, larger))) for sizes in (sizes_m, sizes_n))
    limit_m, limit_n = _covering(all_m, facts.rows), _covering(all_n, facts.columns)
    limit_k = _covering(sizes_k, facts.reduction)
    return [
        make(m, n, k, facts.through_registers)
        for m in all_m
        for n in all_n
        for k in sizes_k
        if m <= limit_m and n <= limit_n and k <= limit_k and m * n <= 128 * larger
    ]


def variations(tile: TileConfig, kind: str) -> list[TileConfig]:
    """The same blocks with other warps and stages, which a search times next."""
    return [tile._replace(num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in _STAGES[kind]]


def _largest(sizes: tuple[int, ...], limit: int) -> int:
    return max((size for size in sizes if size <= limit), default=sizes[0])


def _covering(sizes: tuple[int, ...], need: int) -> int:
    return min((size for size in sizes if size >= need), default=sizes[-1])


def choose(
    kind: str,
    *,
    samples: int,
    rows: int,
    reduction: int,
    columns: int,
    elastic_in: bool,
    elastic_out: bool,
    through_registers: bool,
    vectors: bool,
    multiprocessors: int,
) -> TileConfig:
    """The tile for ``samples`` products of ``rows`` pixels by ``columns`` channels over ``reduction`` channels a tap.

    Loads from L2 bound most of these products. An elastic side is usually a quarter, a half or all of its width: of the
    columns a block is taken that loads least over those three, of the reduction at most half, because a block that
    straddles the width does work that nobody asked for. ``through_registers``: activations are changed on load.
    ``vectors``: channels come 16 bytes at a time; one by one, their addresses fill the registers of a tall tile.
    """
    sizes_m, sizes_n, sizes_k, make = _FAMILIES[kind]
    block_m = _covering(sizes_m, rows)
    block_n = _covering(sizes_n, columns)
    block_k = _covering(sizes_k, reduction // 2 if elastic_in else reduction)

    def loads(block_n: int) -> int:
        return (block_m + block_n) * sum(-(-width // block_n) for width in (columns // 4, columns // 2, columns))

    if elastic_out:
        block_n = min((size for size in sizes_n if size <= block_n), key=loads)
    if not vectors:
        block_m = min(block_m, 64)

    def programs() -> int:
        return samples * -(-rows // block_m) * -(-columns // block_n)

    # At a small batch the device is not filled: smaller tiles shorten the longest chain of dependent steps.
    while programs() < multiprocessors and max(block_m, block_n) > 32:
        if block_m >= block_n:
            block_m = _largest(sizes_m, block_m // 2)
        else:
            block_n = _largest(sizes_n, block_n // 2)
    return make(block_m, block_n, block_k, through_registers)


def splits(programs: int, steps: int, multiprocessors: int) -> int:
    """Into how many parts to cut a reduction of ``steps`` (at full width), 1 for none.

    Parts pay for the launch that adds them where a device half empty would walk a long reduction: they fill the device
    once, and each has at least 4 steps, enough for the loads to run ahead.
    """
    if steps < 16:
        return 1
    return max(1, min(multiprocessors // programs, steps // 4, 8))


def _pixel_steps(pixels: int, sizes: tuple[int, ...]) -> tuple[int, bool]:
    """Pixels a step, and whether steps run over samples' ends: where cutting each map into steps wastes over 15%."""
    fitting = [size for size in sizes if -(-pixels // size) * size <= 1.15 * pixels]
    return (fitting[-1], False) if fitting else (sizes[-1], True)


@functools.lru_cache(maxsize=4096)
def choose_weight_gradient(
    kind: str, *, pixels: int, outputs: int, inputs: int, vectors: bool
) -> tuple[TileConfig, bool]:
    """The tile for ``outputs`` by ``inputs`` products over the ``pixels`` of a sample, and whether steps are packed.

    The largest, whatever is elastic: the loads from L2 bound this kernel, not the products, and what is beyond a width
    is not loaded. Packed steps run over the ends of samples.
    """
    sizes_m, sizes_n, sizes_k, make = _FAMILIES[kind]
    block_m, block_n = _covering(sizes_m, outputs), _covering(sizes_n, inputs)
    if not vectors:
        block_m, block_n = min(block_m, 64), min(block_n, 64)
    block_k, packed = _pixel_steps(pixels, sizes_k)
    return make(block_m, block_n, block_k, True), packed


@functools.lru_cache(maxsize=4096)
def group_span(group_in: int, group_out: int, groups: int) -> int:
    """How many groups one tile takes as a block-diagonal product, so that narrow groups fill a 16-wide operand."""
    fitting = [n for n in range(1, groups + 1) if groups % n == 0 and n * max(group_in, group_out) <= 16]
    return max(fitting, default=1)


def granule(chunk_in: int) -> int:
    """Channels to which a run-time limit may be rounded up without leaving the chunk (see `accumulate`)."""
    return 16 if chunk_in % 16 == 0 else 1

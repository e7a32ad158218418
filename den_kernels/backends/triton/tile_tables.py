"""Measured tiles, a JSON file for each kind of GPU: `tables/<device>.json`, written by `python -m den_kernels.tune`.

A file holds `device`, and `entries` by the key of a `Problem`: its fastest tile, the microseconds that the tile and
the heuristic's took, and when and with what they were measured. A device without a file, as every one that nobody has
tuned yet, uses the heuristic of `configs`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent / "tables"
_WARPS, _STAGES = (1, 2, 4, 8, 16), range(1, 9)


class TileConfig(NamedTuple):
    block_m: int  # output pixels, all of one sample
    block_n: int  # output channels
    block_k: int  # input channels of one tap in a step
    num_warps: int
    num_stages: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


class Problem(NamedTuple):
    """What a tile may depend on: a kernel and a shape, and no level value.

    kernel: its name, with what else changes its code. kind: "half", "tf32" or "fp32". channels and size: of the map
    that the convolution reads, and the channels that it makes; batch: floor(log2(samples)).
    """

    kernel: str
    kind: str
    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    groups: int
    batch: int

    @property
    def key(self) -> str:
        """As the tables' files name it."""
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        return (
            f"{self.kernel}, {self.kind}, {self.in_channels} to {self.out_channels}, {self.height}x{self.width}, "
            f"kernel {kh}x{kw}, stride {sh}x{sw}, groups {self.groups}, batch 2^{self.batch}"
        )


def batch_class(samples: int) -> int:
    """floor(log2(samples)): batches within a factor of two share their tiles."""
    return max(samples, 1).bit_length() - 1


def slug(device: str) -> str:
    """A device's name as a file name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def read(path: Path) -> dict[str, Any]:
    """A table's content. Raises ValueError for a file that is none."""
    try:
        content = json.loads(path.read_text())
        for key, entry in content["entries"].items():
            _check_tile(key, TileConfig(**entry["tile"]))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of tiles ({error!r}): write it anew with python -m den_kernels.tune"
        ) from None
    return content


def write(content: Mapping[str, Any], path: Path) -> None:
    """A table, renamed into place, its entries sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    sorted_content = {**content, "entries": dict(sorted(content["entries"].items()))}
    part.write_text(json.dumps(sorted_content, indent=1) + "\n")
    part.replace(path)


def _check_tile(key: str, tile: TileConfig) -> None:
    blocks = (tile.block_m, tile.block_n, tile.block_k)
    if any(block < 16 or block & (block - 1) for block in blocks):
        raise ValueError(f"{key}: blocks are {blocks}; they must be powers of two of at least 16")
    if tile.num_warps not in _WARPS or tile.num_stages not in _STAGES:
        raise ValueError(f"{key}: {tile.num_warps} warps and {tile.num_stages} stages; at most 16 and 8")


def lookup(problem: Problem, device: torch.device, folder: Path = FOLDER) -> TileConfig | None:
    """The measured tile of this problem on this device, or of half or twice the batch; None where nobody measured."""
    if device.type != "cuda":
        return None
    return nearest(problem, _of_device(torch.cuda.current_device() if device.index is None else device.index, folder))


def nearest(problem: Problem, tiles: Mapping[str, TileConfig]) -> TileConfig | None:
    """The tile of this problem among `tiles` by key, or else of the class of batches below or above."""
    if not tiles:
        return None
    classes = (problem.batch, problem.batch - 1, problem.batch + 1)
    found = (tiles.get(problem._replace(batch=batch).key) for batch in classes)
    return next((tile for tile in found if tile is not None), None)


@functools.cache
def _of_device(index: int, folder: Path) -> dict[str, TileConfig]:
    path = folder / f"{slug(torch.cuda.get_device_name(index))}.json"
    if not path.exists():
        return {}
    return {key: TileConfig(**entry["tile"]) for key, entry in read(path)["entries"].items()}

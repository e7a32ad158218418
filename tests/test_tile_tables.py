"""Tables of tiles: keys, files, look-up, and what a search would try. No GPU, no compiler."""

from __future__ import annotations

import json

import pytest
import torch

import den
from den_kernels import tune
from den_kernels.backends.triton import configs, tile_tables
from den_kernels.backends.triton.tile_tables import Problem, TileConfig

PROBLEM = Problem("first-pre", "half", 64, 64, 32, 32, (3, 3), (1, 1), 1, 6)
TILE = TileConfig(128, 32, 64, 8, 3)


def entry(tile=TILE):
    return {"tile": tile._asdict(), "us": 1.0, "heuristic_us": 1.5}


def write(path, **entries):
    tile_tables.write({"device": "NVIDIA H200", "entries": entries}, path)


def test_a_key_tells_the_problem():
    assert PROBLEM.key == "first-pre, half, 64 to 64, 32x32, kernel 3x3, stride 1x1, groups 1, batch 2^6"
    assert [tile_tables.batch_class(n) for n in (1, 2, 3, 64, 127, 128)] == [0, 1, 1, 6, 6, 7]
    others = (
        PROBLEM._replace(**{field: value}) for field, value in (("stride", (2, 2)), ("groups", 4), ("kind", "tf32"))
    )
    assert len({PROBLEM.key, *(other.key for other in others)}) == 4
    assert tile_tables.slug("NVIDIA H200") == "nvidia-h200"
    assert tile_tables.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


def test_lookup_takes_the_class_of_batches_or_its_neighbour():
    other = TileConfig(64, 64, 64, 4, 4)
    tiles = {PROBLEM.key: TILE, PROBLEM._replace(batch=8).key: other}
    found = {batch: tile_tables.nearest(PROBLEM._replace(batch=batch), tiles) for batch in range(4, 11)}
    assert found == {4: None, 5: TILE, 6: TILE, 7: TILE, 8: other, 9: other, 10: None}
    assert tile_tables.nearest(PROBLEM, {}) is None


def test_lookup_reads_the_devices_own_table(tmp_path, monkeypatch):
    write(tmp_path / "nvidia-h200.json", **{PROBLEM.key: entry()})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["NVIDIA H200", "NVIDIA L4"][index])
    tile_tables._of_device.cache_clear()
    assert tile_tables.lookup(PROBLEM, torch.device("cuda", 0), tmp_path) == TILE
    assert tile_tables.lookup(PROBLEM, torch.device("cuda", 1), tmp_path) is None
    assert tile_tables.lookup(PROBLEM, torch.device("cpu"), tmp_path) is None
    tile_tables._of_device.cache_clear()


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        json.dumps({"entries": []}),
        json.dumps({"entries": {"a": {"tile": {"block_m": 16}}}}),
        json.dumps({"entries": {"a": {"tile": TILE._replace(block_m=100)._asdict()}}}),
        json.dumps({"entries": {"a": {"tile": TILE._replace(num_warps=3)._asdict()}}}),
    ],
)
def test_a_broken_table_is_named(tmp_path, broken):
    path = tmp_path / "gpu.json"
    path.write_text(broken)
    with pytest.raises(ValueError, match=r"gpu.json is no table of tiles .*python -m den_kernels.tune"):
        tile_tables.read(path)


def test_shipped_tables_can_be_read_and_say_what_was_measured():
    for path in tile_tables.FOLDER.glob("*.json"):
        content = tile_tables.read(path)
        assert path.stem == tile_tables.slug(content["device"])
        for measured in content["entries"].values():
            assert 0 < measured["us"] <= measured["heuristic_us"]
            assert {"torch", "triton", "date"} < set(measured)


@pytest.mark.parametrize("kind", ["half", "tf32", "fp32"])
def test_candidates_hold_what_the_heuristic_picks(kind):
    for samples, rows, channels in ((1, 64, 64), (256, 1024, 64), (256, 64, 256), (8, 49, 512)):
        facts = configs.Facts(kind, samples, rows, channels, channels, False, True, False, True, 132)
        tried = configs.candidates(facts)
        assert configs.choose(**facts._asdict()) in tried
        assert len(tried) == len(set(tried)) < 60
        assert all(tile.block_n <= max(16, 2 * channels) for tile in tried)
        assert tried[0] in configs.variations(tried[0], kind)


@pytest.mark.parametrize(("rows", "channels", "columns"), [(1024, 64, 64), (256, 128, 64), (64, 256, 128)])
def test_an_elastic_output_takes_the_columns_that_load_least(rows, channels, columns):
    """Over a quarter, a half and all of the channels; a dense one takes as many as there are, up to 128."""
    facts = configs.Facts("half", 256, rows, channels, channels, False, True, False, True, 132)
    assert configs.choose(**facts._asdict()).block_n == columns
    assert configs.choose(**facts._replace(elastic_out=False)._asdict()).block_n == min(channels, 128)


@pytest.mark.parametrize("name", tune.NETWORKS)
def test_the_shapes_of_a_network_are_its_blocks(name):
    with torch.device("meta"):
        model = den.create_model(name, tasks={"a": 10}, ratios=tune.RATIOS)
    size = 56 if name == "resnet_50" else 32
    blocks = []
    for block in model.estimator.blocks:
        convs = [conv for conv in (block.conv1, block.conv2, getattr(block, "conv3", None)) if conv is not None]
        blocks.append(
            tune.BlockShape(
                block.in_channels,
                convs[0].out_channels,
                block.out_channels,
                size,
                tuple(conv.kernel_size[0] for conv in convs),
                tuple(conv.stride[0] for conv in convs),
                tuple(conv.groups for conv in convs),
                getattr(block, "preactivation", False),
                getattr(block, "projection", None) is not None,
                getattr(block, "preactivation", False) and not blocks,
            )
        )
        assert blocks[-1].widths == block.widths
        size //= block.stride
    assert set(tune.NETWORKS[name]()) == set(blocks)


def test_every_shape_has_a_name_of_its_own():
    shapes = {shape for make in tune.NETWORKS.values() for shape in make()}
    assert len({shape.name for shape in shapes}) == len(shapes)
    assert tune.BlockShape(64, 64, 256, 56, (1, 3, 1), (1, 2, 1), (1, 4, 1), True, True).name == (
        "64 to 64 to 256, 56x56, kernels 1-3-1, strides 1-2-1, groups 1-4-1, pre-activation, projection"
    )

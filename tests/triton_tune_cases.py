"""Tuning, in the interpreter: its own clock and files, real kernels. Run by test_triton_interpreter.py."""

from __future__ import annotations

import json
import time

import pytest
import torch

from den_kernels import tune
from den_kernels.backends.triton import configs, tile_tables
from den_kernels.backends.triton.tile_tables import TileConfig

SHAPE = tune.BlockShape(16, 16, 16, 2, kernels=(1, 3), preactivation=True, leads=True)
CPU = torch.device("cpu")


@pytest.fixture
def _few_candidates(monkeypatch):
    tiles = [TileConfig(16, 16, k, 4, 2) for k in (16, 32)]
    monkeypatch.setattr(configs, "candidates", lambda facts: tiles)
    monkeypatch.setattr(configs, "variations", lambda tile, kind: [tile, tile._replace(num_warps=8)])


def _tune(folder, **options):
    return list(tune.tune([SHAPE], [1], torch.float32, CPU, tune.Table(folder, CPU), **options))


@pytest.mark.usefixtures("_few_candidates")
def test_a_search_is_written_and_gone_on_with(tmp_path):
    found = _tune(tmp_path)
    assert [problem.kernel for problem, _ in found] == ["first-pre", "last"]
    path = tmp_path / "interpreter.json"
    content = json.loads(path.read_text())
    assert set(content["entries"]) == {problem.key for problem, _ in found}
    for problem, outcome in found:
        entry = content["entries"][problem.key]
        assert TileConfig(**entry["tile"]) == outcome.tile
        assert 0 < entry["us"] <= entry["heuristic_us"]
        assert {"torch", "triton", "date", "heuristic"} < set(entry)
        assert outcome.tried >= 3
    assert not list(tmp_path.glob("*.part"))

    del content["entries"][found[0][0].key]
    path.write_text(json.dumps(content))
    again = _tune(tmp_path)
    assert [(problem, outcome is None) for problem, outcome in again] == [(found[0][0], False), (found[1][0], True)]
    assert all(outcome is None for _, outcome in _tune(tmp_path))


@pytest.mark.usefixtures("_few_candidates")
def test_nothing_begins_behind_the_deadline(tmp_path):
    assert _tune(tmp_path, deadline=time.monotonic()) == []
    assert not (tmp_path / "interpreter.json").exists()


@pytest.mark.usefixtures("_few_candidates")
def test_a_search_that_is_cut_keeps_its_best_and_is_made_anew(tmp_path, monkeypatch):
    now, honest = [0.0], tune._measured

    def measured(*told):
        now[0] += 1
        return honest(*told)

    monkeypatch.setattr(tune, "_measured", measured)
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    ((problem, found),) = _tune(tmp_path, deadline=0.5)
    assert (found.complete, found.tried, now) == (False, 2, [1.0])
    table = tune.Table(tmp_path, CPU)
    assert table.tile(problem) == found.tile
    assert problem not in table
    again = _tune(tmp_path)
    assert [outcome.complete for _, outcome in again] == [True, True]
    assert problem in tune.Table(tmp_path, CPU)


@pytest.mark.usefixtures("_few_candidates")
def test_a_tile_that_cannot_be_compiled_is_refused(tmp_path, monkeypatch):
    honest = tune.BlockCall.__call__

    def compiled(self):
        if any(tile.num_warps == 8 for tile in configs._search.get()[0].values()):
            raise RuntimeError("PassManager::run failed")
        return honest(self)

    monkeypatch.setattr(tune.BlockCall, "__call__", compiled)
    for _, found in _tune(tmp_path):
        assert found.refused == 1
        assert found.tried >= 2
        assert found.tile.num_warps == 4


@pytest.mark.usefixtures("_few_candidates")
def test_tiles_are_compiled_before_they_are_timed(tmp_path, monkeypatch):
    """In as many threads as there are processors, that many at a time; the interpreter has nothing to compile."""
    passes, honest = [], tune._compile
    monkeypatch.setattr(tune, "WORKERS", 2)
    monkeypatch.setattr(tune, "_compile", lambda *told: passes.append(told[2]) or honest(*told))
    tried = sum(found.tried - 1 for _, found in _tune(tmp_path))
    assert sum(map(len, passes)) == tried
    assert max(map(len, passes)) <= 2


@pytest.mark.usefixtures("_few_candidates")
def test_a_wrong_result_ends_the_search(tmp_path, monkeypatch):
    honest, calls = tune.BlockCall.__call__, []

    def broken(self):
        calls.append(1)
        return honest(self) + (0.5 if len(calls) > 2 else 0)

    monkeypatch.setattr(tune.BlockCall, "__call__", broken)
    with pytest.raises(RuntimeError, match=r"first-pre, fp32.*is off by"):
        _tune(tmp_path)
    assert not (tmp_path / "interpreter.json").exists()


@pytest.mark.usefixtures("_few_candidates")
def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tune.NETWORKS, "resnet_42", lambda: [SHAPE])
    arguments = ["--network", "resnet_42", "--batches", "1", "--dtype", "float32", "--out", str(tmp_path)]
    assert tune.main(arguments) == 0
    assert "2 entries in" in capsys.readouterr().out
    assert tune.main(arguments) == 0
    assert capsys.readouterr().out.count("in the table") == 2


def test_behind_another_block_activations_are_handed_on():
    call = tune.BlockCall(SHAPE._replace(leads=False, kernels=(3, 3)), 3, torch.float32, CPU)
    with configs.searching({}) as asked:
        call()
    assert [problem.kernel for problem in asked] == ["first-pre", "last", "first"]


def test_what_a_search_asks_for_is_what_launches_run():
    call = tune.BlockCall(SHAPE, 3, torch.float32, CPU)
    with configs.searching({}) as asked:
        expected = call()
    assert [(p.kernel, p.batch) for p in asked] == [("first-pre", 1), ("last", 1)]
    tiles = {problem: TileConfig(16, 16, 32, 4, 2) for problem in asked}
    with configs.searching(tiles) as again:
        result = call()
    assert {problem: launch.tile for problem, launch in again.items()} == tiles
    torch.testing.assert_close(result, expected)
    assert tile_tables.lookup(next(iter(asked)), CPU) is None

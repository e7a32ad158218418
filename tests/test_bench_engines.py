"""The benchmarks' engines: each gives the specification's result, and they take turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import den
from benchmarks import conditions, engines, networks, torch_engines
from benchmarks.cases import MIXES, MODELS
from benchmarks.lineup import DENSE, SUBJECTS, Opponent, Subject
from benchmarks.worker import Job, Unusable
from den.blocks import ResidualBlock
from tests.den_cases import live_in

MODEL, BATCH = "wrn_8_1", 5
OPTIONS = {"den_frozen": {"backend": "grouped"}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "x.npy"
    np.save(path, torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy())
    return str(path)


def levels() -> Tensor:
    return MIXES["uniform"].levels(BATCH, 3)


def build(function: str, images: str, level: Tensor | None = None, dtype: str = "float32", options=None):
    given = None if level is None else tuple(map(tuple, level.tolist()))
    job = Job(f"any:{function}", MODEL, dtype, images, given, options or {})
    return getattr(torch_engines, function)(job, torch.get_num_threads())


def close(found: np.ndarray, images: str, level: Tensor, tolerance: float = 1e-4) -> None:
    expected = networks.reference_logits(MODEL, torch.from_numpy(np.load(images)), level)
    engines.assert_close("engine", torch.from_numpy(found), expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("function", ["masked", "loop", "den_frozen"])
def test_elastic_engines_compute_the_levels(function: str, dtype: str, tolerance: float, images: str) -> None:
    level = levels()
    run = build(function, images, level, dtype, OPTIONS.get(function))
    for _ in range(2):
        close(run(), images, level, tolerance)


def test_the_selectors_work_leaves_the_result_alone(images: str) -> None:
    level = levels()
    given = build("den_frozen", images, level, options={"backend": "grouped"})()
    chosen = build("den_frozen", images, level, options={"backend": "grouped", "selector": True})()
    assert np.array_equal(given, chosen)


@pytest.mark.parametrize("level", [0, 2])
def test_slim_is_one_level(level: int, images: str) -> None:
    close(build("slim", images, options={"level": level})(), images, torch.full((BATCH, 3), level))


def test_eager_is_the_full_network(images: str) -> None:
    close(build("eager", images)(), images, torch.full((BATCH, 3), 3))


@pytest.mark.parametrize("preactivation", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_masked_block_is_the_block(preactivation: bool, stride: int) -> None:
    torch.manual_seed(0)
    hierarchy = den.Hierarchy((0, 0.25, 0.5, 1))
    block = ResidualBlock(8, 16, hierarchy, stride=stride, preactivation=preactivation, backend="reference")
    live_in(block).double()
    x, level_N = torch.rand(6, 8, 9, 7, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 0, 3])
    masked = torch_engines.MaskedBlock(block, level_N, 0, torch.float64)
    with torch.no_grad():
        assert torch.allclose(masked(x), block(x, level_N), atol=1e-6)


def test_a_masked_form_is_for_residual_blocks() -> None:
    with pytest.raises(Unusable, match="not Linear"):
        torch_engines.MaskedBlock(torch.nn.Linear(1, 1), torch.tensor([0]), 0, torch.float32)


def test_a_form_that_freeze_cannot_make_is_missing() -> None:
    assert SUBJECTS["float32"].missing() is None
    assert Subject("other", "float32", {"no_such": 1}).missing() == "den.freeze takes no argument no_such"
    assert Subject("float32-direct", "float32").label("cpu") == "den[cpu, direct]"


def test_an_opponent_without_its_package_is_missing() -> None:
    assert DENSE["eager"].missing() is None
    reason = Opponent("any", "any:any", packages=("torch", "no_such_package")).missing()
    assert reason == "no_such_package not installed: pip install 'den-kernels[peers]'"


def test_every_model_of_the_table_can_be_made() -> None:
    for case in MODELS:
        assert networks.network(case.name).config["ratios"] == list(case.ratios)


class Scripted:
    """An engine whose runs take a given number of seconds, and which writes down its turns."""

    def __init__(self, name: str, seconds: float, log: list[str], *, dense: bool = False):
        self.name, self.seconds, self.log, self.dense = name, seconds, log, dense

    def result(self) -> Tensor:
        self.log.append(f"{self.name} result")
        return torch.zeros(1)

    def time(self, calls: int) -> list[float]:
        self.log.append(self.name)
        return [self.seconds] * calls


class Stopwatch:
    """What `take_turns` uses of pytest-benchmark's fixture."""

    def __init__(self, enabled: bool = True):
        self.enabled, self.extra_info, self.seconds = enabled, {}, []

    def pedantic(self, target, rounds: int = 1) -> None:
        for _ in range(rounds):
            start = engines.CLOCK()
            target()
            self.seconds.append(engines.CLOCK() - start)


def test_engines_take_turns_in_a_rotating_order() -> None:
    log: list[str] = []
    lineup = [
        Scripted("den", 0.1, log),
        Scripted("den+selector", 0.12, log),
        Scripted("fast", 0.2, log, dense=True),
        Scripted("near", 0.29, log, dense=True),
        Scripted("slow", 0.31, log, dense=True),
        Scripted("masked", 0.3, log),
    ]
    watch = Stopwatch()
    measured = engines.take_turns(watch, lineup, budget_s=10, keep=["den+selector"])
    assert measured is not None
    # 5 rounds of 1.32 s leave 3.4 s for rounds of 0.71 s, in which only those that matter play.
    counts = {name: len(seconds) for name, seconds in measured.seconds.items()}
    assert counts == {"den": 9, "den+selector": 9, "fast": 9, "near": 9, "slow": 5, "masked": 5}
    turns = log[6:]  # behind the first look at each
    assert turns[:6] == ["den", "den+selector", "fast", "near", "slow", "masked"]
    assert turns[6:12] == ["den+selector", "fast", "near", "slow", "masked", "den"]
    assert turns[30:34] == ["den+selector", "fast", "near", "den"]
    assert watch.seconds == pytest.approx([0.1] * 9)
    assert watch.extra_info["median_ms"] == {e.name: round(1e3 * e.seconds, 4) for e in lineup}


def test_short_runs_come_several_to_a_turn_and_slow_machines_get_three_rounds() -> None:
    log: list[str] = []
    measured = engines.take_turns(Stopwatch(), [Scripted("den", 0.005, log), Scripted("d", 0.5, log, dense=True)], 0.1)
    assert measured is not None
    assert {name: len(seconds) for name, seconds in measured.seconds.items()} == {"den": 12, "d": 3}


def test_without_timing_the_first_engine_runs_once() -> None:
    log: list[str] = []
    assert engines.take_turns(Stopwatch(enabled=False), [Scripted("den", 1, log), Scripted("d", 1, log)], 1) is None
    assert log == ["den result"]


def test_engines_of_one_name_are_refused() -> None:
    log: list[str] = []
    with pytest.raises(ValueError, match="engines of one name"):
        engines.take_turns(Stopwatch(), [Scripted("den", 1, log), Scripted("den", 1, log)], 1)


@pytest.mark.parametrize(("error", "passes"), [(0.9e-4, True), (1.1e-4, False), (float("nan"), False)])
def test_a_wrong_result_is_not_timed(error: float, passes: bool) -> None:
    expected = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    found = expected + torch.tensor([[2 * error, 0]])
    if passes:
        engines.assert_close("e", found, expected, 1e-4)
    else:
        with pytest.raises(AssertionError, match=r"e: error .* not timed"):
            engines.assert_close("e", found, expected, 1e-4)


def test_disturbance_is_what_others_took(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 10.0, 50.0), (110.0, 14.0, 55.0)])
    monkeypatch.setattr(conditions.Disturbance, "_read", lambda self: next(readings))
    monkeypatch.setattr(conditions.os, "cpu_count", lambda: 2)
    # 10 s busy of 10 s that two processors have in 5 s; 4 of them ours.
    assert conditions.Disturbance([]).share() == pytest.approx(0.6)


def test_disturbance_reads_this_system() -> None:
    share = conditions.Disturbance([conditions.os.getpid()]).share()
    assert share is None or 0 <= share <= 1
    assert conditions.Disturbance([2**22 + 1]).share() is None  # no such process


def test_threads_that_share_a_core_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 0.010, 2: 0.008}
    monkeypatch.setattr(conditions.timeit, "repeat", lambda *args, **kwargs: [seconds[torch.get_num_threads()], 1.0])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert conditions.thread_speedup() == pytest.approx(1.25)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert conditions.thread_speedup() is None
    finally:
        torch.set_num_threads(threads)

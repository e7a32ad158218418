"""Options of the benchmarks, and the table at their end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.cases import BATCHES, MIXES, MODELS
from benchmarks.conditions import of_run
from benchmarks.lineup import DENSE, SUBJECTS, Bench
from benchmarks.table import Row, as_text, skip_shares, write_json
from benchmarks.worker import CLOCKS

_ROWS = pytest.StashKey[list[Row]]()
_MODELS = {case.name: case for case in MODELS}


def _among(what: str, known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated names."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(part for part in text.split(",") if part)
        if not set(chosen) <= set(known):
            raise argparse.ArgumentTypeError(f"{what} are among {', '.join(known)}, not {text}")
        return chosen

    return parse


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("den", "den benchmarks")

    def choice(option: str, what: str, known: Collection[str], default: Collection[str]) -> None:
        group.addoption(
            option,
            type=_among(what, known),
            default=tuple(default),
            help=f"{what}, of {','.join(known)} (default: {','.join(default)})",
        )

    sizes = [str(batch) for batch in BATCHES]
    choice("--models", "networks", _MODELS, list(_MODELS)[:1])
    choice("--subjects", "forms of the frozen DEN", SUBJECTS, SUBJECTS)
    choice("--batches", "batch sizes", sizes, sizes[:3])
    choice("--mixes", "level mixes", MIXES, MIXES)
    choice("--engines", "dense opponents", DENSE, DENSE)
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="of every engine (default: torch's)")
    group.addoption(
        "--clock", choices=CLOCKS, default="wall", help="cpu, with --threads 1: processor time, on a machine in use"
    )
    group.addoption(
        "--engine-env", action="append", default=[], metavar="NAME=VALUE", help="a variable for every engine's process"
    )
    group.addoption("--table-json", type=Path, metavar="PATH", help="write the efficiency table as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    threads = config.getoption("--threads")
    if config.getoption("--clock") == "cpu" and threads != 1:
        raise pytest.UsageError(f"--clock cpu adds up all threads: it takes --threads 1, not {threads}")
    if not all("=" in setting for setting in config.getoption("--engine-env")):
        raise pytest.UsageError(f"--engine-env takes NAME=VALUE, not {config.getoption('--engine-env')}")
    torch.set_num_threads(threads)


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """Where a benchmark leaves its row of the table."""
    return request.config.stash[_ROWS]


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> str:
    """What engines of this process measure with."""
    return request.config.getoption("--clock")


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The engines' processes."""
    option = request.config.getoption
    environment = dict(setting.split("=", 1) for setting in option("--engine-env"))
    made = Bench(tmp_path_factory.mktemp("inputs"), option("--threads"), option("--clock"), environment)
    yield made
    made.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # The first varies slowest: processes stay for a network and dtype, dense engines for a batch size.
    option = metafunc.config.getoption
    if "model" in metafunc.fixturenames:
        metafunc.parametrize("model", [_MODELS[name] for name in option("--models")], ids=lambda case: case.name)
    sizes = [int(size) for size in option("--batches")]
    if "subject" in metafunc.fixturenames:
        forms = [SUBJECTS[name] for name in option("--subjects")]
        dtypes = list(dict.fromkeys(form.dtype for form in forms))
        pairs = [(form, n) for dtype in dtypes for n in sizes for form in forms if form.dtype == dtype]
        metafunc.parametrize(("subject", "batch"), pairs, ids=[f"{form.name}-n{n}" for form, n in pairs])
    elif "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", sizes, ids=lambda n: f"n{n}")
    if "level_mix" in metafunc.fixturenames:
        metafunc.parametrize("level_mix", [MIXES[name] for name in option("--mixes")], ids=lambda mix: mix.name)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    facts = of_run(config.getoption("--threads"), config.getoption("--clock"))
    facts["engine_env"] = " ".join(config.getoption("--engine-env"))
    terminalreporter.section("efficiency")
    for line in (*as_text(rows, facts), "", *skip_shares(rows)):
        terminalreporter.write_line(line)
    for opponent in DENSE.values():
        reason = opponent.missing()
        if reason:
            terminalreporter.write_line(f"left out: {opponent.label}: {reason}")
    path = config.getoption("--table-json")
    if path:
        write_json(rows, facts, path)
        terminalreporter.write_line(f"written to {path}")

"""Options of the benchmarks, and the table at their end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cases import BATCHES
from benchmarks.networks import DENSE
from benchmarks.table import Row, as_text, write_json

_ROWS = pytest.StashKey[list[Row]]()


def _batches(text: str) -> tuple[int, ...]:
    chosen = tuple(int(part) for part in text.split(","))
    if not set(chosen) <= set(BATCHES):
        raise ValueError(f"batches are among {BATCHES}")
    return chosen


def _engines(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not set(chosen) <= set(DENSE):
        raise ValueError(f"dense engines are among {', '.join(DENSE)}")
    return chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("den", "den benchmarks")
    group.addoption("--batches", type=_batches, default=(1, 8, 64), help="batch sizes (default: 1,8,64)")
    group.addoption(
        "--engines", type=_engines, default=("eager",), help=f"dense opponents, of: {','.join(DENSE)} (default: eager)"
    )
    group.addoption("--table-json", type=Path, metavar="PATH", help="write the efficiency table as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """Where a benchmark leaves its row of the table."""
    return request.config.stash[_ROWS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", metafunc.config.getoption("--batches"), ids=lambda n: f"n{n}")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    terminalreporter.section("efficiency")
    for line in as_text(rows):
        terminalreporter.write_line(line)
    path = config.getoption("--table-json")
    if path:
        write_json(rows, path)
        terminalreporter.write_line(f"written to {path}")

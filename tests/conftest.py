"""What every test shares: threads, hypothesis settings, and no run without the extension where it is required.

DEN_REQUIRE_EXT=1 makes a missing C++ extension an error; without it, the tests that need it are skipped.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from den_kernels.backends import load

# The same examples every run; a shared machine may stop for longer than any deadline.
settings.register_profile("den", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("den")


@pytest.fixture(autouse=True)
def _restore_threads_and_isa():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    cpu = load("cpu")
    if cpu.unavailable() is None:
        cpu.set_isa(cpu.supported_isas()[0])


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the cores; each with all of them waits for the others at every parallel loop.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.environ.get("DEN_REQUIRE_EXT", "0") != "1":
        return
    reason = load("cpu").unavailable()
    if reason:
        raise pytest.UsageError(f"DEN_REQUIRE_EXT is 1, but the cpu backend cannot be used: {reason}")

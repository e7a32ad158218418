"""How a backend is chosen: one warning for a fallback, an error for a name that cannot be had, a diagnosis."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import den_kernels as dk
from den_kernels import backends

CPU = torch.device("cpu")


@pytest.fixture
def broken_extension(monkeypatch):
    """A machine on which the C++ extension is not built."""
    missing = SimpleNamespace(
        NAME="cpu",
        unavailable=lambda: "the extension is not built; do this and that",
        rejects=lambda device, dtype: None,
    )
    real = backends.load
    monkeypatch.setattr(backends, "load", lambda name: missing if name == "cpu" else real(name))
    backends._fastest.cache_clear()
    yield
    backends._fastest.cache_clear()


def test_auto_falls_back_with_one_warning(broken_extension) -> None:
    x, weight, width = torch.zeros(2, 4, 5, 5), torch.zeros(4, 4, 3, 3), torch.tensor([2, 4])
    with pytest.warns(RuntimeWarning, match="do this and that"):
        dk.den_conv2d(x, weight, None, None, width)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.den_conv2d(x, weight, None, None, width)


def test_double_runs_in_plain_pytorch_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", CPU, torch.float64).NAME == "grouped"


def test_explicit_backend_raises(broken_extension) -> None:
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot be used here: the extension is not built"):
        backends.resolve("cpu", CPU, torch.float32)
    with pytest.raises(ValueError, match="backend is 'cudnn'; it must be one of 'auto'"):
        backends.resolve("cudnn", CPU, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_triton_without_a_gpu_says_so() -> None:
    with pytest.raises(RuntimeError, match="backend 'triton' cannot be used here"):
        backends.resolve("triton", CPU, torch.float32)


def test_available_backends_start_with_the_specification() -> None:
    assert dk.available_backends()[:2] == ("reference", "grouped")


def test_diagnosis_names_every_backend() -> None:
    run = subprocess.run([sys.executable, "-m", "den_kernels"], capture_output=True, text=True, check=True)
    for name in ("triton", "cpu", "grouped", "reference"):
        assert name in run.stdout


def test_import_loads_no_backend() -> None:
    lazy = ("den_kernels._cpu", "den_kernels.backends.cpu", "den_kernels.backends.triton")
    code = f"import sys, den_kernels; print([m for m in {lazy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

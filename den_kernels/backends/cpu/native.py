"""The C++ extension: loading it, or saying why it cannot be; the dtypes and instruction sets of its kernels."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch  # before the extension: torch brings the OpenMP library that both must share
from torch import Tensor


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, or why there is none."""
    try:
        return importlib.import_module("den_kernels._cpu"), None
    except ModuleNotFoundError:
        return None, (
            "the C++ extension den_kernels._cpu is not built: install a C++ compiler (e.g. apt install g++) and "
            "run `pip install -e .` (or `pip install --force-reinstall --no-deps den-kernels`) again"
        )
    except ImportError as error:
        return None, (
            f"the C++ extension den_kernels._cpu cannot be loaded ({error}): rebuild it on this machine with "
            "`pip install -e .`"
        )


def unavailable() -> str | None:
    """None when the extension can be used, else the reason and the fix in one sentence."""
    return _load()[1]


def extension() -> ModuleType:
    """The extension. Raises RuntimeError where there is none."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {reason}")
    return module


def address(tensor: Tensor | None) -> int:
    """Where a tensor's first element lies, as the extension takes it; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


# By the names that the extension knows them by.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def set_isa(name: str) -> str:
    """Run the kernels of instruction set `name` from now on; returns the name of those used before.

    For tests and measurements: the best set is chosen when the extension is loaded. Raises ValueError when this machine
    cannot run it.
    """
    return extension().set_isa(name)


def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this machine runs, best first."""
    return tuple(extension().supported_isas())

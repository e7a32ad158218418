"""The backends, and how one is chosen.

A backend is a module with

    NAME                                what a caller names it by
    unavailable() -> str | None         None when usable on this machine, else the reason and the fix
    rejects(device, dtype) -> str|None  None when it takes such tensors, else why not
    conv2d, conv2d_backward     the work of the primitive, on checked arguments
    fused_conv2d, residual_block, residual_chain    that of the inference forms
    TILE_BOUNDS                         descending; the class of a batch: how many its 4 x 4 tiles of outputs are below
                                        (at least one of them, where a map is no larger than 2 x 2)
    pack_weights                        copies of weights as the layers read them, a form for each class of batch
                                        (dense_input: no shortcut, and every sample reads all input channels)
    gather                              packed weights moved to where a chain reads them best
    ENDS_IN_CHAIN                       whether a network's first convolution, linear layer and plan are faster in its
                                        chain than as operators of their own

and, where it has its own: conv2d_add; batch_norm and batch_norm_backward; plan_levels ("triton" and "cpu");
bind_chain, a residual_chain for batches of one shape that is called without an operator ("cpu").

Nothing heavy is imported until a backend is asked for.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

# Fastest first: "auto" takes the first that is usable and takes the tensors.
_MODULES = {
    "triton": "den_kernels.backends.triton",
    "cpu": "den_kernels.backends.cpu",
    "grouped": "den_kernels.backends.grouped",
    "reference": "den_kernels.backends.reference",
}
NAMES = ("auto", *_MODULES)


@functools.cache
def load(name: str) -> ModuleType:
    """The backend's module, by name."""
    return importlib.import_module(_MODULES[name])


def available_backends() -> tuple[str, ...]:
    """Names of the backends usable on this machine, the specification first: e.g. ("reference", "grouped", "cpu")."""
    return tuple(name for name in reversed(_MODULES) if load(name).unavailable() is None)


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend called `name` for tensors on `device` of `dtype`; for "auto", the fastest that takes them.

    "auto" warns once when the kernels made for the device cannot be used. Raises ValueError for an unknown name and
    RuntimeError when a backend asked for by name is missing or does not take such tensors.
    """
    if name == "auto":
        return _fastest(device.type, dtype)
    if name not in _MODULES:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(map(repr, NAMES))}")
    backend = load(name)
    reason = backend.unavailable() or backend.rejects(device, dtype)
    if reason:
        raise RuntimeError(f"backend {name!r} cannot be used here: {reason}")
    return backend


@functools.cache
def _fastest(device_type: str, dtype: torch.dtype) -> ModuleType:
    device = torch.device(device_type)
    native = load("triton" if device_type == "cuda" else "cpu")
    for name in _MODULES:
        backend = load(name)
        if backend.unavailable() is None and backend.rejects(device, dtype) is None:
            break
    reason = native.unavailable() or native.rejects(device, dtype)
    # float64 is for checking numbers, not for speed: plain PyTorch is what is meant to run it.
    if device_type in ("cuda", "cpu") and reason and dtype != torch.float64:
        warnings.warn(
            f"den_kernels: using the {backend.NAME!r} backend for {dtype} on {device_type}, because the "
            f"{native.NAME!r} backend cannot be used: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return backend

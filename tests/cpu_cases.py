"""What the tests of the C++ kernels share. Importing it skips the tests where the extension cannot be used.

N samples, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from den_kernels.backends import cpu

if os.environ.get("DEN_REQUIRE_EXT") != "1" and cpu.unavailable() is not None:
    pytest.skip(f"cpu backend: {cpu.unavailable()}", allow_module_level=True)

NAN = float("nan")
isas = pytest.mark.parametrize("isa", cpu.supported_isas())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@contextmanager
def outputs_start_as_nan() -> Iterator[None]:
    """What the backend allocates holds NaN until a kernel writes it."""
    empty = torch.empty
    cpu.torch.empty = lambda *args, **options: empty(*args, **options).fill_(NAN)
    try:
        yield
    finally:
        cpu.torch.empty = empty


def channels_beyond(x: Tensor, width: Tensor | None) -> list[Tensor]:
    """For each sample its channels beyond its width, which no kernel reads: views of x."""
    return [] if width is None else [x[n, w:] for n, w in enumerate(width.tolist())]


def poison(x: Tensor, width: Tensor | None) -> Tensor:
    """x, with NaN in the channels beyond each sample's width."""
    for beyond in channels_beyond(x, width):
        beyond.fill_(NAN)
    return x


def widths(draw, channels: int, step: int, samples: int) -> Tensor | None:
    """Widths of whole steps: none, any, or of a few levels."""
    most = channels // step
    some = st.one_of(st.integers(0, most), st.sampled_from([0, most // 4, most // 2, most]))
    drawn = draw(st.one_of(st.none(), st.lists(some, min_size=samples, max_size=samples)))
    return None if drawn is None else torch.tensor([step * w for w in drawn])


@st.composite
def convolutions(draw):
    """Any geometry."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    group_in = draw(st.sampled_from([1, 3, 4, 8, 11, 16, 24, 40]))
    group_out = draw(st.sampled_from([1, 2, 5, 8, 12, 16, 20, 32, 48, 64, 72]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (2, 3), (5, 1), (7, 7)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 1), (1, 2)]))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    least = [max(1, dilation[d] * (kernel[d] - 1) + 1 - 2 * padding[d]) for d in (0, 1)]
    samples = draw(st.integers(1, 7))
    return {
        "shape": (samples, groups * group_in, *(size + draw(st.integers(0, 17)) for size in least)),
        "weight": (groups * group_out, group_in, *kernel),
        "in_width": widths(draw, groups * group_in, group_in if groups > 1 else 1, samples),
        "out_width": widths(draw, groups * group_out, group_out if groups > 1 else 1, samples),
        "geometry": (stride, padding, dilation, groups),
        "seed": draw(st.integers(0, 1000)),
    }


class _Names:
    """What is called in a mode, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def call(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Recorder(_Names, torch.utils._python_dispatch.TorchDispatchMode):
    """The operators that run in it."""

    __torch_dispatch__ = _Names.call


class FunctionRecorder(_Names, torch.overrides.TorchFunctionMode):
    """The functions that are called in it."""

    __torch_function__ = _Names.call

"""Who takes part: the forms of the frozen DEN, its opponents, and the processes that they live in.

N samples, B blocks.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import den
from benchmarks.cases import TOLERANCE, WINOGRAD_TOLERANCE, ModelCase
from benchmarks.engines import InWorker
from benchmarks.networks import images, network, write_onnx
from benchmarks.worker import Job, Worker
from den.dense import dense


@dataclass(frozen=True)
class Subject:
    """A form of the frozen DEN. freeze: arguments of `den.freeze` besides dtype and backend."""

    name: str
    dtype: str
    freeze: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """What the table adds to the backend's name."""
        return self.name.partition("-")[2]

    def label(self, backend: str) -> str:
        return f"den[{backend}, {self.variant}]" if self.variant else f"den[{backend}]"

    def missing(self) -> str | None:
        """Why `den.freeze` cannot make it; None when it can."""
        unknown = set(self.freeze) - set(inspect.signature(den.freeze).parameters)
        return f"den.freeze takes no argument {', '.join(sorted(unknown))}" if unknown else None

    @property
    def tolerance(self) -> float:
        """Largest error over largest value; Winograd's transforms cost a digit."""
        if self.dtype == "float32" and "winograd" in inspect.signature(den.freeze).parameters:
            return WINOGRAD_TOLERANCE if self.freeze.get("winograd", True) else TOLERANCE[torch.float32]
        return TOLERANCE[getattr(torch, self.dtype)]


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("float32", "float32"),
        Subject("float32-direct", "float32", {"winograd": False}),
        Subject("bfloat16", "bfloat16"),
        Subject("bfloat16-direct", "bfloat16", {"winograd": False}),
    )
}


@dataclass(frozen=True)
class Opponent:
    """A dense engine. packages: what must be installed for it besides torch."""

    label: str
    build: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    packages: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why it cannot run here, None when it can."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed: pip install 'den-kernels[peers]'" if absent else None


_TORCH, _RUNTIMES = "benchmarks.torch_engines", "benchmarks.runtime_engines"

# The dense opponents, by the name that --engines takes. ONNX Runtime has no bfloat16 convolution for CPUs.
DENSE = {
    "eager": Opponent("torch eager", f"{_TORCH}:eager"),
    "compile": Opponent("torch.compile", f"{_TORCH}:compiled"),
    "onnxruntime": Opponent("ONNX Runtime", f"{_RUNTIMES}:onnxruntime", ("float32",), ("onnx", "onnxruntime")),
    "openvino": Opponent("OpenVINO", f"{_RUNTIMES}:openvino", packages=("onnx", "openvino")),
    "openvino-streams": Opponent("OpenVINO streams", f"{_RUNTIMES}:openvino_streams", packages=("onnx", "openvino")),
}


class Bench:
    """The engines of one model and dtype, each in a process that stays for all their cases, and their input files.

    folder: of the files. threads, clock, environment: of every process; see `Worker`.
    """

    def __init__(
        self, folder: Path, threads: int, clock: str = "wall", environment: Mapping[str, str] | None = None
    ) -> None:
        self._start = functools.partial(Worker, threads, clock, environment)
        self._folder = folder
        self._family: tuple[str, str] | None = None
        self._workers: dict[str, Worker] = {}

    def dense(self, opponent: Opponent, case: ModelCase, dtype: str, batch: int) -> InWorker:
        """A dense opponent. Raises `Unusable` where it cannot run such a case."""
        options = {"onnx": self._onnx(case)} if opponent.build.startswith(_RUNTIMES) else {}
        return self._engine(opponent.label, opponent.build, case, dtype, batch, None, options, dense=True)

    def den(
        self, subject: Subject, case: ModelCase, level_NB: Tensor, backend: str, *, selector: bool = False
    ) -> InWorker:
        """The frozen DEN at given levels; with the selector's work in front, whose choice is then set aside."""
        label = subject.label(backend) + ("+selector" if selector else "")
        options = {"backend": backend, "freeze": dict(subject.freeze), "selector": selector}
        return self._engine(label, f"{_TORCH}:den_frozen", case, subject.dtype, len(level_NB), level_NB, options)

    def masked(self, case: ModelCase, dtype: str, level_NB: Tensor) -> InWorker:
        """Every convolution in full, times a mask."""
        return self._engine("masked dense", f"{_TORCH}:masked", case, dtype, len(level_NB), level_NB)

    def loop(self, case: ModelCase, dtype: str, level_NB: Tensor) -> InWorker:
        """An image at a time over sliced weights."""
        return self._engine("batch-1 loop", f"{_TORCH}:loop", case, dtype, len(level_NB), level_NB)

    def slim(self, case: ModelCase, dtype: str, batch: int, level: int) -> InWorker:
        """A static network of one level's widths."""
        label = f"static slim {case.ratios[level]:g}"
        return self._engine(label, f"{_TORCH}:slim", case, dtype, batch, None, {"level": level})

    def _engine(
        self,
        label: str,
        build: str,
        case: ModelCase,
        dtype: str,
        batch: int,
        level_NB: Tensor | None,
        options: Mapping[str, Any] | None = None,
        dense: bool = False,
    ) -> InWorker:
        if self._family != (case.name, dtype):
            self.close()
            self._family = case.name, dtype
        level = None if level_NB is None else tuple(map(tuple, level_NB.tolist()))
        job = Job(build, case.name, dtype, self._images(case, batch), level, options or {})
        if label not in self._workers:
            self._workers[label] = self._start()
        return InWorker(label, self._workers[label], job, dense=dense)

    def _images(self, case: ModelCase, batch: int) -> str:
        path = self._folder / f"{case.name}-n{batch}.npy"
        if not path.exists():
            np.save(path, images(case, batch).contiguous().numpy())
        return str(path)

    def _onnx(self, case: ModelCase) -> str:
        path = self._folder / f"{case.name}.onnx"
        if not path.exists():
            write_onnx(dense(network(case.name)), images(case, 2), path)
        return str(path)

    def close(self) -> None:
        """End the processes."""
        while self._workers:
            self._workers.popitem()[1].close()

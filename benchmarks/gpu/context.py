"""What every stage of a GPU run is given: device, scale, clock and results; how its cases are gone through, and how an
engine runs and is timed there.

A dry run has the same stages on tiny shapes, the kernels in Triton's interpreter on CPU tensors, timed by the clock.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import BLOCKS, MODELS, BlockCase, ModelCase
from benchmarks.gpu.results import Results
from benchmarks.networks import SMALLEST
from benchmarks.table import Time
from den.cuda_graph import captured
from den_kernels.backends.triton import launch

ROUNDS = 3
WARM_RUNS = 30
# What stands for a case while it runs, and is left where its process ends under it, the first time and the second.
ENDED, ENDED_AGAIN = {"failed": "its process ended"}, {"failed": "its process ended, twice"}


@dataclass
class Context:
    """results: where findings go. deadline: of `time.monotonic`, after which a stage begins nothing new."""

    device: torch.device
    dry: bool
    results: Results
    deadline: float

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, whose products the interpreter gets wrong: float32 in a dry run."""
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def models(self) -> tuple[ModelCase, ...]:
        return (ModelCase(SMALLEST, 8, (1,)),) if self.dry else MODELS

    @property
    def blocks(self) -> tuple[BlockCase, ...]:
        return (BlockCase("wrn-16@4", (16, 16, 16), 4),) if self.dry else BLOCKS

    def left(self) -> float:
        """Seconds that the stage still has."""
        return self.deadline - time.monotonic()

    def out_of_time(self, needed: float = 0.0) -> bool:
        """Whether a piece of work of these seconds would end too late."""
        return self.left() < needed

    def synchronize(self) -> None:
        """Wait for the GPU. Raises RuntimeError where an earlier error has cost this process its use of the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def each(
        self, stage: str, cases: Mapping[str, Callable[[], dict[str, Any] | None]], seconds: Callable[[str], float]
    ) -> bool:
        """Keep, by key, what each case finds that has no finding yet. Whether nothing is left.

        A case that fails, as of a kernel that cannot be compiled or an illegal access, is kept as {"failed": why} and
        not met again, so that it costs the others nothing. One that its process ended under, which can be for want of
        time alone, is tried once more, behind the others. A case returns None where time ran out on it.

        seconds: that a case needs; where they are not left, nothing more begins.

        Raises RuntimeError where a case has cost this process its use of the GPU: the rest needs another process.
        """
        found = self.results.stage(stage)
        fresh = [key for key in cases if key not in found]
        again = [key for key in cases if found.get(key) == ENDED]
        for key in fresh + again:
            if self.out_of_time(seconds(key)):
                return False
            self.results.put(stage, key, ENDED_AGAIN if key in again else ENDED)
            try:
                finding = cases[key]()
            except torch.cuda.OutOfMemoryError:
                finding = {"left_out": "out of memory"}
                torch.cuda.empty_cache()
            except Exception as error:
                traceback.print_exc()
                finding = {"failed": repr(error)[:500]}
            if finding is None:
                self.results.forget(stage, key)
                return False
            self.results.put(stage, key, finding)
            self.synchronize()
        return True


def compile_kernels(work: Callable[[], object]) -> None:
    """Compile, in parallel, every Triton kernel of ours that `work` launches: its results are garbage."""
    with launch.compiling(os.cpu_count() or 1):
        work()


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Within, cuDNN computes float32 convolutions in float32, not in TF32 of three digits, its default; and times no
    algorithms, which takes longer than a check."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = False, False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


class OnDevice:
    """An engine: a function of no arguments, replayed as a CUDA graph where it can be.

    dense: whether it always does the full network's work. graph: False for what waits for the GPU, or brings its own.
    Raises RuntimeError where `run` cannot be captured.
    """

    def __init__(
        self, name: str, run: Callable[[], Tensor], context: Context, *, dense: bool = False, graph: bool = True
    ):
        self.name, self.dense = name, dense
        self.context = context
        self._output: Tensor | None = None
        self._run: Callable[[], object] = run
        if graph and context.device.type == "cuda":
            with torch.inference_mode(False), torch.no_grad():
                self._run, outputs = captured(lambda: (run(),), context.device)
            self._output = outputs[0]

    @torch.no_grad()
    def result(self) -> Tensor:
        """The output of one run, on the CPU."""
        found = self._run()
        output = self._output if self._output is not None else found
        if not isinstance(output, Tensor):
            raise TypeError(f"{self.name} made {type(output).__name__}, not a tensor")
        return output.detach().float().cpu()

    @torch.no_grad()
    def seconds(self, cold: bool, rep_ms: float) -> list[float]:
        """Of each of some runs; cold: with the L2 cache emptied before each."""
        return seconds(self._run, self.context, cold, rep_ms)


def seconds(run: Callable[[], object], context: Context, cold: bool, rep_ms: float) -> list[float]:
    """Seconds of each of some runs; see `OnDevice.seconds`."""
    if context.device.type != "cuda":
        start = time.perf_counter()
        run()
        return [time.perf_counter() - start]
    if cold:
        from triton.testing import do_bench

        return [1e-3 * ms for ms in do_bench(run, warmup=10, rep=rep_ms, return_mode="all")]
    run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(WARM_RUNS)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(context.device)
    return [1e-3 * begin.elapsed_time(end) for begin, end in events]


def take_turns(engines: list[OnDevice], context: Context, cold: bool, rep_ms: float = 40.0) -> dict[str, Time]:
    """Median times of the engines, in rounds, so that a clock that drifts drifts for all of them."""
    samples: dict[str, list[float]] = {engine.name: [] for engine in engines}
    if len(samples) != len(engines):
        raise ValueError(f"engines of one name: {[engine.name for engine in engines]}")
    for number in range(1 if context.dry else ROUNDS):
        shift = number % len(engines)
        for engine in (*engines[shift:], *engines[:shift]):
            samples[engine.name] += engine.seconds(cold, rep_ms)
    return {name: Time.of(values) for name, values in samples.items()}

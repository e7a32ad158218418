"""Whole networks: the frozen DEN, its selector included, against dense engines and the other ways to run a DEN.

Everything that can be is one CUDA graph. Results are compared with the float64 specification before anything is timed.

N samples, B blocks.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import den
from benchmarks import networks, torch_engines
from benchmarks.cases import FULL, MIXES, PAPER, SKIP, TOLERANCE, TOP1, UNIFORM, Mix, ModelCase
from benchmarks.gpu.context import Context, OnDevice, take_turns
from benchmarks.table import SELECTOR, Row
from benchmarks.worker import Unusable
from den.dense import dense

DEN = "den[triton]"
BATCHES = (1, 8, 32, 64, 256, 1024)
# Seconds that a row takes at least: captures, the reference, the clock.
ROW_S = 5.0
COMPILE_S = 60.0  # and torch.compile, once for a batch size


class Case(NamedTuple):
    """A row of the matrix. stage: which opponents take part; see `Bench.makers`."""

    model: ModelCase
    batch: int
    mix: Mix
    stage: str

    @property
    def key(self) -> str:
        return f"{self.model.name}@{self.model.image_size}, batch {self.batch}, {self.mix.name}"


def cases(context: Context, stage: str) -> Iterator[Case]:
    """The most telling first, so that a run that is cut is worth most."""
    first, *others = context.models
    if context.dry:
        yield Case(first, 1, TOP1, stage)
        return
    if stage == "peers":
        for batch, mix in ((256, UNIFORM), (64, PAPER), (1, UNIFORM), (64, UNIFORM), (256, PAPER)):
            yield Case(first, batch, mix, stage)
        return
    if stage == "compiled":  # compiled once for a batch size
        for batch in (256, 64, 1, 8):
            yield from (Case(first, batch, mix, stage) for mix in (PAPER, UNIFORM, FULL))
        return
    headline = [(256, PAPER), (64, PAPER), (1, PAPER), (256, UNIFORM), (64, UNIFORM), (256, FULL), (1, FULL)]
    headline += [(1024, PAPER), (8, PAPER), (32, PAPER), (64, FULL), (1024, FULL), (256, SKIP)]
    yield from (Case(first, batch, mix, stage) for batch, mix in headline)
    for model in others:
        for batch in (64, 8, 1) if model.image_size > 32 else (256, 64, 1):
            yield from (Case(model, batch, mix, stage) for mix in (PAPER, UNIFORM, FULL))
    yield from (Case(first, batch, mix, stage) for batch in BATCHES for mix in MIXES.values())


def run_headline(context: Context) -> bool:
    """The DEN and cuDNN, both in CUDA graphs. Whether nothing is left."""
    return _run(context, "matrix")


def run_compiled(context: Context) -> bool:
    """The same and torch.compile's best."""
    return _run(context, "compiled")


def run_peers(context: Context) -> bool:
    """The same and masked dense, bucketing by level and a static slim network."""
    return _run(context, "peers")


def _run(context: Context, stage: str) -> bool:
    torch.backends.cudnn.benchmark = True
    compiled: set[int] = set()
    for case in dict.fromkeys(cases(context, stage)):
        if case.key in context.results.stage(stage):
            continue
        first_of_batch = stage == "compiled" and case.batch not in compiled
        if context.out_of_time(COMPILE_S if first_of_batch and not context.dry else ROW_S):
            return False
        compiled.add(case.batch)
        try:
            found = measure(case, context)
        except torch.cuda.OutOfMemoryError:
            found = {"left_out": "out of memory"}
            torch.cuda.empty_cache()
        context.results.put(stage, case.key, found)
    return True


def measure(case: Case, context: Context) -> dict:
    """The rows of a case, with cold and with warm caches, and which engines were left out and why.

    An engine whose result is wrong is not timed.
    """
    bench = Bench(case, context)
    engines, left_out, wrong = [], {}, {}
    for make in bench.makers():
        try:
            engine = make()
        except torch.cuda.OutOfMemoryError:
            raise
        except (Unusable, RuntimeError) as reason:
            left_out[make.__name__] = str(reason)[:500]
            continue
        error = bench.error(engine)
        if error <= TOLERANCE[context.dtype]:
            engines.append(engine)
        else:
            wrong[engine.name] = error
    rest = {"left_out": left_out, "wrong": wrong}
    names = {engine.name for engine in engines}
    if DEN not in names or not any(engine.dense for engine in engines):
        return rest
    rows = {}
    for cold in (True,) if context.dry else (True, False):
        times = take_turns(engines, context, cold)
        rows["cold" if cold else "warm"] = Row(
            group="network, cold L2" if cold else "network, warm L2",
            case=f"{case.model.name}@{case.model.image_size}",
            den=DEN,
            dtype=str(context.dtype).removeprefix("torch."),
            batch=case.batch,
            mix=case.mix.name,
            flop_ratio=bench.flop_ratio,
            times=times,
            dense=[engine.name for engine in engines if engine.dense],
        ).asdict()
    return {**rows, **rest}


@functools.cache
def _network(name: str, device: torch.device) -> den.DEN:
    return copy.deepcopy(networks.network(name)).to(device)


@functools.cache
def _frozen(name: str, device: torch.device, dtype: torch.dtype, backend: str) -> den.FrozenDEN:
    """The product's inference form; every fused block of it is found to run on the backend that was asked for."""
    fast = den.freeze(_network(name, device), dtype=dtype, backend=backend)
    ran = {block.backend for part in (fast, fast.selector) for block in part.blocks}  # type: ignore[union-attr]
    if ran != {backend}:
        raise RuntimeError(f"asked for backend {backend!r}, but the blocks run on {ran}")
    return fast


@functools.cache
def _compiled(name: str, device: torch.device, dtype: torch.dtype, batch: int) -> nn.Module:
    """torch.compile's best for one batch size: mode="max-autotune", with frozen weights."""
    import torch._inductor.config as inductor

    torch.compiler.reset()
    inductor.freezing = True
    net = torch.compile(dense(_network(name, device), dtype=dtype), mode="max-autotune", dynamic=False)
    return net  # type: ignore[return-value]


class Bench:
    """The engines of a case, and what their results must be."""

    def __init__(self, case: Case, context: Context):
        self.case, self.context = case, context
        self.name, self.device, self.dtype = case.model.name, context.device, context.dtype
        self.net = networks.network(self.name)
        self.cpu_level_NB = case.mix.levels(case.batch, self.net.num_blocks, case.model.ratios)
        self.level_NB = self.cpu_level_NB.to(self.device)
        self.x = networks.images(case.model, case.batch).to(self.device, self.dtype)
        self.x = self.x.contiguous(memory_format=torch.channels_last)
        cost = den.flops(self.net, self.cpu_level_NB, case.model.image_size).double().mean()
        full = den.flops(self.net, [self.net.num_levels - 1] * self.net.num_blocks, case.model.image_size)
        self.flop_ratio = float(full / cost)
        self.rows = networks.checked_rows(case.batch)
        self._known: dict[int | None, Tensor] = {}

    def makers(self) -> list[Callable[[], OnDevice]]:
        """Of each engine, the fastest to make first."""
        more = {"compiled": [self.compiled], "peers": [self.masked, self.bucketed, self.slim]}
        own = [self.den, self.den_selector, self.cudnn]
        if self.context.dry and self.case.stage in more:
            own.remove(self.den_selector)  # an interpreter takes seconds for a network
        return [*own, *more.get(self.case.stage, [])]

    def den(self) -> OnDevice:
        fast = _frozen(self.name, self.device, self.dtype, "triton")
        return OnDevice(DEN, lambda: fast(self.x, level=self.level_NB).logits, self.context)

    def den_selector(self) -> OnDevice:
        """The selector's work is done in front; its choice is set aside for the levels under test."""
        fast = _frozen(self.name, self.device, self.dtype, "triton")

        def run() -> Tensor:
            chosen = fast.selector(self.x).float().softmax(2).argmax(2)
            # Part of the graph's result, or nothing would say that it ran.
            return fast(self.x, level=torch.where(chosen < 0, chosen, self.level_NB)).logits

        return OnDevice(DEN + SELECTOR, run, self.context)

    def cudnn(self) -> OnDevice:
        net = dense(_network(self.name, self.device), dtype=self.dtype)
        return OnDevice("dense, eager in a graph", lambda: net(self.x), self.context, dense=True)

    def compiled(self) -> OnDevice:
        if self.context.dry:
            raise Unusable("no compiler in a dry run")
        net = _compiled(self.name, self.device, self.dtype, self.case.batch)
        for _ in range(3):
            net(self.x)
        return OnDevice("torch.compile max-autotune", lambda: net(self.x), self.context, dense=True, graph=False)

    def masked(self) -> OnDevice:
        model = _network(self.name, self.device)
        net = dense(model, dtype=self.dtype)
        net.blocks = nn.ModuleList(
            torch_engines.MaskedBlock(block, self.level_NB[:, b], net.set_index, self.dtype)
            for b, block in enumerate(model.estimator.blocks)
        )
        return OnDevice("masked dense", lambda: net(self.x), self.context)

    def bucketed(self) -> OnDevice:
        """Plain PyTorch, a gather, a convolution and a scatter for each level: it waits for the GPU at every block."""
        fast = _frozen(self.name, self.device, self.dtype, "grouped")
        return OnDevice("den[grouped]", lambda: fast(self.x, level=self.level_NB).logits, self.context, graph=False)

    def slim(self) -> OnDevice:
        model = _network(self.name, self.device)
        half = self.case.model.half
        net = dense(model, level=[half] * model.num_blocks, dtype=self.dtype)
        return OnDevice(f"static slim {self.case.model.ratios[half]:g}", lambda: net(self.x), self.context)

    def error(self, engine: OnDevice) -> float:
        """Largest error of an engine's logits over the largest logit, against the specification in float64."""
        top, half = self.net.num_levels - 1, self.case.model.half
        level = top if engine.dense else half if engine.name.startswith("static slim") else None
        wanted = self._expected(level)
        error = (engine.result()[self.rows].double() - wanted).abs().max() / wanted.abs().max()
        return float(error.nan_to_num(float("inf")))

    def _expected(self, level: int | None) -> Tensor:
        """Logits of the checked samples, at one level or at their own."""
        if level not in self._known:
            images = networks.images(self.case.model, self.case.batch)[self.rows]
            own = self.cpu_level_NB[self.rows]
            levels = own if level is None else torch.full_like(own, level)
            self._known[level] = networks.reference_logits(self.name, images, levels)
        return self._known[level]

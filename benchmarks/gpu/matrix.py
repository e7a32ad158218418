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
import den_kernels as dk
from benchmarks import networks, torch_engines
from benchmarks.cases import FULL, MIXES, PAPER, SKIP, TOLERANCE, TOP1, UNIFORM, Mix, ModelCase
from benchmarks.gpu import cudnn_fused
from benchmarks.gpu.context import Context, OnDevice, compile_kernels, take_turns
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
    """The DEN and cuDNN's two dense forms, all in CUDA graphs. Whether nothing is left."""
    return _run(context, "matrix")


def run_compiled(context: Context) -> bool:
    """The same and torch.compile's best."""
    return _run(context, "compiled")


def run_peers(context: Context) -> bool:
    """The same and masked dense, bucketing by level and a static slim network."""
    return _run(context, "peers")


def _run(context: Context, stage: str) -> bool:
    torch.backends.cudnn.benchmark = True
    wanted = {case.key: case for case in cases(context, stage)}
    compiled: set[int] = set()

    def work(case: Case) -> dict:
        compiled.add(case.batch)
        return measure(case, context)

    def seconds(key: str) -> float:
        first_of_batch = stage == "compiled" and wanted[key].batch not in compiled
        return COMPILE_S if first_of_batch and not context.dry else ROW_S

    return context.each(stage, {key: functools.partial(work, case) for key, case in wanted.items()}, seconds)


def measure(case: Case, context: Context) -> dict:
    """The rows of a case, with cold and with warm caches, and which opponents were left out and why.

    An engine whose result is wrong is not timed. notes: what is to be known of an engine's figures.
    """
    bench = Bench(case, context)
    bench.compile_kernels()
    made = [make() for make in bench.subjects()]  # where these cannot run, that is the finding
    left_out, wrong = {}, {}
    for make in bench.opponents():
        try:
            made.append(make())
        except torch.cuda.OutOfMemoryError:
            raise
        except (Unusable, RuntimeError) as reason:
            context.synchronize()
            left_out[make.__name__] = str(reason)[:500]
    engines = []
    for engine in made:
        error = bench.error(engine)
        if error <= TOLERANCE[context.dtype]:
            engines.append(engine)
        else:
            wrong[engine.name] = error
    rest = {"left_out": left_out, "wrong": wrong, "notes": bench.notes}
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
    torch_engines.check_backend(fast, backend)
    return fast


@functools.cache
def _compiled(name: str, device: torch.device, dtype: torch.dtype, batch: int, mode: str) -> nn.Module:
    """torch.compile with frozen weights, for one batch size."""
    import torch._inductor.config as inductor

    torch.compiler.reset()
    inductor.freezing = True
    net = torch.compile(dense(_network(name, device), dtype=dtype), mode=mode, dynamic=False)
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
        self.notes: dict[str, str] = {}

    def subjects(self) -> list[Callable[[], OnDevice]]:
        """The forms of the DEN."""
        # An interpreter takes seconds for a network.
        slow = self.context.dry and self.case.stage != "matrix"
        return [self.den] if slow else [self.den, self.den_selector]

    def opponents(self) -> list[Callable[[], OnDevice]]:
        """The fastest to make first."""
        more = {"compiled": [self.compiled], "peers": [self.masked, self.bucketed, self.slim]}
        return [self.cudnn, self.cudnn_fused, *more.get(self.case.stage, [])]

    def compile_kernels(self) -> None:
        """What `subjects` launch, in parallel."""
        fast = _frozen(self.name, self.device, self.dtype, "triton")
        # One that looks up widths by the plan's levels, which this pass leaves undefined, would read out of bounds.
        if not any(isinstance(module, dk.FusedConv2d) for module in fast.modules()):
            compile_kernels(lambda: (fast.selector(self.x), fast(self.x, level=self.level_NB)))

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

    def cudnn_fused(self) -> OnDevice:
        if self.context.device.type != "cuda":
            raise Unusable("cuDNN is for NVIDIA GPUs alone")
        net = cudnn_fused.fuse(dense(_network(self.name, self.device), dtype=self.dtype))
        return OnDevice("dense, cuDNN fused in a graph", lambda: net(self.x), self.context, dense=True)

    def compiled(self) -> OnDevice:
        """In our CUDA graph, as the others: in its own it pays for guards and for copies of its input at each call."""
        if self.context.dry:
            raise Unusable("no compiler in a dry run")
        name, key = "torch.compile max-autotune", (self.name, self.device, self.dtype, self.case.batch)
        bare = _compiled(*key, "max-autotune-no-cudagraphs")
        bare(self.x)
        try:
            return OnDevice(name, lambda: bare(self.x), self.context, dense=True)
        except RuntimeError as reason:
            self.context.synchronize()
            self.notes[name] = f"in its own CUDA graph, guards and copies included: {str(reason)[:300]}"
        own = _compiled(*key, "max-autotune")
        for _ in range(3):
            own(self.x)
        return OnDevice(name, lambda: own(self.x), self.context, dense=True, graph=False)

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
        if level is not None:
            return networks.static_reference(self.case.model, self.case.batch, level)
        return self._own_logits

    @functools.cached_property
    def _own_logits(self) -> Tensor:
        images = networks.images(self.case.model, self.case.batch)[self.rows]
        return networks.reference_logits(self.name, images, self.cpu_level_NB[self.rows])

"""Latency of the dense network against the frozen DEN: engines interleaved in one run, medians, results checked first.

Suffixes: N samples, B blocks, L levels.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from den.dense import dense
from den.flops import cost_ratios, flops, selector_macs
from den.freeze import FrozenDEN, freeze
from den.losses import path_cost
from den.model import DEN, check_task
from den_kernels.backends import resolve

MIXES = ("selector", "full", "uniform", "paper", "top1-of-4", "skip")
PAPER_COST = 0.53  # Table 2b
MIN_ROUNDS = 5
MAX_ROUNDS = 200
Input = TypeVar("Input")


@dataclass(frozen=True)
class Latency:
    """One measurement: times in milliseconds and FLOPs, both for an image.

    mix: who chose the levels; see `level_mix`.
    cost: the mean over blocks of the share of parameters run.
    dense_ms: plain PyTorch, channels_last, norms folded.
    den_ms, estimator_ms: the frozen DEN with its selector, and without it, the levels given.
    backend: of den_kernels, that ran it.
    """

    task: str
    batch: int
    mix: str
    cost: float
    dense_ms: float
    den_ms: float
    estimator_ms: float
    dense_flops: float
    den_flops: float
    estimator_flops: float
    backend: str

    @property
    def ratio(self) -> float:
        """How many times faster the DEN is, its selector included."""
        return self.dense_ms / self.den_ms

    @property
    def flop_ratio(self) -> float:
        """How many times fewer FLOPs, its selector included."""
        return self.dense_flops / self.den_flops

    @property
    def efficiency(self) -> float:
        """ratio / flop_ratio: 1 means that each FLOP saved is time saved."""
        return self.ratio / self.flop_ratio

    @property
    def estimator_efficiency(self) -> float:
        """The same without the selector, in time and FLOPs; infinite where no FLOP is left to run."""
        saved = self.dense_flops / self.estimator_flops if self.estimator_flops else math.inf
        return self.dense_ms / self.estimator_ms / saved

    def asdict(self) -> dict[str, Any]:
        """Plain values, the ratios among them."""
        derived = ("ratio", "flop_ratio", "efficiency", "estimator_efficiency")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def level_mix(name: str, num_samples: int, ratios: Sequence[float], num_blocks: int, seed: int = 0) -> Tensor:
    """Levels int64 [N, B] of a mix, its shares met as exactly as whole slots allow, in random order.

    name: "full", every block at the top level; "uniform", every level equally often; "paper", mean cost 0.53 (the most
        even shares that have it); "top1-of-4", one in four at the top level, the rest at the lowest; "skip", all at the
        lowest; or the number of a level.
    ratios: of the hierarchy, L numbers. Raises ValueError for another name.
    """
    return spread(_shares(name, ratios), num_samples, num_blocks, seed)


def spread(shares: Sequence[float], num_samples: int, num_blocks: int, seed: int = 0) -> Tensor:
    """Levels int64 [N, B] with these shares of each level, met as exactly as whole slots allow, in random order."""
    slots = num_samples * num_blocks
    exact = [share * slots for share in shares]
    counts = [math.floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda l: counts[l] - exact[l])
    for l in by_remainder[: slots - sum(counts)]:
        counts[l] += 1
    flat = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))
    return flat[order].view(num_samples, num_blocks)


def _shares(name: str, ratios: Sequence[float]) -> list[float]:
    """The share of each level in a mix."""
    count = len(ratios)
    single = {"full": count - 1, "skip": 0, **{str(l): l for l in range(count)}}
    if name in single:
        return [float(l == single[name]) for l in range(count)]
    if name == "uniform":
        return [1 / count] * count
    if name == "top1-of-4":
        return [1.0] if count == 1 else [0.75, *[0.0] * (count - 2), 0.25]
    if name == "paper":
        return even_shares(ratios, PAPER_COST)
    raise ValueError(f"mix is {name!r}; it must be one of {', '.join(MIXES)}, or a level from 0 to {count - 1}")


def even_shares(costs: Sequence[float], mean: float) -> list[float]:
    """The most even shares of levels whose mean cost is `mean`: proportional to exp(t * cost), t found by bisection."""
    if not costs[0] < mean < costs[-1]:
        raise ValueError(f"mean is {mean}; it must lie between {costs[0]} and {costs[-1]}, the costs of the levels")
    low, high = -100.0, 100.0
    for _ in range(100):
        t = (low + high) / 2
        weights = [math.exp(t * (cost - costs[-1 if t > 0 else 0])) for cost in costs]
        shares = [weight / sum(weights) for weight in weights]
        low, high = (t, high) if sum(s * c for s, c in zip(shares, costs, strict=True)) < mean else (low, t)
    return shares


def interleaved(
    engines: Mapping[str, Callable[[Input], object]],
    inputs: Sequence[Input],
    *,
    seconds: float = 2.0,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Median seconds of each engine on each input.

    The engines take turns on every input, in an order that rotates, so that what else the machine does hits all alike.

    seconds: about how long it all may take; at least 5 rounds are run, at most 200.
    synchronize: waits for the device, before each clock reading.
    """
    wait = synchronize or (lambda: None)
    for engine in engines.values():  # memory pools, algorithm choices
        engine(inputs[0])
        engine(inputs[-1])
    names = list(engines)
    times: dict[str, list[list[float]]] = {name: [[] for _ in inputs] for name in names}
    begun = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - begun > seconds:
            break
        turn = number % len(names)
        for index, value in enumerate(inputs):
            for name in names[turn:] + names[:turn]:
                wait()
                start = time.perf_counter()
                engines[name](value)
                wait()
                times[name][index].append(time.perf_counter() - start)
    return {name: [median(values) for values in rows] for name, rows in times.items()}


@torch.inference_mode()
def latency(
    model: DEN,
    images: Tensor,
    task: str | None = None,
    *,
    batches: Sequence[int] = (1, 8, 64),
    mixes: Sequence[str] = ("selector",),
    seconds: float = 2.0,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    seed: int = 0,
    progress: Callable | None = None,
) -> list[Latency]:
    """Time the dense network and the frozen DEN on the same images, after checking that their results are equal.

    Args:
        model: a DEN.
        images: float [M, C, H, W], normalised; repeated where a batch needs more. Up to 64 of them are gone through,
            but at most 16 batches.
        task: may be left out if there is one.
        batches: batch sizes.
        mixes: "selector", or those of `level_mix`.
        seconds: about how long each pair of batch and mix takes.
        dtype, backend: as `den.freeze`; the dense network has the dtype too.
        progress: wraps the pairs, such as tqdm.

    Returns: a `Latency` for each batch and mix.

    Raises:
        ValueError: no images, a batch size below 1, or a mix that is unknown.
        RuntimeError: the results differ.
    """
    task = check_task(task, model.tasks)
    if not len(images):
        raise ValueError("images is empty; at least one is needed")
    for batch in batches:
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1")
    ratios = model.config["ratios"]
    for mix in mixes:
        if mix != "selector":
            level_mix(mix, 1, ratios, model.num_blocks)
    frozen, plain = freeze(model, dtype, backend), dense(model, task, dtype=dtype)
    images = images.to(frozen.device, frozen.dtype)
    check_equal(model, frozen, plain, images[:8], task)
    pairs = [(batch, mix) for batch in batches for mix in mixes]
    results = []
    for batch, mix in pairs if progress is None else progress(pairs):
        results.append(_measure(model, frozen, plain, images, task, batch, mix, seconds, backend, seed))
    return results


def _measure(
    model: DEN, frozen: FrozenDEN, plain: Callable[[Tensor], Tensor], images: Tensor, task: str, batch: int, mix: str,
    seconds: float, backend: str, seed: int,
) -> Latency:  # fmt: skip
    count = max(1, min(16, 64 // batch))
    chosen = torch.arange(count * batch, device=images.device) % len(images)
    chunks = images[chosen].contiguous(memory_format=torch.channels_last).split(batch)
    size = (images.shape[2], images.shape[3])
    if mix == "selector":
        levels = [frozen(x, task).level for x in chunks]
    else:
        drawn = level_mix(mix, count * batch, model.config["ratios"], model.num_blocks, seed)
        levels = list(drawn.to(images.device).split(batch))

    def with_selector(index: int) -> object:
        if mix == "selector":
            return frozen(chunks[index], task)
        # The levels are the mix's, and the selector's work is done all the same.
        return frozen.selector(chunks[index]), frozen(chunks[index], task, levels[index])

    engines: dict[str, Callable[[int], object]] = {
        "dense": lambda index: plain(chunks[index]),
        "den": with_selector,
        "estimator": lambda index: frozen(chunks[index], task, levels[index]),
    }
    wait = torch.cuda.synchronize if images.device.type == "cuda" else None
    times = interleaved(engines, range(count), seconds=seconds, synchronize=wait)
    ms = {name: 1000 * sum(values) / (count * batch) for name, values in times.items()}
    level_NB = torch.cat(levels).cpu()
    estimator = float(flops(model, level_NB, size).double().mean())
    top = [model.num_levels - 1] * model.num_blocks
    return Latency(
        task=task,
        batch=batch,
        mix=mix,
        cost=float(path_cost(level_NB, cost_ratios(model)).mean()),
        dense_ms=ms["dense"],
        den_ms=ms["den"],
        estimator_ms=ms["estimator"],
        dense_flops=float(flops(model, top, size)),
        den_flops=estimator + 2 * selector_macs(model, size),
        estimator_flops=estimator,
        backend=resolve(backend, frozen.device, frozen.dtype, "residual_block").NAME,
    )


@torch.inference_mode()
def check_equal(
    model: DEN, frozen: FrozenDEN, plain: Callable[[Tensor], Tensor], images: Tensor, task: str, seed: int = 0
) -> None:
    """Raise RuntimeError unless dense and frozen agree at the top level, and frozen and the model on random paths."""
    tolerance = 1e-3 if frozen.dtype in (torch.float32, torch.float64) else 5e-2
    top = [model.num_levels - 1] * model.num_blocks
    generator = torch.Generator().manual_seed(seed)
    path = torch.randint(model.num_levels, (len(images), model.num_blocks), generator=generator).to(images.device)
    was_training = model.training
    model.eval()
    parameter = next(model.parameters())
    pairs = (
        ("dense network", plain(images), frozen(images, task, top).logits),
        ("model", model(images.to(parameter.dtype), task, path).logits, frozen(images, task, path).logits),
    )
    model.train(was_training)
    for what, expected, found in pairs:
        error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6))
        if not error <= tolerance:
            raise RuntimeError(
                f"the frozen DEN and the {what} differ by {error:.2g} of the largest logit (allowed: {tolerance:g}); "
                "nothing was timed"
            )


def hardware(device: torch.device | str = "cpu") -> str:
    """The machine in one line: processor, threads or GPU, and the version of torch."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""The training loop that Algorithm 1 and every baseline share: phases of epochs over batches of several tasks, with
learning rates, a log, a checkpoint after every epoch, and exact resume.

A method is a list of `Phase`s, each a step function from batches to a loss, on one `Loop`:

    loop = Loop(model, tasks, config)
    network = loop.setup("network", model, torch.optim.SGD(model.parameters(), 0.1))

    def step(batches, means):
        return torch.stack([F.cross_entropy(network(x), y) for task, x, y in batches]).mean()

    loop.run([Phase("network", step, {"network": Rate(0.1, "cosine")}, epochs=20)])

Devices, precision, processes and machines are Lightning Fabric's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeVar, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from den.config import RunConfig
from den.data import Batches
from den.run_folder import RunFolder
from den.tasks import Task
from den_kernels import sync_batch_norm

Network = TypeVar("Network", bound=nn.Module)
PROGRESS = 1e-3  # what counts as one, of the loss that a phase watches


class DivergedError(RuntimeError):
    """A loss is no longer a number."""


class Batch(NamedTuple):
    """One task's part of a step: images [N, C, H, W], labels int64 [N]."""

    task: Task
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Rate:
    """A learning rate over one phase.

    base: at its start (after warming up). schedule: constant; step, divided by 10 at half and at three quarters;
    cosine, down to a hundredth. warmup: share of the phase in which it rises linearly to base.
    """

    base: float
    schedule: str = "constant"
    warmup: float = 0.0

    def at(self, done: float) -> float:
        """The rate when this share of the phase, in [0, 1), is done."""
        rise = min(1.0, done / self.warmup) if self.warmup else 1.0
        if self.schedule == "cosine":
            return self.base * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(done * math.pi)))
        if self.schedule == "step":
            return self.base * rise * (0.01 if done >= 0.75 else 0.1 if done >= 0.5 else 1.0)
        return self.base * rise


class Means:
    """Running means of scalars, read once at the end of an epoch so that no step waits for a GPU."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """One step's value, a scalar."""
        self._values.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float32).detach())

    def add_usage(self, used_L: Tensor) -> None:
        """How often one step's blocks ran each level: the shares, as level_0, level_1, ..."""
        for level, share in enumerate(used_L / used_L.sum()):
            self.add(f"level_{level}", share)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def read(self, fabric: Fabric) -> dict[str, float]:
        """The means over all steps and processes."""
        mean_V = torch.stack([torch.stack(values).to(fabric.device).mean() for values in self._values.values()])
        mean_V = cast(Tensor, fabric.all_reduce(mean_V, reduce_op="mean"))
        return {name: round(value, 6) for name, value in zip(self._values, mean_V.tolist(), strict=True)}


Step = Callable[[list[Batch], Means], Tensor]


def _nothing() -> None:
    pass


@dataclass
class Phase:
    """Some epochs of one kind of step: a `repeat ... until convergence` of Algorithm 1, a task of PackNet, ...

    name: of the kind, such as "estimator"; steps are counted by it (`Loop.steps`).
    step: from a batch of each task, and the epoch's `Means` to add to, to the loss whose gradient is taken.
    rates: a `Rate` for each optimizer that steps, by the name given to `Loop.setup`.
    epochs: the most that are run.
    stage: of several phases of one kind; logged.
    title: of the progress bar.
    split, tasks: the images to go through, and the names of the tasks (None: all; with several processes a phase has to
        use every parameter of what steps, heads too).
    patience: epochs without progress that end the phase; 0 runs all.
    watch: the mean whose fall is progress, logged as the loss: what `step` returns, or another that it adds.
    begin: called before the first epoch, also of a resumed run: modes, frozen copies.
    before_update, after_update: called around each step of the optimizers, the gradients being there.
    end: called once, after the last epoch, before the checkpoint that tells that the phase is over: what it changes in
        the saved modules is kept.
    """

    name: str
    step: Step
    rates: Mapping[str, Rate]
    epochs: int
    stage: int = 0
    title: str = ""
    split: str = "train"
    tasks: Sequence[str] | None = None
    patience: int = 0
    watch: str = "loss"
    begin: Callable[[], object] = _nothing
    before_update: Callable[[], object] = _nothing
    after_update: Callable[[], object] = _nothing
    end: Callable[[], object] = _nothing


@dataclass
class Position:
    """Where a run stands: what resuming needs beside weights and optimizers. Plain numbers."""

    phase: int = 0
    epoch: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    best_loss: float | None = None
    stale: int = 0
    lines: int = 0


class Loop:
    """Runs phases on a model's tasks; see the head of this file.

    Args:
        model: what the checkpoint holds, as `den.save` writes it if it is a DEN.
        tasks: every step takes a batch of each that its phase names.
        config: the run's settings; all of it is kept in config.json.
        extra: other modules to be saved and resumed, such as running averages.
        source: what JSON can hold about where each task's images came from.
        about: what JSON can hold about the experiment, kept in config.json alone.
        on_epoch: called with each record of metrics.jsonl.

    Attributes:
        fabric, device: Lightning Fabric and where it computes.
        generator: on the CPU, of whatever a step draws; saved and resumed.
        folder: the `RunFolder`, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        config: RunConfig,
        *,
        extra: Mapping[str, nn.Module] | None = None,
        source: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        on_epoch: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self.tasks, self.config = list(tasks), config
        self.source, self.about, self.on_epoch = dict(source or {}), dict(about or {}), on_epoch
        self.fabric = Fabric(
            accelerator=config.accelerator, devices=config.devices, num_nodes=config.nodes, precision=config.precision  # type: ignore[arg-type]
        )  # fmt: skip
        self.fabric.launch()
        self.device = self.fabric.device
        self.model = model.to(self.device)
        self.extra = {name: module.to(self.device) for name, module in (extra or {}).items()}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.generator = torch.Generator().manual_seed(config.seed)
        self._batches: dict[str, dict[str, Batches]] = {}  # split, task
        self._opened = False
        self.position = Position()
        self.folder = None if config.out is None else RunFolder(config.out)

    def setup(self, name: str, module: Network, optimizer: torch.optim.Optimizer) -> Network:
        """The module as a step is to call it (in the run's precision, gradients averaged over processes)."""
        if self.fabric.world_size > 1 and self.config.sync_bn:
            sync_batch_norm(module)
        module, self.optimizers[name] = self.fabric.setup(module, optimizer)
        return module

    def steps(self, name: str) -> int:
        """Steps done in phases of this name."""
        return self.position.steps.get(name, 0)

    def of_all(self, values: Tensor) -> Tensor:
        """Rows [N, ...] of every process, in the order that one process would have them: [processes * N, ...]."""
        if self.fabric.world_size == 1:
            return values
        rows = [torch.empty_like(values) for _ in range(self.fabric.world_size)]
        torch.distributed.all_gather(rows, values.contiguous())
        return torch.stack(rows, 1).flatten(0, 1)

    def mine(self, values: Tensor, dim: int = 0) -> Tensor:
        """This process's rows of what was drawn for all of them, so that several draw what one would."""
        world = self.fabric.world_size
        return values if world == 1 else values.unflatten(dim, (-1, world)).select(dim + 1, self.fabric.global_rank)

    def run(self, phases: Sequence[Phase]) -> None:
        """Run the phases from the first, or from where the run folder's checkpoint stands.

        Raises FileExistsError, ValueError as `RunFolder`; DivergedError where the loss of an epoch is not finite: its
        line is in metrics.jsonl, the checkpoint is that of the epoch before.
        """
        for phase in phases:
            self._prepare_batches(phase)
        self.open()
        if self.config.resume and self.folder is not None and self.folder.has_checkpoint:
            self._restore(self.folder)
        position = self.position
        while position.phase < len(phases):
            phase = phases[position.phase]
            self._run_phase(phase)
            phase.end()
            position.phase += 1
            position.epoch, position.best_loss, position.stale = 0, None, 0
            self.save()

    def _run_phase(self, phase: Phase) -> None:
        position = self.position
        converged = phase.patience > 0 and position.stale >= phase.patience
        if position.epoch >= phase.epochs or converged:
            return
        phase.begin()
        while position.epoch < phase.epochs and not converged:
            record = self._epoch(phase)
            self._log({"stage": phase.stage, "phase": phase.name, "epoch": position.epoch, **record})
            if not math.isfinite(record["loss"]):
                raise DivergedError(
                    f"training diverged: the loss of phase {phase.name!r} is {record['loss']} in epoch "
                    f"{position.epoch + 1}, at a learning rate of {record['lr']:g}; lower the rate"
                )
            position.epoch += 1
            if position.best_loss is None or record["loss"] < position.best_loss - PROGRESS:
                position.best_loss, position.stale = record["loss"], 0
            else:
                position.stale += 1
            self.save()
            converged = phase.patience > 0 and position.stale >= phase.patience

    def _epoch(self, phase: Phase) -> dict[str, Any]:
        """One epoch: as many steps as the largest task has batches; smaller tasks go round again."""
        position, means, images = self.position, Means(), 0
        batches = self._of_phase(phase)
        steps = max(len(b) for _, b in batches)
        streams = [(task, b.forever()) for task, b in batches]
        started = time.perf_counter()
        for step in self._shown(phase, steps):
            for name, rate in phase.rates.items():
                for group in self.optimizers[name].param_groups:
                    group["lr"] = rate.at((position.epoch + step / steps) / phase.epochs)
            batch = [Batch(task, *next(stream)) for task, stream in streams]
            loss = phase.step(batch, means)
            self.fabric.backward(loss)
            phase.before_update()
            for name in phase.rates:
                self.optimizers[name].step()
            phase.after_update()
            for name in phase.rates:
                self.optimizers[name].zero_grad()
            if phase.watch == "loss":
                means.add("loss", loss)
            position.steps[phase.name] = self.steps(phase.name) + 1
            images += sum(len(part.x) for part in batch)
        read = means.read(self.fabric)
        seconds = time.perf_counter() - started
        first = next(iter(phase.rates.values()))
        return {
            "lr": first.at(position.epoch / phase.epochs),
            "loss": read[phase.watch],
            **read,
            "seconds": round(seconds, 3),
            "images_per_second": round(images * self.fabric.world_size / seconds, 1),
        }

    def _shown(self, phase: Phase, steps: int) -> Iterator[int]:
        """The steps of an epoch, with a progress bar."""
        label = f"{phase.title or phase.name}, epoch {self.position.epoch + 1}/{phase.epochs}"
        hidden = None if self.config.progress and self.fabric.is_global_zero else True
        return iter(tqdm(range(steps), desc=label, leave=False, disable=hidden))

    def _prepare_batches(self, phase: Phase) -> None:
        known = {task.name for task in self.tasks}
        if phase.tasks is not None and not set(phase.tasks) <= known:
            raise ValueError(f"phase {phase.name!r} has tasks {list(phase.tasks)}; there are {sorted(known)}")
        if phase.epochs and phase.split not in self._batches:
            share = (self.fabric.global_rank, self.fabric.world_size)
            self._batches[phase.split] = {
                task.name: task.batches(
                    phase.split,
                    self.config.batch_size,
                    training=True,
                    seed=self.config.seed,
                    device=self.device,
                    share=share,
                )
                for task in self.tasks
            }

    def _of_phase(self, phase: Phase) -> list[tuple[Task, Batches]]:
        wanted = [task for task in self.tasks if phase.tasks is None or task.name in phase.tasks]
        return [(task, self._batches[phase.split][task.name]) for task in wanted]

    # What is written

    @property
    def meta(self) -> dict[str, Any]:
        """What evaluation and prediction need to know of the tasks."""
        preprocessing = {task.name: task.preprocessing for task in self.tasks}
        return {"preprocessing": preprocessing, "source": self.source, "about": self.about}

    def _describe(self) -> dict[str, Any]:
        train = asdict(self.config)
        train["out"] = str(self.config.out)
        model = getattr(self.model, "config", {"name": type(self.model).__name__})
        started = datetime.now().isoformat(timespec="seconds")
        return {"train": train, "model": model, "started": started, "threads": torch.get_num_threads(), **self.meta}

    def open(self) -> None:
        """Make the run folder, if there is to be one; `run` does it too. Raises as `RunFolder.prepare`."""
        if self.folder is None or self._opened:
            return
        error: Exception | None = None
        if self.fabric.is_global_zero:
            try:
                self.folder.prepare(self._describe(), resume=self.config.resume)
            except (OSError, ValueError) as refused:
                error = refused
        error = self.fabric.broadcast(error)  # so that no process waits for one that gave up
        if error is not None:
            raise error
        self._opened = True

    def _log(self, record: dict[str, Any]) -> None:
        if self.folder is not None and self.fabric.is_global_zero:
            self.folder.append_metrics(record)
        self.position.lines += 1
        if self.on_epoch is not None and self.fabric.is_global_zero:
            self.on_epoch(record)

    def save(self) -> None:
        """Write the checkpoint."""
        if self.folder is None or not self.fabric.is_global_zero:
            return
        self.folder.save_checkpoint(
            self.model,
            self.meta,
            extra=self.extra,
            optimizers=self.optimizers,
            generator=self.generator,
            values={"position": asdict(self.position), "batches": self._batch_positions()},
        )

    def _batch_positions(self) -> dict[str, dict[str, dict[str, int]]]:
        return {
            split: {name: batches.state_dict() for name, batches in of_task.items()}
            for split, of_task in self._batches.items()
        }

    def _restore(self, folder: RunFolder) -> None:
        values = folder.load_checkpoint(
            self.model, extra=self.extra, optimizers=self.optimizers, generator=self.generator
        )
        self.position = Position(**values["position"])
        for split, of_task in values["batches"].items():
            for name, position in of_task.items():
                if split in self._batches:
                    self._batches[split][name].load_state_dict(position)
        if self.fabric.is_global_zero:
            folder.truncate_metrics(self.position.lines)

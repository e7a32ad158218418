"""Algorithm 1 of the paper: estimator and selector trained in turn, stage by stage.

N samples, B blocks, L levels, K sampled paths.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from den.data import Batches
from den.flops import cost_ratios
from den.freeze import freeze
from den.losses import advantage, initial_levels, path_cost, sample_levels, selector_loss
from den.metrics import evaluate
from den.model import DEN
from den.run_folder import RunFolder
from den.tasks import Task

SCHEDULES = ("constant", "step", "cosine")


@dataclass
class EstimatorConfig:
    """How the estimator is trained. The paper: SGD, Nesterov momentum 0.9, rate 0.1, divided by 10 at convergence."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """Unstated in the paper; the usual value for CIFAR."""
    first_epochs: int = 200
    """Most epochs of the first stage (the authors' code: 200)."""
    epochs: int = 40
    """Most epochs of a later stage (the authors' code: 40)."""
    schedule: str = "step"
    """Within a phase: constant, step (divided by 10 at half and three quarters, as the authors' code) or cosine."""
    decay: float = 0.1
    """Factor on the rate after a stage."""
    decays: int = 4
    """Most decays ("three or four decays happened in all experiments")."""
    patience: int = 0
    """Epochs without progress that count as convergence; 0 runs the epochs given."""
    levels: str = "sample"
    """Later stages: paths sampled from the selector (the paper) or its argmax (the authors' code)."""
    full_share: float = 0.0
    """Later stages: share of each batch kept at the full path; equation 8's reason, held on to. 0 is the paper."""


@dataclass
class SelectorConfig:
    """How the selector is trained. The paper: Adam, rate 1e-5, policy gradient of equation 7."""

    lr: float = 1e-5
    epochs: int = 12
    """Most epochs of a stage (the authors' code: 12)."""
    schedule: str = "constant"
    decay: float = 0.1
    decays: int = 4
    patience: int = 0
    paths: int = 4
    """|Z|, paths sampled for each image; unstated in the paper."""
    epsilon_decay: float = 0.99
    """epsilon-greedy: at step t a path is uniform with probability epsilon_decay**t (the authors' code). 0: never."""
    baseline: str = "none"
    """"none" (the paper) or "leave_one_out": the same expected gradient with less variance."""
    split: str = "train"
    """Images that it learns from: "train", or "val", held out from the estimator."""


@dataclass
class TrainConfig:
    """A whole training run."""

    rho: float = 0.1
    """Weight of the sparsity term, equation 5."""
    tau: float = 0.75
    """Weight of the full path in the initial distribution, equation 8."""
    stages: int = 4
    """S of Algorithm 1."""
    batch_size: int = 128
    seed: int = 0
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    accelerator: str = "auto"
    """Devices, precision and machines are Lightning Fabric's."""
    devices: int = 1
    precision: str = "32-true"
    out: Path | None = None
    """Run folder: config.json, metrics.jsonl, summary.json, checkpoint/. None writes nothing."""
    resume: bool = False
    """Go on from the run folder's checkpoint."""
    progress: bool = True
    """Show a progress bar where standard error is a terminal."""

    def check(self) -> None:
        """Raise ValueError naming the first field that is out of range."""
        e, s = self.estimator, self.selector
        rules = (
            ("rho", self.rho, self.rho >= 0, "at least 0"),
            ("tau", self.tau, 0 <= self.tau <= 1, "between 0 and 1"),
            ("stages", self.stages, self.stages >= 1, "at least 1"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("estimator.lr", e.lr, e.lr > 0, "above 0"),
            ("estimator.first_epochs", e.first_epochs, e.first_epochs >= 1, "at least 1"),
            ("estimator.epochs", e.epochs, e.epochs >= 0, "at least 0"),
            ("estimator.schedule", e.schedule, e.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("estimator.levels", e.levels, e.levels in ("sample", "argmax"), "sample or argmax"),
            ("estimator.full_share", e.full_share, 0 <= e.full_share <= 1, "between 0 and 1"),
            ("selector.lr", s.lr, s.lr > 0, "above 0"),
            ("selector.epochs", s.epochs, s.epochs >= 0, "at least 0"),
            ("selector.schedule", s.schedule, s.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("selector.paths", s.paths, s.paths >= 1, "at least 1"),
            ("selector.epsilon_decay", s.epsilon_decay, 0 <= s.epsilon_decay < 1, "at least 0 and below 1"),
            ("selector.baseline", s.baseline, s.baseline in ("none", "leave_one_out"), "none or leave_one_out"),
            ("selector.split", s.split, s.split in ("train", "val"), "train or val"),
        )
        for name, value, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name} is {value!r}; it must be {allowed}")
        if s.baseline == "leave_one_out" and s.paths < 2:
            raise ValueError(f"selector.paths is {s.paths}; the leave_one_out baseline needs at least 2")


@dataclass
class Position:
    """Where a run stands: what resuming needs beside weights and optimisers. Plain numbers."""

    stage: int = 0
    phase: str = "estimator"
    epoch: int = 0
    selector_step: int = 0
    best_loss: float | None = None
    stale: int = 0
    lines: int = 0


class Trainer:
    """Trains a DEN on one or several tasks.

    Args:
        model: its tasks and classes must be those of `tasks`.
        tasks: every step takes a batch of each.
        config: see `TrainConfig`; the defaults are the paper's, and the authors' code where that is silent.

    Raises ValueError for a model, tasks or configuration that do not fit together.
    """

    def __init__(self, model: DEN, tasks: Sequence[Task], config: TrainConfig | None = None) -> None:
        self.config = config = TrainConfig() if config is None else config
        config.check()
        found = {task.name: task.num_classes for task in tasks}
        if found != model.tasks:
            raise ValueError(f"tasks are {found} (classes each), but the model was made for {model.tasks}")
        if config.selector.split == "val" and any(task.val is None for task in tasks):
            raise ValueError("selector.split is 'val', but a task holds nothing out; load it with val_fraction above 0")
        self.tasks = list(tasks)
        self.fabric = Fabric(accelerator=config.accelerator, devices=config.devices, precision=config.precision)  # type: ignore[arg-type]
        self.fabric.launch()
        self.ratio_BL = cost_ratios(model).to(self.fabric.device)
        self.model = model.to(self.fabric.device)
        e = config.estimator
        sgd = torch.optim.SGD(
            model.estimator.parameters(), e.lr, e.momentum, weight_decay=e.weight_decay, nesterov=e.momentum > 0
        )
        adam = torch.optim.Adam(model.selector.parameters(), config.selector.lr)
        self.estimator, self.estimator_optimizer = self.fabric.setup(model.estimator, sgd)
        self.selector, self.selector_optimizer = self.fabric.setup(model.selector, adam)
        self.generator = torch.Generator().manual_seed(config.seed + 7919 * self.fabric.global_rank)
        self.batches = {split: self._task_batches(split) for split in {"train", config.selector.split}}
        self.position = Position()
        self.folder = None if config.out is None else RunFolder(config.out)

    def _task_batches(self, split: str) -> list[Batches]:
        share = (self.fabric.global_rank, self.fabric.world_size)
        return [
            task.batches(
                split,
                self.config.batch_size,
                training=True,
                seed=self.config.seed,
                device=self.fabric.device,
                share=share,
            )
            for task in self.tasks
        ]

    # The algorithm

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the summary, which is also the run folder's summary.json.

        The summary holds, for each task, what the selector, a random selector and the full path do on the test images.
        """
        config, position = self.config, self.position
        if self.folder is not None:
            self.folder.prepare(self._describe(), resume=config.resume)
            if config.resume and self.folder.has_checkpoint:
                self._restore(self.folder)
        while position.stage < config.stages:
            self._phase()
            if position.phase == "estimator":
                position.phase = "selector"
            else:
                position.phase, position.stage = "estimator", position.stage + 1
            position.epoch, position.best_loss, position.stale = 0, None, 0
            self._save()
        summary = self._summary()
        if self.folder is not None:
            self.folder.write_json("summary.json", summary)
        return summary

    def _phase(self) -> None:
        """One `repeat ... until convergence` of Algorithm 1."""
        position = self.position
        epochs = self._epochs()
        settings = self.config.estimator if position.phase == "estimator" else self.config.selector
        run_epoch = self._estimator_epoch if position.phase == "estimator" else self._selector_epoch
        while position.epoch < epochs:
            started = time.perf_counter()
            record = run_epoch()
            record["seconds"] = round(time.perf_counter() - started, 3)
            self._log({"stage": position.stage, "phase": position.phase, "epoch": position.epoch, **record})
            position.epoch += 1
            if position.best_loss is None or record["loss"] < position.best_loss - 1e-3:
                position.best_loss, position.stale = record["loss"], 0
            else:
                position.stale += 1
            self._save()
            if settings.patience and position.stale >= settings.patience:
                break

    def _epochs(self) -> int:
        estimator = self.config.estimator
        if self.position.phase == "selector":
            return self.config.selector.epochs
        return estimator.first_epochs if self.position.stage == 0 else estimator.epochs

    def _learning_rate(self, step: int, steps: int) -> float:
        """Rate at one step of the current epoch."""
        position = self.position
        settings = self.config.estimator if position.phase == "estimator" else self.config.selector
        base = settings.lr * settings.decay ** min(position.stage, settings.decays)
        done = (position.epoch + step / steps) / self._epochs()
        if settings.schedule == "cosine":
            return base * (0.01 + 0.99 * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi)))))
        if settings.schedule == "step":
            return base * (0.01 if done >= 0.75 else 0.1 if done >= 0.5 else 1.0)
        return base

    def _steps(self, split: str) -> Iterator[list[tuple[Task, Tensor, Tensor]]]:
        """One epoch: as many steps as the largest task has batches; smaller tasks go round again."""
        batches = self.batches[split]
        steps = max(len(b) for b in batches)
        streams = [b.forever() for b in batches]
        position = self.position
        optimizer = self.estimator_optimizer if position.phase == "estimator" else self.selector_optimizer
        stage, epoch = f"{position.stage + 1}/{self.config.stages}", f"{position.epoch + 1}/{self._epochs()}"
        label = f"stage {stage}, {position.phase}, epoch {epoch}"
        hidden = None if self.config.progress and self.fabric.is_global_zero else True
        for step in tqdm(range(steps), desc=label, leave=False, disable=hidden):
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(step, steps)
            yield [(task, *next(stream)) for task, stream in zip(self.tasks, streams, strict=True)]

    def _estimator_epoch(self) -> dict[str, float]:
        self.estimator.train()
        self.selector.eval()
        totals = _Means()
        for step in self._steps("train"):
            losses = []
            for task, x, y in step:
                level_NB = self._draw(x)
                logits = self.estimator(x, level_NB, task.name)
                losses.append(F.cross_entropy(logits, y))
                totals.add("accuracy", 100 * (logits.argmax(1) == y).float().mean())
                totals.add("cost", path_cost(level_NB, self.ratio_BL).mean())
            loss = torch.stack(losses).mean()
            self.fabric.backward(loss)
            self.estimator_optimizer.step()
            self.estimator_optimizer.zero_grad()
            totals.add("loss", loss.detach())
        return {**totals.means(), "lr": self.estimator_optimizer.param_groups[0]["lr"]}

    @torch.no_grad()
    def _draw(self, x: Tensor) -> Tensor:
        """z [N, B] from p: equation 8 in the first stage, the selector afterwards."""
        settings = self.config.estimator
        shape = (len(x), self.model.num_blocks, self.model.num_levels)
        if self.position.stage == 0:
            return initial_levels(*shape, self.config.tau, self.generator).to(x.device)
        logits = self.selector(x)
        level_NB = logits.argmax(2) if settings.levels == "argmax" else sample_levels(logits, 1, 0.0, self.generator)[0]
        if settings.full_share:
            keep = torch.rand((len(x), 1), generator=self.generator) < settings.full_share
            level_NB = torch.where(keep.to(x.device), self.model.num_levels - 1, level_NB)
        return level_NB

    def _selector_epoch(self) -> dict[str, float]:
        settings = self.config.selector
        self.selector.train()
        self.estimator.eval()
        # The estimator does not change in this phase, so its fast form gives the rewards.
        frozen = freeze(self.model)
        totals = _Means()
        for step in self._steps(settings.split):
            losses = []
            for task, x, y in step:
                logits = self.selector(x)
                epsilon = settings.epsilon_decay ** (self.position.selector_step + 1)
                level_KNB = sample_levels(logits, settings.paths, epsilon, self.generator)
                task_loss_KN = self._task_loss(frozen, task.name, x, y, level_KNB)
                cost_KN = path_cost(level_KNB, self.ratio_BL)
                reward_KN = task_loss_KN + self.config.rho * cost_KN.square()
                losses.append(selector_loss(logits, level_KNB, advantage(reward_KN, settings.baseline)))
                log_C = logits.detach().log_softmax(2)
                totals.add("reward", reward_KN.mean())
                totals.add("cost", path_cost(logits.detach().argmax(2), self.ratio_BL).mean())
                totals.add("entropy", -(log_C.exp() * log_C).sum(2).mean())
            self.fabric.backward(torch.stack(losses).mean())
            self.selector_optimizer.step()
            self.selector_optimizer.zero_grad()
            self.position.selector_step += 1
        means = totals.means()
        lr = self.selector_optimizer.param_groups[0]["lr"]
        # What the selector minimises is the reward (equation 6); its surrogate's value says nothing.
        return {"loss": means["reward"], **means, "epsilon": round(epsilon, 6), "lr": lr}

    @torch.no_grad()
    def _task_loss(self, frozen, task: str, x: Tensor, y: Tensor, level_KNB: Tensor) -> Tensor:
        """Cross-entropy [K, N] of each image on each of its sampled paths."""
        k, n, _ = level_KNB.shape
        out = frozen(x.repeat(k, 1, 1, 1), task=task, level=level_KNB.flatten(0, 1))
        return F.cross_entropy(out.logits.float(), y.repeat(k), reduction="none").view(k, n)

    # What is written

    def _describe(self) -> dict[str, Any]:
        train = asdict(self.config)
        train["out"] = str(self.config.out)
        preprocessing = {task.name: task.preprocessing for task in self.tasks}
        return {"train": train, "model": self.model.config, "preprocessing": preprocessing}

    def _log(self, record: dict[str, Any]) -> None:
        if self.folder is not None and self.fabric.is_global_zero:
            self.folder.append_metrics(record)
            self.position.lines += 1

    def _summary(self) -> dict[str, Any]:
        frozen = freeze(self.model)
        return {
            task.name: {
                policy: evaluate(frozen, task, policy=policy, seed=self.config.seed).summary()
                for policy in ("selector", "random", "full")
            }
            for task in self.tasks
        }

    def _save(self) -> None:
        if self.folder is None or not self.fabric.is_global_zero:
            return
        meta = {"preprocessing": {task.name: task.preprocessing for task in self.tasks}}
        self.folder.save_checkpoint(
            self.model,
            meta,
            optimizers={"estimator": self.estimator_optimizer, "selector": self.selector_optimizer},
            generator=self.generator,
            values={"position": asdict(self.position), "batches": self._batch_positions()},
        )

    def _batch_positions(self) -> dict[str, list[dict[str, int]]]:
        return {split: [b.state_dict() for b in batches] for split, batches in self.batches.items()}

    def _restore(self, folder: RunFolder) -> None:
        values = folder.load_checkpoint(
            self.model,
            optimizers={"estimator": self.estimator_optimizer, "selector": self.selector_optimizer},
            generator=self.generator,
        )
        for name, value in values["position"].items():
            setattr(self.position, name, value)
        for split, positions in values["batches"].items():
            for batches, position in zip(self.batches[split], positions, strict=True):
                batches.load_state_dict(position)
        folder.truncate_metrics(self.position.lines)


class _Means:
    """Running means of scalars, read once at the end of an epoch so that no step waits for a GPU."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        self._values.setdefault(name, []).append(value.detach())

    def means(self) -> dict[str, float]:
        return {name: round(float(torch.stack(values).mean()), 6) for name, values in self._values.items()}

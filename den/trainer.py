"""Algorithm 1 of the paper: estimator and selector trained in turn, stage by stage.

N samples, B blocks, L levels, K sampled paths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from den.data import Batches
from den.flops import cost_ratios
from den.freeze import freeze
from den.losses import advantage, initial_levels, path_cost, sample_levels, selector_loss
from den.metrics import evaluate
from den.model import DEN
from den.run_folder import RunFolder
from den.tasks import Task

__all__ = ["EstimatorConfig", "SelectorConfig", "TrainConfig", "Trainer"]


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
        source: what JSON can hold about where each task's images came from, kept in config.json and the checkpoint.
        on_epoch: called with each record of metrics.jsonl.

    Raises ValueError for a model, tasks or configuration that do not fit together.
    """

    def __init__(
        self,
        model: DEN,
        tasks: Sequence[Task],
        config: TrainConfig | None = None,
        *,
        source: Mapping[str, Any] | None = None,
        on_epoch: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self.config = config = TrainConfig() if config is None else config
        config.check()
        found = {task.name: task.num_classes for task in tasks}
        if found != model.tasks:
            raise ValueError(f"tasks are {found} (classes each), but the model was made for {model.tasks}")
        if config.selector.split == "val" and any(task.val is None for task in tasks):
            raise ValueError("selector.split is 'val', but a task holds nothing out; load it with val_fraction above 0")
        self.tasks = list(tasks)
        self.source, self.on_epoch = dict(source or {}), on_epoch
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
        self.batches: dict[str, list[Batches]] = {
            split: self._task_batches(split) for split in {"train", config.selector.split}
        }
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
        while position.stage < self._stages:
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
            record = {"lr": self._learning_rate(0, 1), **run_epoch()}
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

    @property
    def _stages(self) -> int:
        """Stages of Algorithm 1, and one more, without a selector phase, where the estimator settles."""
        return self.config.stages + (self.config.estimator.settle_epochs > 0)

    def _epochs(self) -> int:
        estimator, stage = self.config.estimator, self.position.stage
        settling = stage == self.config.stages
        if self.position.phase == "selector":
            return 0 if settling else self.config.selector.epochs
        return estimator.settle_epochs if settling else estimator.epochs if stage else estimator.first_epochs

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
        settling = position.stage == self.config.stages
        stage = "settling" if settling else f"stage {position.stage + 1}/{self.config.stages}"
        label = f"{stage}, {position.phase}, epoch {position.epoch + 1}/{self._epochs()}"
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
        return totals.means()

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
        # What the selector minimises is the reward (equation 6); its surrogate's value says nothing.
        return {"loss": means["reward"], **means, "epsilon": round(epsilon, 6)}

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
        return {"train": train, "model": self.model.config, **self._meta()}

    def _meta(self) -> dict[str, Any]:
        """What evaluation and prediction need to know of the tasks."""
        return {"preprocessing": {task.name: task.preprocessing for task in self.tasks}, "source": self.source}

    def _log(self, record: dict[str, Any]) -> None:
        if self.folder is not None and self.fabric.is_global_zero:
            self.folder.append_metrics(record)
            self.position.lines += 1
        if self.on_epoch is not None and self.fabric.is_global_zero:
            self.on_epoch(record)

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
        self.folder.save_checkpoint(
            self.model,
            self._meta(),
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

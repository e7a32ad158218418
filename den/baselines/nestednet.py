"""NestedNet (Kim, Ahn and Oh 2018): levels of one network, each inside the next, assigned to tasks by hand.

Suffixes: N samples, B blocks, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from den.baselines.base import BaselineConfig, Case, Method, levels, supervised
from den.config import Rule
from den.loop import Batch, Phase
from den.metrics import Policy
from den.model import DEN
from den.tasks import Task

NAMES = {2: ("L", "H"), 3: ("L", "M", "H")}  # as Table 5 prints them


@dataclass
class NestedConfig(BaselineConfig):
    """Settings of a network whose levels are assigned to tasks."""

    order: tuple[str, ...] = ()
    """Tasks from the lowest level to the highest; empty: as they are given."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        return [*super().rules(), ("order", self.order, len(set(self.order)) == len(self.order), "each task once")]


@dataclass
class NestedNetConfig(NestedConfig):
    """NestedNet's settings."""

    levels: int = 3
    """Of a single task, which has every level for itself (network compression): 2, of ratios 1/2 and 1, or 3."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        return [*super().rules(), ("levels", self.levels, self.levels in NAMES, "2 or 3")]


def halves(count: int) -> tuple[float, ...]:
    """Ratios of so many levels: ..., 1/4, 1/2, 1."""
    return tuple(0.5**power for power in reversed(range(count)))


def in_order(tasks: Sequence[Task], order: Sequence[str]) -> list[Task]:
    """The tasks from the lowest level to the highest. Raises ValueError for an order of other tasks."""
    by_name = {task.name: task for task in tasks}
    if order and set(order) != set(by_name):
        raise ValueError(f"order is {tuple(order)}; it must name every task once: {', '.join(by_name)}")
    return [by_name[name] for name in order] if order else list(tasks)


class Nested(Method):
    """A DEN without a selector: task t of `order` runs level t of every block, with batch norm of its own."""

    network: DEN

    def build(self) -> DEN:
        self.level = {task.name: l for l, task in enumerate(in_order(self.learned, self.config.order))}
        network = self.create(self.learned, ratios=halves(len(self.level)), task_norm="per_task")
        if network.num_levels != len(self.level):
            raise ValueError(
                f"ratios is {network.estimator.hierarchy.ratios}; {self.name} needs a level for each of its "
                f"{len(self.level)} tasks"
            )
        return network

    def set_up(self) -> None:
        self.net = self.loop.setup("network", self.network.estimator, self.sgd(self.network.estimator.parameters()))

    def path(self, task: str) -> list[int]:
        """The path [B] of a task."""
        return [self.level[task]] * self.network.num_blocks

    def logits(self, batch: Batch) -> Tensor:
        """Of a batch, at its task's level."""
        name = batch.task.name
        return self.net(batch.x, levels(self.path(name), batch.x), name)

    def policies(self, task: Task) -> dict[str, Policy]:
        return {"fixed": self.path(task.name)}


class NestedNet(Nested):
    """All levels are learned together, a lower one being part of every higher.

    A single task has every level for itself, and its classes a head at each: the network sees it as several tasks
    of the same images, `<task>_L`, `<task>_M` and `<task>_H`, reported as the policies L, M and H of the one.
    """

    name = "nestednet"
    Config = NestedNetConfig

    def learned_tasks(self) -> list[Task]:
        if len(self.tasks) > 1:
            return self.tasks
        self.policy = "H"
        (task,) = self.tasks
        return [replace(task, name=f"{task.name}_{letter}") for letter in NAMES[self.config.levels]]

    def phases(self) -> list[Phase]:
        return [self.weights_phase("network", supervised(self.logits), begin=self.net.train)]

    def cases(self) -> list[Case]:
        if len(self.tasks) > 1:
            return super().cases()
        return [
            Case(self.tasks[0].name, letter, task, self.path(task.name))
            for letter, task in zip(NAMES[self.config.levels], self.learned, strict=True)
        ]

"""What every competitor shares: its settings, a run on the common loop, its results, and networks that are no DEN.

Suffixes: N samples, C channels, H W space, B blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.config import SCHEDULES, Rule, RunConfig, Schedule
from den.freeze import freeze
from den.loop import Batch, Loop, Means, Phase, Rate, Step
from den.metrics import Evaluation, Policy, evaluate
from den.model import DEN, DENOutput, LevelLike, create_model
from den.results import save_results
from den.tasks import Task

SELECTED = "selector"  # the policy of a method whose network chooses by itself


@dataclass
class BaselineConfig(RunConfig):
    """How a competitor is trained: as the first stage of `TrainConfig`, with the same defaults."""

    lr: float = 0.1
    """Learning rate, of SGD with Nesterov momentum."""
    momentum: float = 0.9
    """Nesterov momentum; 0: none."""
    weight_decay: float = 5e-4
    """As DEN's estimator."""
    epochs: int = 200
    """Most epochs of a phase in which weights are learned."""
    schedule: Schedule = "step"
    """Within a phase: constant, step (divided by 10 at half and three quarters) or cosine."""
    patience: int = 0
    """Epochs without progress that count as convergence; 0 runs the epochs given."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        return [
            *super().rules(),
            ("lr", self.lr, self.lr > 0, "above 0"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0"),
            ("epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("schedule", self.schedule, self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("patience", self.patience, self.patience >= 0, "at least 0"),
        ]


class TaskNetwork(nn.Module, ABC):
    """A competitor's network that is no DEN, called and evaluated as one: `network(x, task, level)`.

    Attributes:
        config: plain values that `den.baselines.load` rebuilds the network from; "name" is the method's.
        tasks: number of classes of each task.
        num_blocks, num_levels: of the levels [N, B] that it takes and reports.
    """

    config: dict[str, Any]
    tasks: dict[str, int]
    num_blocks: int
    num_levels: int

    @abstractmethod
    def forward(self, x: Tensor, task: str, level: LevelLike | None = None) -> DENOutput:
        """Classify images [N, C, H, W] for one task; level None: by the network's own rule."""

    @abstractmethod
    def account(self, level_NB: Tensor, image_size: tuple[int, int]) -> dict[str, Any]:
        """What paths cost: `cost`, `flops`, `parameters` and `stored_parameters` of `den.metrics.Evaluation`."""

    def full(self, x: Tensor, level: LevelLike | None) -> Tensor:
        """Levels [N, B] of a network that has one path for all: zeros. Raises ValueError for any other."""
        fixed_NB = torch.zeros(len(x), self.num_blocks, dtype=torch.int64, device=x.device)
        if level is not None and bool(torch.as_tensor(level).any()):
            raise ValueError(f"level is {level}; a {type(self).__name__} has one path, level 0 in every block")
        return fixed_NB


class Case(NamedTuple):
    """One evaluation: the task and the policy that it is reported as, the task as the network knows it, the policy."""

    reported: str
    name: str
    task: Task
    policy: Policy


class Method(ABC):
    """One competitor on one or several tasks: build it, `fit()` it, read its summary.

    Args:
        model: name of the backbone, as `den.create_model` takes it.
        tasks: as of `den.Trainer`.
        config: of the method's own `Config`; None: its defaults.
        options: further arguments of `den.create_model`, such as image_size. Ratios are what the method makes of them:
            networks of one width have their own, and a static slim one asks of them alone whether a block may go.
        source, about, on_epoch: as of `den.Trainer`; what `about` leaves out of method, policy and seed is filled in.

    Attributes:
        name: of the method, in the registry and in a run's `about`.
        policy: entry of a task's summary that is the method's own result.
        one_process: whether several processes would train it otherwise than one; they are refused.
        Config: its settings.
        network: a DEN or a `TaskNetwork`.

    Raises TypeError or ValueError for arguments that do not fit together.
    """

    name: ClassVar[str]
    policy: str = "fixed"
    one_process: bool = False
    Config: ClassVar[type[BaselineConfig]] = BaselineConfig
    network: DEN | TaskNetwork

    def __init__(
        self,
        model: str,
        tasks: Sequence[Task],
        config: BaselineConfig | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        on_epoch: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        config = self.Config() if config is None else config
        if type(config) is not self.Config:
            raise TypeError(f"config is a {type(config).__name__}; {self.name} takes a {self.Config.__name__}")
        config.check()
        if self.one_process and (config.devices, config.nodes) != (1, 1):
            raise ValueError(
                f"devices is {config.devices} and nodes {config.nodes}; {self.name} trains in one process alone: give 1"
            )
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks are named {names}; they must be at least one, each with a name of its own")
        self.config: Any = config
        self.tasks = list(tasks)
        self.model_name, self.options = model, dict(options or {})
        self.learned = self.learned_tasks()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = self.build()
        described = {"method": self.name, "policy": self.policy, "seed": config.seed, **(about or {})}
        self.loop = Loop(self.network, self.learned, config, source=source, about=described, on_epoch=on_epoch)
        self.set_up()

    # What a method says of itself

    @abstractmethod
    def build(self) -> DEN | TaskNetwork:
        """The network, freshly initialised."""

    @abstractmethod
    def set_up(self) -> None:
        """Give the loop the modules and optimizers of `phases`."""

    @abstractmethod
    def phases(self) -> list[Phase]:
        """What is trained, in its order."""

    def learned_tasks(self) -> list[Task]:
        """The tasks as the network knows them."""
        return self.tasks

    def policies(self, task: Task) -> dict[str, Policy]:
        """What is evaluated of a task: a name and a policy, or path [B], each."""
        return {self.policy: SELECTED if self.policy == SELECTED else [0] * self.network.num_blocks}

    def cases(self) -> list[Case]:
        """All that is evaluated, of all tasks."""
        return [Case(t.name, name, t, policy) for t in self.learned for name, policy in self.policies(t).items()]

    # What they share

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the summary, which is also the run folder's summary.json."""
        self.loop.run(self.phases())
        first = self.loop.fabric.is_global_zero
        return save_results(self.loop.folder if first else None, self.evaluations())

    def evaluations(self) -> dict[str, dict[str, Evaluation]]:
        """task -> policy -> what came of it on the test images."""
        model = freeze(self.network) if isinstance(self.network, DEN) else self.network
        found: dict[str, dict[str, Evaluation]] = {}
        for case in self.cases():
            result = evaluate(model, case.task, policy=case.policy, seed=self.config.seed)
            found.setdefault(case.reported, {})[case.name] = result
        return found

    def create(self, tasks: Sequence[Task], **defaults: Any) -> DEN:
        """A DEN of the method's backbone for these tasks; the caller's options go before the method's defaults."""
        classes = {task.name: task.num_classes for task in tasks}
        return create_model(self.model_name, classes, **{"selector": "light", **defaults, **self.options})

    def sgd(self, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
        """The optimizer of network weights."""
        c = self.config
        return torch.optim.SGD(parameters, c.lr, c.momentum, weight_decay=c.weight_decay, nesterov=c.momentum > 0)

    def forget(self, name: str) -> None:
        """Drop an optimizer's state, such as its momentum."""
        optimizer = self.loop.optimizers[name]
        getattr(optimizer, "optimizer", optimizer).state.clear()  # Fabric wraps it

    def weights_phase(self, name: str, step: Step, **more: Any) -> Phase:
        """A phase of the method's epochs, rate and schedule, for the optimizer of that name."""
        c = self.config
        settings = {"rates": {name: Rate(c.lr, c.schedule)}, "epochs": c.epochs, "patience": c.patience, **more}
        return Phase(name, step, **settings)


def supervised(logits_of: Callable[[Batch], Tensor], *, total: bool = False) -> Step:
    """A step on the cross-entropy of each task's batch: their mean, as DEN's estimator, or their total, where tasks
    have weights of their own and each is to learn as if alone."""

    def step(batches: list[Batch], means: Means) -> Tensor:
        losses = []
        for batch in batches:
            logits = logits_of(batch)
            losses.append(F.cross_entropy(logits, batch.y))
            means.add("accuracy", 100 * (logits.argmax(1) == batch.y).float().mean())
        stacked = torch.stack(losses)
        return stacked.sum() if total else stacked.mean()

    return step


def levels(path: Sequence[int] | Tensor, x: Tensor) -> Tensor:
    """One path [B] for every sample of a batch: int64 [N, B]."""
    return torch.as_tensor(path, device=x.device).expand(len(x), -1)

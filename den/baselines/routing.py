"""Routing Networks (Rosenbaum, Klinger and Riemer 2018): a router picks one of several function blocks, layer by layer.

The variant of DEN's Table 3: an agent for each task with a table of probabilities, learned by the weighted policy
learner (WPL; Abdallah and Lesser 2006) from whether the answer was right; the hidden fully connected layers are routed
where the backbone has them (SimpleConvNet, "routed-all-fc"), else its blocks.

Suffixes: N samples, C channels, H W space, P routed layers, T tasks, K function blocks a layer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.baselines.base import SELECTED, BaselineConfig, Method, TaskNetwork
from den.baselines.independent import whole
from den.config import Rule
from den.estimator import Estimator, HiddenTail, stem_stride, xavier
from den.loop import Batch, Means, Phase
from den.model import DENOutput, LevelLike, check_level, check_task, create_model


@dataclass
class RoutingConfig(BaselineConfig):
    """Routing networks' settings."""

    function_blocks: int = 0
    """K, the function blocks that each routed layer has; 0: as many as tasks."""
    router_rate: float = 0.01
    """eta, the step of the router's probabilities after each batch."""
    value_rate: float = 0.1
    """How fast the mean reward of a choice follows the last batch's."""
    floor: float = 0.01
    """Least probability of a function block, so that none is given up for good."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        k = self.function_blocks
        return [
            *super().rules(),
            ("function_blocks", k, k >= 0, "at least 0"),
            ("router_rate", self.router_rate, self.router_rate > 0, "above 0"),
            ("value_rate", self.value_rate, 0 < self.value_rate <= 1, "above 0 and at most 1"),
            ("floor", self.floor, self.floor >= 0 and self.floor * max(k, 1) < 1, "at least 0 and below 1 / K"),
        ]


class Router(nn.Module):
    """An agent for each task: probabilities [T, P, K] of the function blocks, and the mean reward of each.

    It has no parameters: probabilities are moved by `learn`, not by a gradient.
    """

    prob_TPK: Tensor
    value_TPK: Tensor

    def __init__(self, tasks: int, layers: int, function_blocks: int):
        super().__init__()
        self.register_buffer("prob_TPK", torch.full((tasks, layers, function_blocks), 1 / function_blocks))
        self.register_buffer("value_TPK", torch.zeros(tasks, layers, function_blocks))

    def draw(self, agent: int, samples: int, generator: torch.Generator) -> Tensor:
        """Choices int64 [N, P] of a task's agent."""
        prob_PK = self.prob_TPK[agent].cpu()
        drawn_PN = torch.multinomial(prob_PK, samples, replacement=True, generator=generator)
        return drawn_PN.t().to(self.prob_TPK.device)

    @torch.no_grad()
    def learn(
        self, agent: int, choice_NP: Tensor, reward_N: Tensor, rate: float, value_rate: float, floor: float
    ) -> None:
        """A step of the weighted policy learner, for every layer of a task's agent.

        The mean rewards of the choices that were taken follow this batch's. A choice's gradient is how far its mean
        reward is above what the agent expects; weighted by the probability left to win (1 - p), or to lose (p),
        it moves the probabilities, which are then projected onto the simplex above the floor.
        """
        prob_PK, value_PK = self.prob_TPK[agent], self.value_TPK[agent]
        taken_NPK = F.one_hot(choice_NP, prob_PK.shape[1]).to(prob_PK.dtype)
        count_PK = taken_NPK.sum(0)
        mean_PK = (taken_NPK * reward_N.to(prob_PK.dtype)[:, None, None]).sum(0) / count_PK.clamp(min=1)
        value_PK.add_(value_rate * (mean_PK - value_PK) * (count_PK > 0))
        gradient_PK = value_PK - (prob_PK * value_PK).sum(1, keepdim=True)
        weight_PK = torch.where(gradient_PK < 0, prob_PK, 1 - prob_PK)
        prob_PK.copy_(project(prob_PK + rate * weight_PK * gradient_PK, floor))


def project(x: Tensor, floor: float = 0.0) -> Tensor:
    """The nearest points, by Euclidean distance, to rows of x [..., K] whose entries are at least `floor` and sum to 1.

    Sorting gives how many entries stay above the floor, and by how much all are lowered (Duchi et al. 2008).
    """
    k = x.shape[-1]
    room = 1 - k * floor
    ordered = (x - floor).sort(-1, descending=True).values
    lowered = (ordered.cumsum(-1) - room) / torch.arange(1, k + 1, device=x.device)
    above = (ordered > lowered).sum(-1, keepdim=True)
    return floor + (x - floor - lowered.gather(-1, above - 1)).clamp(min=0)


class RoutedNetwork(TaskNetwork):
    """A backbone with K function blocks in each routed layer; a level [N, P] says which of them runs.

    All of a layer cost the same: routing saves nothing, it shares.

    Args:
        model: name of the backbone.
        tasks: number of classes of each.
        options: further arguments of `den.create_model`.
        function_blocks: K; 0: as many as tasks.
    """

    def __init__(self, model: str, tasks: Mapping[str, int], options: Mapping[str, Any], function_blocks: int = 0):
        super().__init__()
        self.config = {
            "name": Routing.name,
            "model": model,
            "tasks": dict(tasks),
            "options": dict(options),
            "function_blocks": function_blocks,
        }
        self.tasks = dict(tasks)
        more = {"task_norm": "per_task", **options, "ratios": (1,), "selector": "light"}
        self.estimator: Estimator = create_model(model, tasks, **more).estimator
        self.num_blocks, self.num_levels = len(self._layers), function_blocks or len(tasks)
        # The estimator's own layers are the first function blocks.
        copies = ([copy.deepcopy(layer) for _ in range(1, self.num_levels)] for layer in self._layers)
        self.more = nn.ModuleList(nn.ModuleList(row) for row in copies)
        self.more.apply(xavier)
        self.router = Router(len(tasks), self.num_blocks, self.num_levels)

    @property
    def _layers(self) -> list[nn.Module]:
        """What is routed."""
        tail = self.estimator.tail
        return list(tail.layers if isinstance(tail, HiddenTail) else self.estimator.blocks)

    def function_blocks(self, layer: int) -> list[nn.Module]:
        """The K function blocks of a routed layer."""
        return [self._layers[layer], *cast(nn.ModuleList, self.more[layer])]

    def agent(self, task: str) -> int:
        """The number of a task's agent."""
        return list(self.tasks).index(task)

    def forward(self, x: Tensor, task: str, level: LevelLike | None = None) -> DENOutput:
        """level: integers [N, P], the function block of each routed layer; None: the agent's most probable."""
        task = check_task(task, self.tasks)
        probs = None
        if level is None:
            prob_PK = self.router.prob_TPK[self.agent(task)]
            probs = prob_PK.expand(len(x), -1, -1)
            level = prob_PK.argmax(1)
        choice_NP = check_level(level, x, self.num_blocks, self.num_levels)
        return DENOutput(self._logits(x, task, choice_NP), choice_NP, probs)

    def _logits(self, x: Tensor, task: str, choice_NP: Tensor) -> Tensor:
        e = self.estimator
        set_index = e.set_index[task]
        stride = stem_stride(x.shape[2], x.shape[3], e.base_size)
        h = x if e.stem is None else e.stem(x, stride, set_index)
        hidden = isinstance(e.tail, HiddenTail)
        for index, block in enumerate(e.blocks):
            entry = (stride,) if index == 0 and e.stem is None else ()
            run = functools.partial(_run_block, set_index=set_index, entry=entry)
            h = run(block, h) if hidden else route(self.function_blocks(index), h, choice_NP[:, index], run)
        if not hidden:
            return e.heads[task](e.tail(h, set_index))
        h = h.flatten(1)
        for index in range(self.num_blocks):
            h = route(self.function_blocks(index), h, choice_NP[:, index], _run_hidden)
        return e.heads[task](h)

    def account(self, level_NB: Tensor, image_size: tuple[int, int]) -> dict[str, Any]:
        e = self.estimator
        counts = whole(level_NB, image_size, [e], stored=1)
        hidden = isinstance(e.tail, HiddenTail)
        one = e.tail.param_count if hidden else sum(block.param_counts[-1] for block in cast("Any", e.blocks))
        return {**counts, "stored_parameters": counts["stored_parameters"] + (self.num_levels - 1) * one}


def _run_block(block: nn.Module, h: Tensor, set_index: int, entry: tuple[int, ...]) -> Tensor:
    """A block at its one level."""
    return block(h, torch.zeros(len(h), dtype=torch.int64, device=h.device), set_index, *entry)


def _run_hidden(layer: nn.Module, h: Tensor) -> Tensor:
    return F.relu(layer(h))


def route(
    function_blocks: Sequence[nn.Module], h: Tensor, choice_N: Tensor, run: Callable[[nn.Module, Tensor], Tensor]
) -> Tensor:
    """Each sample through the function block that was chosen for it: one call for all samples of a block."""
    parts, indices = [], []
    for k, module in enumerate(function_blocks):
        index = (choice_N == k).nonzero().flatten()
        if len(index):
            parts.append(run(module, h.index_select(0, index)))
            indices.append(index)
    return torch.cat(parts).index_select(0, torch.cat(indices).argsort())


class Routing(Method):
    """Function blocks learn by gradient, the router by reward (1 right, -1 wrong), both from the same drawn choices."""

    name = "routing"
    policy = SELECTED
    one_process = True  # the router learns by each batch's rewards, in turn
    Config = RoutingConfig

    def build(self) -> TaskNetwork:
        classes = {task.name: task.num_classes for task in self.tasks}
        network = RoutedNetwork(self.model_name, classes, self.options, self.config.function_blocks)
        if self.config.floor * network.num_levels >= 1:
            raise ValueError(f"floor is {self.config.floor}; it must be below 1 / K = 1 / {network.num_levels}")
        return network

    def set_up(self) -> None:
        self.net = self.loop.setup("network", self.network, self.sgd(self.network.parameters()))

    def phases(self) -> list[Phase]:
        return [self.weights_phase("network", self._step, begin=self.net.train)]

    def _step(self, batches: list[Batch], means: Means) -> Tensor:
        network, c = cast(RoutedNetwork, self.network), self.config
        losses = []
        for task, x, y in batches:
            agent = network.agent(task.name)
            choice_NP = network.router.draw(agent, len(x), self.loop.generator)
            logits = self.net(x, task.name, choice_NP).logits
            right_N = logits.detach().argmax(1) == y
            reward_N = torch.where(right_N, 1.0, -1.0)
            network.router.learn(agent, choice_NP, reward_N, c.router_rate, c.value_rate, c.floor)
            losses.append(F.cross_entropy(logits, y))
            means.add("accuracy", 100 * right_N.float().mean())
            means.add("decided", network.router.prob_TPK[agent].max(1).values.mean())
        return torch.stack(losses).mean()

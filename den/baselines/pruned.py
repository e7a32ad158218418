"""Channel pruning at equal size: train the backbone, drop the hidden channels of least magnitude, train on.

In place of the paper's "Pruning" [14] (Hu et al. 2018), whose figure it only cites. Which channels matter is
torch-pruning's judgement (Fang et al. 2023, group magnitude), asked for each block's hidden layers; all blocks compete
for the size that is left. What is pruned is what a DEN makes elastic: hidden channels, for ResNeXt whole paths.

Suffixes: C hidden channels, B blocks, G units of them (channels, or paths), L levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import den_kernels as dk
from den.baselines.base import BaselineConfig, Method, TaskNetwork, levels, supervised
from den.blocks import Block, BottleneckBlock, ConvPairBlock, LinearPairBlock, ResidualBlock
from den.blocks.forms import plain_block
from den.config import Rule
from den.estimator import Estimator
from den.flops import active_parameters, count_parameters, flops
from den.loop import Batch, Phase, Rate
from den.model import DENOutput, LevelLike, check_task, create_model

PRUNED, FULL = 0, 1  # the two levels of every block


@dataclass
class PrunedConfig(BaselineConfig):
    """Channel pruning's settings; `lr` and `epochs` are of the network before it is pruned."""

    share: float = 0.5
    """Parameters that are left, as a share of the full network's."""
    tune_lr: float = 0.01
    """Learning rate after pruning."""
    tune_epochs: int = 40
    """Most epochs after pruning."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        return [
            *super().rules(),
            ("share", self.share, 0 < self.share <= 1, "above 0 and at most 1"),
            ("tune_lr", self.tune_lr, self.tune_lr > 0, "above 0"),
            ("tune_epochs", self.tune_epochs, self.tune_epochs >= 0, "at least 0"),
        ]


class PrunedNetwork(TaskNetwork):
    """A backbone whose blocks have, at level 0, hidden widths of their own; at level 1 they are whole.

    Pruning moves the channels that stay to the front, so that the rest is never read.

    Args:
        model: name of the backbone.
        tasks: number of classes of each.
        options: further arguments of `den.create_model`.
    """

    width_B: Tensor

    def __init__(self, model: str, tasks: Mapping[str, int], options: Mapping[str, Any]):
        super().__init__()
        self.config = {"name": Pruned.name, "model": model, "tasks": dict(tasks), "options": dict(options)}
        self.tasks = dict(tasks)
        more = {**options, "ratios": (0.5, 1), "selector": "light"}
        self.estimator: Estimator = create_model(model, tasks, **more).estimator
        self.num_blocks, self.num_levels = self.estimator.num_blocks, 2
        self.register_buffer("width_B", torch.tensor([block.widths[FULL] for block in self.blocks]))
        self.apply_widths()

    @property
    def blocks(self) -> list[Block]:
        """The estimator's."""
        return cast("list[Block]", list(self.estimator.blocks))

    def apply_widths(self) -> None:
        """Make level 0 of every block what `width_B` says; to be called after it has been loaded."""
        for block, width in zip(self.blocks, self.width_B.tolist(), strict=True):
            set_width(block, width)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self.apply_widths()
        return result

    def forward(self, x: Tensor, task: str, level: LevelLike | None = None) -> DENOutput:
        """level: 0, pruned, or 1, whole, for every block alike; None: pruned."""
        task = check_task(task, self.tasks)
        path = torch.zeros(self.num_blocks, dtype=torch.int64) if level is None else torch.as_tensor(level)
        level_NB = path.to(x.device).expand(len(x), -1)
        return DENOutput(self.estimator(x, level_NB, task), level_NB, None)

    def account(self, level_NB: Tensor, image_size: tuple[int, int]) -> dict[str, Any]:
        e = self.estimator
        ratio_BL = torch.tensor([[count / b.param_counts[FULL] for count in b.param_counts] for b in self.blocks])
        return {
            "cost": ratio_BL[torch.arange(self.num_blocks), level_NB].mean(1),
            "flops": flops(cast(Any, self), level_NB, image_size),
            "parameters": active_parameters(e, level_NB),
            "stored_parameters": count_parameters(e, [PRUNED] * self.num_blocks),
        }

    @torch.no_grad()
    def prune(self, share: float) -> None:
        """Choose the channels that stay, for so large a share of all parameters, and move them to the front.

        Raises ImportError without torch-pruning.
        """
        scores = [importance(block) for block in self.blocks]
        widths = choose_widths(self.estimator, scores, share)
        for block, score, width in zip(self.blocks, scores, widths, strict=True):
            reorder(block, score)
            copy_level(block)
            set_width(block, width)
        self.width_B.copy_(torch.tensor(widths))


def set_width(block: Block, width: int) -> None:
    """Make the hidden width of a block's level 0 this."""
    block.widths = (width, block.widths[FULL])
    block.level_width[PRUNED] = width


def unit(block: Block) -> int:
    """Hidden channels that stay or go together: those of a path, or one."""
    groups = getattr(block, "groups", 1)
    return block.widths[FULL] // groups if groups > 1 else 1


def importance(block: Block) -> list[Tensor]:
    """How much each unit of each hidden layer matters, [G] each: by torch-pruning, on a block's layers with their norms
    folded in."""
    tp = _torch_pruning()
    with torch.no_grad():
        plain = plain_block(block, FULL, 0)
    layers: list[nn.Conv2d | nn.Linear] = [
        layer  # type: ignore[misc]
        for name, layer in plain.named_children()
        if name[:-1] in ("conv", "linear")  # no projection
    ]
    chain = nn.Sequential(*layers).requires_grad_(True)
    first = layers[0]
    shape = (1, first.in_features) if isinstance(first, nn.Linear) else (1, first.in_channels, 4, 4)
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(chain, torch.zeros(shape, device=first.weight.device))
    prune_out = tp.prune_linear_out_channels if isinstance(first, nn.Linear) else tp.prune_conv_out_channels
    scorer = tp.importance.GroupMagnitudeImportance(p=2)
    joined = len(layers) > 2 and layers[1].groups > 1  # type: ignore[operator]
    scores = []
    for layer in layers[:1] if joined else layers[:-1]:
        group = graph.get_pruning_group(layer, prune_out, idxs=list(range(layer.weight.shape[0])))
        scores.append(scorer(group).detach().view(-1, unit(block)).mean(1))
    return scores


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("channel pruning needs torch-pruning: pip install 'den-kernels[baselines]'") from error
    return torch_pruning


def choose_widths(estimator: Estimator, scores: Sequence[Sequence[Tensor]], share: float) -> list[int]:
    """Hidden width of each block: units go in the order of their score, the least first, until the parameters (see
    `count_parameters`) are at most a share of all. Every block keeps one unit.

    scores: for each block, those of its hidden layers [G]; a width takes as many of each.

    Raises ValueError for a share that cannot be reached.
    """
    blocks = cast("list[Block]", list(estimator.blocks))
    units = [unit(block) for block in blocks]
    kept = [len(score[0]) for score in scores]
    # The score of a block's width: what is lost by its last unit, over its hidden layers.
    ordered = [torch.stack([s.sort(descending=True).values for s in score]).mean(0) for score in scores]
    drops = sorted((float(s), b) for b, row in enumerate(ordered) for s in row[1:])
    count = count_parameters(estimator)
    target = share * count
    for _, b in drops:
        if count <= target:
            break
        count -= _parameters(blocks[b], kept[b] * units[b]) - _parameters(blocks[b], (kept[b] - 1) * units[b])
        kept[b] -= 1
    if count > target:
        raise ValueError(f"share is {share}; with one unit in each block {count} parameters are left, above {target:g}")
    return [k * u for k, u in zip(kept, units, strict=True)]


def _parameters(block: Block, width: int) -> int:
    """Weights of a block at a hidden width."""
    widths = block.widths
    block.widths = (width,)
    try:
        return block.param_counts[0]
    finally:
        block.widths = widths


Space = tuple[nn.Module, "dk.DENBatchNorm2d | None", nn.Module]


def hidden_spaces(block: Block) -> list[list[Space]]:
    """Where a block's hidden channels are: for each hidden layer that is ordered by itself, the layer that puts them
    out, the norm over them and the layer that reads them, once or, over a grouped convolution, twice."""
    b = cast(Any, block)
    if isinstance(block, ResidualBlock):
        return [[(b.conv1, b.norm2 if b.preactivation else b.norm1, b.conv2)]]
    if isinstance(block, BottleneckBlock):
        first, second = (b.conv1, b.norm1, b.conv2), (b.conv2, b.norm2, b.conv3)
        return [[first, second]] if b.groups > 1 else [[first], [second]]
    if isinstance(block, ConvPairBlock):
        return [[(b.conv1, b.norm1, b.conv2)]]
    if isinstance(block, LinearPairBlock):
        return [[(b.linear1, None, b.linear2)]]
    raise TypeError(f"cannot prune a block of type {type(block).__name__}")


@torch.no_grad()
def reorder(block: Block, scores: Sequence[Tensor]) -> None:
    """Put the hidden channels in the order of their score, the largest first: the block computes what it did."""
    for score, spaces in zip(scores, hidden_spaces(block), strict=True):
        order_G = score.argsort(descending=True, stable=True)
        size = unit(block)
        order_C = (order_G[:, None] * size + torch.arange(size, device=order_G.device)).flatten()
        for writes, norm, reads in spaces:
            _permute(writes, order_C, 0)
            if norm is not None:
                for table in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    table.copy_(table[:, order_C])
            if getattr(reads, "groups", 1) == 1:
                _permute(reads, order_C, 1)


def _permute(layer: nn.Module, order_C: Tensor, axis: int) -> None:
    """Reorder a layer's outputs (axis 0) or inputs (axis 1)."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    weight.copy_(weight.index_select(axis, order_C))
    if axis == 0 and bias is not None:
        bias.copy_(bias[order_C])


@torch.no_grad()
def copy_level(block: Block) -> None:
    """Start the norms of level 0, where each level has its own, from those of the whole block."""
    for norm in block.modules():
        if isinstance(norm, dk.DENBatchNorm2d) and norm.num_levels == 2:
            for table in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                rows = table.view(norm.num_sets, 2, -1)
                rows[:, PRUNED] = rows[:, FULL]


class Pruned(Method):
    """Two phases, whole and pruned, and pruning between them."""

    name = "pruned"
    Config = PrunedConfig

    def build(self) -> TaskNetwork:
        _torch_pruning()
        classes = {task.name: task.num_classes for task in self.tasks}
        return PrunedNetwork(self.model_name, classes, self.options)

    def set_up(self) -> None:
        estimator = cast(PrunedNetwork, self.network).estimator
        self.net = self.loop.setup("network", estimator, self.sgd(estimator.parameters()))

    def phases(self) -> list[Phase]:
        c = self.config
        whole = supervised(lambda batch: self._logits(batch, FULL))
        pruned = supervised(lambda batch: self._logits(batch, PRUNED))
        tuned = {"rates": {"network": Rate(c.tune_lr, c.schedule)}, "epochs": c.tune_epochs, "stage": 1}
        return [
            self.weights_phase("network", whole, begin=self.net.train, end=self._prune),
            self.weights_phase("network", pruned, begin=self.net.train, **tuned),
        ]

    def _logits(self, batch: Batch, level: int) -> Tensor:
        path = [level] * self.network.num_blocks
        return self.net(batch.x, levels(path, batch.x), batch.task.name)

    def _prune(self) -> None:
        cast(PrunedNetwork, self.network).prune(self.config.share)
        self.forget("network")  # momentum of channels that have moved

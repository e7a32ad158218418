"""Cross-stitch networks (Misra et al. 2016): a network for each task, and between them learned mixtures of their maps.

Suffixes: N samples, C channels, H W space, B blocks, F features, T tasks (networks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from den.baselines.base import BaselineConfig, Method, TaskNetwork, supervised
from den.baselines.independent import whole
from den.blocks import Block
from den.config import Rule
from den.estimator import Estimator, HiddenTail, stem_stride
from den.loop import Phase, Rate
from den.model import DENOutput, LevelLike, check_task, create_model


@dataclass
class CrossStitchConfig(BaselineConfig):
    """Cross-stitch networks' settings."""

    same: float = 0.9
    """alpha_S: weight of a network's own map at the start; the others share what is left to 1."""
    stitch_rate: float = 1.0
    """Learning rate of the mixtures, as a multiple of the networks' (Misra et al.: 10 to 1000, on networks already
    trained; from scratch, 10 times 0.1 diverges)."""

    def rules(self) -> list[Rule]:
        """Every field that has a range, with what holds."""
        return [
            *super().rules(),
            ("same", self.same, 0 <= self.same <= 1, "between 0 and 1"),
            ("stitch_rate", self.stitch_rate, self.stitch_rate > 0, "above 0"),
        ]


class Stitch(nn.Module):
    """One unit: map i becomes sum_j alpha[i, j] * map j, channel by channel (equation 1 of Misra et al.).

    Args:
        tasks: T. channels: of the maps. same: alpha[i, i] at the start; the others are (1 - same) / (T - 1).
    """

    def __init__(self, tasks: int, channels: int, same: float):
        super().__init__()
        others = (1 - same) / (tasks - 1) if tasks > 1 else 0.0
        alpha_TT = torch.full((tasks, tasks), others).fill_diagonal_(same if tasks > 1 else 1.0)
        self.alpha = nn.Parameter(alpha_TT[:, :, None].repeat(1, 1, channels))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """T maps [N, C, ...] -> T maps of the same shape."""
        return list(torch.einsum("ijc,jnc...->inc...", self.alpha, torch.stack(maps)).unbind())


class CrossStitchNetworks(TaskNetwork):
    """All networks read the image; that of the image's task answers.

    A unit stands behind each stage (the last block before the map's size or channels change, and the last of all) and
    behind each hidden fully connected layer. Every network keeps batch norm statistics of each task's images.

    Args:
        model: name of the backbone.
        tasks: number of classes of each.
        options: further arguments of `den.create_model`.
        same: see `CrossStitchConfig`.
    """

    def __init__(self, model: str, tasks: Mapping[str, int], options: Mapping[str, Any], same: float = 0.9):
        super().__init__()
        self.config = {
            "name": CrossStitch.name,
            "model": model,
            "tasks": dict(tasks),
            "options": dict(options),
            "same": same,
        }
        self.tasks = dict(tasks)
        more = {**options, "ratios": (1,), "selector": "light", "task_norm": "per_task"}
        columns: list[Estimator] = []
        for task in tasks:
            column = create_model(model, tasks, **more).estimator
            column.heads = nn.ModuleDict({task: column.heads[task]})
            columns.append(column)
        self.columns = nn.ModuleList(columns)
        self.num_blocks, self.num_levels = columns[0].num_blocks, 1
        stages = {b: block.out_channels for b, block in enumerate(_blocks(columns[0])) if _ends_stage(columns[0], b)}
        layers = _hidden(columns[0])
        units = {f"block{b}": channels for b, channels in stages.items()}
        units.update({f"hidden{index}": layer.out_features for index, layer in enumerate(layers)})
        self.units = nn.ModuleDict({name: Stitch(len(tasks), width, same) for name, width in units.items()})

    def forward(self, x: Tensor, task: str, level: LevelLike | None = None) -> DENOutput:
        task = check_task(task, self.tasks)
        level_NB = self.full(x, level)
        columns = cast("list[Estimator]", list(self.columns))
        set_index = columns[0].set_index[task]
        stride = stem_stride(x.shape[2], x.shape[3], columns[0].base_size)
        maps = [x if c.stem is None else c.stem(x, stride, set_index) for c in columns]
        for b in range(self.num_blocks):
            entry = (stride,) if b == 0 and columns[0].stem is None else ()
            maps = [c.blocks[b](h, level_NB[:, b], set_index, *entry) for c, h in zip(columns, maps, strict=True)]
            if f"block{b}" in self.units:
                maps = self.units[f"block{b}"](maps)
        if isinstance(columns[0].tail, HiddenTail):
            features = self._hidden(columns, maps)
        else:
            features = [c.tail(h, set_index) for c, h in zip(columns, maps, strict=True)]
        own = list(self.tasks).index(task)
        return DENOutput(columns[own].heads[task](features[own]), level_NB, None)

    def _hidden(self, columns: list[Estimator], maps: list[Tensor]) -> list[Tensor]:
        """Hidden fully connected layers, a unit behind each: T maps -> T features [N, F]."""
        features = [h.flatten(1) for h in maps]
        for index, layers in enumerate(zip(*(_hidden(c) for c in columns), strict=True)):
            features = [F.relu(layer(h)) for layer, h in zip(layers, features, strict=True)]
            features = self.units[f"hidden{index}"](features)
        return features

    def account(self, level_NB: Tensor, image_size: tuple[int, int]) -> dict[str, Any]:
        columns = cast("list[Estimator]", list(self.columns))
        return whole(level_NB, image_size, columns, stored=len(columns))


def _blocks(estimator: Estimator) -> list[Block]:
    return cast("list[Block]", list(estimator.blocks))


def _hidden(estimator: Estimator) -> list[nn.Linear]:
    tail = estimator.tail
    return cast("list[nn.Linear]", list(tail.layers)) if isinstance(tail, HiddenTail) else []


def _ends_stage(estimator: Estimator, index: int) -> bool:
    """Whether the map changes its size or channels behind this block, or ends."""
    stride, _, size = estimator.entry(estimator.image_size, estimator.image_size)
    shapes = []
    for b, block in enumerate(_blocks(estimator)):
        entry = (stride,) if b == 0 and estimator.stem is None else ()
        _, size = block.macs(*size, *entry)
        shapes.append((block.out_channels, size))
    return index + 1 == len(shapes) or shapes[index + 1] != shapes[index]


class CrossStitch(Method):
    """Networks and mixtures are learned together, on the sum of the tasks' losses; no weight decay on the mixtures."""

    name = "cross_stitch"
    Config = CrossStitchConfig

    def build(self) -> TaskNetwork:
        classes = {task.name: task.num_classes for task in self.tasks}
        return CrossStitchNetworks(self.model_name, classes, self.options, self.config.same)

    def set_up(self) -> None:
        network, c = cast(CrossStitchNetworks, self.network), self.config
        self.net = self.loop.setup("network", network, self.sgd(network.columns.parameters()))
        units = torch.optim.SGD(network.units.parameters(), c.stitch_rate * c.lr, c.momentum, nesterov=c.momentum > 0)
        self.loop.optimizers["stitch"] = self.loop.fabric.setup_optimizers(units)  # type: ignore[assignment]

    def phases(self) -> list[Phase]:
        c = self.config
        rates = {"network": Rate(c.lr, c.schedule), "stitch": Rate(c.stitch_rate * c.lr, c.schedule)}
        step = supervised(lambda batch: self.net(batch.x, batch.task.name).logits, total=True)
        return [self.weights_phase("network", step, rates=rates, begin=self.net.train)]

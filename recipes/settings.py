"""What the recipes of one scale share: schedules, selectors, and the parts that every comparison has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from recipes.recipe import Recipe, dense_twin

Scale = Literal["paper", "small"]
SCALES = get_args(Scale)

# Section 4.1 and Algorithm 1, and the authors' code where the paper is silent: the defaults of the configuration.
PAPER = TrainConfig()
PAPER_RHOS = (1.0, 0.1)
# Minutes: one long descent, for every restart of the rate costs what several epochs gave; every path of use after it,
# hence the sandwich rule; a selector that has two epochs to learn in, hence little variance; and a last descent on the
# paths that it chose.
SMALL = TrainConfig(
    stages=1,
    batch_size=64,
    estimator=EstimatorConfig(first_epochs=4, settle_epochs=5, schedule="cosine", decay=1.0, sandwich=True),
    selector=SelectorConfig(
        lr=2e-3, epochs=2, paths=4, baseline="leave_one_out", cost="expected", epsilon_decay=0.97, entropy=0.01
    ),
)
# The paper prints the sizes of its selectors: 1.49M and 0.15G beside ResNet-42, 0.37M and 0.11G beside WRN-32-4, 3.6M
# beside ResNeXt, 3.9M beside VGG, 0.4M beside SimpleConvNet. A residual network of these widths has 1.48M, 0.37M, 3.6M,
# 3.9M, 0.37M. Five stages where only parameters are told: the same parameters for fewer FLOPs.
SELECTORS: dict[str, Mapping[str, Any]] = {
    "wrn": {"widths": (16, 32, 64), "blocks_per_stage": 4},
    "resnet_42": {"widths": (16, 32, 64, 128), "blocks_per_stage": 4},
    "resnet_50": {"widths": (16, 32, 64, 128), "blocks_per_stage": 4},
    "resnext": {"widths": (16, 32, 64, 128, 174), "blocks_per_stage": 4},
    "vgg": {"widths": (16, 32, 64, 128, 238), "blocks_per_stage": 3},
    "simple_conv_net": {"widths": (16, 32, 64), "blocks_per_stage": 4, "pool": 2},
}


def paper_model(name: str, **more: Any) -> dict[str, Any]:
    """A backbone of the paper with a selector of the printed size."""
    family = name if name in SELECTORS else next(family for family in SELECTORS if name.startswith(family))
    return {"name": name, "selector": SELECTORS[family], **more}


@dataclass(frozen=True)
class Comparison:
    """What the runs of one comparison share: everything but method, seed and rho.

    group: of the runs' folders. tasks, model, train: of a DEN's recipe.
    """

    scenario: str
    scale: Scale
    group: str
    tasks: Mapping[str, Mapping[str, Any]]
    model: Mapping[str, Any]
    train: TrainConfig

    def recipe(self, seed: int, method: str, **more: Any) -> Recipe:
        """A run of a method with the comparison's data, model and training."""
        given = {"tasks": self.tasks, "model": self.model, "train": self.train, **more}
        given["train"] = replace(given["train"], seed=seed)
        return Recipe(scenario=self.scenario, scale=self.scale, group=self.group, method=method, seed=seed, **given)

    def den(self, seed: int, rho: float, **more: Any) -> Recipe:
        """A DEN at one rho."""
        train = replace(more.pop("train", self.train), rho=rho)
        row = f"DEN (rho = {rho:g})" if rho in PAPER_RHOS else None
        return self.recipe(seed, "den", **{"train": train, "variant": f"rho{rho:g}", "row": row, **more})

    def dense(self, seed: int, **more: Any) -> Recipe:
        """The backbone alone; of several tasks, one backbone with a head for each."""
        return self.recipe(seed, "dense", **{"train": dense_twin(self.train), "row": "Baseline", **more})


def for_seeds(seeds: Sequence[int], runs: Callable[[int], Iterable[Recipe]]) -> list[Recipe]:
    """The runs of every seed, one seed after another."""
    return [recipe for seed in seeds for recipe in runs(seed)]

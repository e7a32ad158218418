"""M1: three data sets at three image scales in one network (section 4.2, Table 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from recipes.recipe import Recipe
from recipes.settings import PAPER, PAPER_RHOS, SMALL, Comparison, Scale, for_seeds, paper_model

PAPER_TASKS = {
    "cifar100": {"dataset": "cifar100"},
    "tiny_imagenet": {"dataset": "tiny_imagenet"},
    "stl10": {"dataset": "stl10"},
}
# "Tiny-ImageNet, CIFAR-100, and STL-10, are assigned to the levels of hierarchy [...] from the lowest to highest"
PAPER_ORDER = ("tiny_imagenet", "cifar100", "stl10")

# 32x32, 28x28 and 8x8; with base_size 14 their first maps are 16x16, 14x14 and 8x8.
SMALL_TASKS: dict[str, dict[str, Any]] = {
    "cifar10": {"dataset": "cifar10", "subset": 3_000},
    "fashion_mnist": {"dataset": "fashion_mnist", "subset": 3_000},
    "digits": {"dataset": "digits"},
}
SMALL_ORDER = ("digits", "fashion_mnist", "cifar10")
SMALL_COST = 0.55  # mean of the tasks, met by dual ascent: the selector spends it where it helps
# As the paper's, tasks of few images are trained until these, not the epochs, are what limits them.
SMALL_TRAIN = replace(
    SMALL,
    rho=0.3,
    target_cost=SMALL_COST,
    estimator=replace(SMALL.estimator, first_epochs=8, settle_epochs=10),
    selector=replace(SMALL.selector, epochs=4),
)


def m1(scale: Scale, seeds: Sequence[int] = (0,)) -> list[Recipe]:
    """Three tasks at three image scales: independent networks, NestedNet, PackNet* and DEN (Table 2)."""
    if scale == "paper":
        compared, order = [_paper(name) for name in ("resnet_42", "wrn_32_4")], PAPER_ORDER
    else:
        model = {"name": "wrn_14_2", "selector": "light", "base_size": 14, "task_norm": "per_task"}
        compared, order = [Comparison("m1", scale, "wrn_14_2", SMALL_TASKS, model, SMALL_TRAIN)], SMALL_ORDER

    def dens(comparison: Comparison, seed: int) -> Iterator[Recipe]:
        if scale == "paper":
            yield from (comparison.den(seed, rho) for rho in PAPER_RHOS)
        else:
            yield comparison.recipe(seed, "den", variant=f"cost{SMALL_COST:g}")

    def runs(seed: int) -> Iterator[Recipe]:
        for comparison in compared:
            yield from dens(comparison, seed)
            yield comparison.recipe(seed, "independent", row="Baseline")
            yield comparison.recipe(seed, "nestednet", row="NestedNet", options={"order": order})
            yield comparison.recipe(seed, "packnet", row="PackNet*", options={"order": order})

    return for_seeds(seeds, runs)


def _paper(name: str) -> Comparison:
    return Comparison("m1", "paper", name, PAPER_TASKS, paper_model(name), PAPER)

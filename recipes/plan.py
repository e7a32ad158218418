"""What a recipe will do, told without its data: model, size, cost, steps and images.

Suffixes: B blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

import den
from den.flops import full_macs, selector_macs
from recipes.recipe import OWN, Recipe, competitor_config, estimator_epochs


@dataclass(frozen=True)
class Published:
    """A data set as Table 1 has it: side of an image, training and test images, classes; coarse: of coarse labels."""

    size: int
    train: int
    test: int
    classes: int
    coarse: int = 0


PUBLISHED = {
    "cifar10": Published(32, 50_000, 10_000, 10, coarse=2),
    "cifar100": Published(32, 50_000, 10_000, 100, coarse=20),
    "tiny_imagenet": Published(64, 100_000, 10_000, 200),
    "stl10": Published(96, 5_000, 8_000, 10),
    "mini_imagenet": Published(224, 40_000, 2_500, 50),
    "mnist": Published(28, 60_000, 10_000, 10),
    "fashion_mnist": Published(28, 60_000, 10_000, 10),
    "digits": Published(8, 1_438, 359, 10),
    "mnist_subset": Published(28, 4_000, 1_000, 10),
}


@dataclass(frozen=True)
class Plan:
    """One run to come.

    heads: classes of each. parameters, mflops: of the full backbone as the paper counts them, FLOPs as the mean over
    tasks; selector_parameters, selector_mflops: what a selector adds, 0 for a run without.
    steps: of the network and of what chooses its paths. images: forwards and backwards of a training image through
    the network; rewards: forwards alone, of the paths that the choice is learned from.
    """

    key: str
    backbone: str
    heads: dict[str, int]
    parameters: int
    mflops: float
    selector_parameters: int
    selector_mflops: float
    steps: tuple[int, int]
    images: int
    rewards: int


def heads_of(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Number of classes of each head, from what is published of the data sets."""
    heads: dict[str, int] = {}
    for name, options in tasks.items():
        known, labels = PUBLISHED[options["dataset"]], options.get("labels", "fine")
        if labels == "both":
            heads |= {"coarse": known.coarse, "fine": known.classes}
        else:
            group = options.get("group")
            heads[name] = group[2] if group else known.coarse if labels == "coarse" else known.classes
    return heads


def training_images(options: Mapping[str, Any]) -> int:
    """Images of a task that are trained on, from what is published of its data set."""
    known, group = PUBLISHED[options["dataset"]], options.get("group")
    images = round(known.train * group[2] / known.classes) if group else known.train
    images = options.get("subset") or images
    return images - round(images * options.get("val_fraction", 0))


def build(recipe: Recipe) -> den.DEN:
    """The recipe's model without the memory of its weights."""
    with torch.device("meta"):
        return den.create_model(tasks=heads_of(recipe.tasks), **recipe.model)


def plan(recipe: Recipe) -> Plan:
    """What a run will do."""
    model = build(recipe)
    sizes = [options.get("image_size") or PUBLISHED[options["dataset"]].size for options in recipe.tasks.values()]
    chooses = recipe.method == "den"
    work = _work(recipe)
    return Plan(
        key=recipe.key,
        backbone=recipe.model["name"],
        heads=heads_of(recipe.tasks),
        parameters=den.count_parameters(model),
        mflops=sum(2 * full_macs(model, size) for size in sizes) / len(sizes) / 1e6,
        selector_parameters=sum(p.numel() for p in model.selector.parameters()) if chooses else 0,
        selector_mflops=sum(2 * selector_macs(model, size) for size in sizes) / len(sizes) / 1e6 if chooses else 0.0,
        steps=(work.steps, work.choice_steps),
        images=work.images,
        rewards=work.rewards,
    )


@dataclass(frozen=True)
class _Work:
    """steps, images: of the network; choice_steps, rewards: of what chooses paths, and forwards for its rewards."""

    steps: int
    images: int
    choice_steps: int = 0
    rewards: int = 0


def _work(recipe: Recipe) -> _Work:
    train, size = recipe.train, recipe.train.batch_size
    of_task = [max(1, training_images(options) // size) for options in recipe.tasks.values()]
    # An epoch goes through the largest task once; smaller ones go round again.
    batches, together = max(of_task), size * len(of_task)
    epochs = estimator_epochs(train)
    if recipe.method == "packnet":  # one task after another
        steps = epochs * sum(of_task)
        return _Work(steps, steps * size)
    own = competitor_settings(recipe)
    more = own.get("tune_epochs", 0) + own.get("joint_epochs", 0)
    steps = (epochs + more) * batches
    images = steps * together * (2 if recipe.method == "den" and train.estimator.sandwich else 1)
    if recipe.method == "den":
        choice, paths = train.stages * train.selector.epochs * batches, train.selector.paths
    else:
        choice, paths = own.get("curriculum_epochs", 0) * batches, 2
    return _Work(steps, images, choice, choice * together * paths)


def competitor_settings(recipe: Recipe) -> dict[str, Any]:
    """A competitor's settings as plain values; of a DEN or a dense network, none."""
    return {} if recipe.method in OWN else asdict(competitor_config(recipe))


def plan_table(plans: list[Plan]) -> str:
    """A row a run."""
    from den.report import format_table

    header = ["run", "backbone", "classes", "parameters", "MFLOPs", "selector", "steps", "images"]
    rows = []
    for p in plans:
        selector = f"{_short(p.selector_parameters)}, {p.selector_mflops:.1f}" if p.selector_parameters else "-"
        classes = [str(count) for count in p.heads.values()]
        told = "+".join(classes) if len(set(classes)) > 1 or len(classes) < 4 else f"{len(classes)} x {classes[0]}"
        steps = "+".join(f"{count:,}" for count in p.steps if count)
        rows.append(
            [p.key, p.backbone, told, _short(p.parameters), f"{p.mflops:.1f}", selector, steps, _short(p.images)]
        )
    return format_table(header, rows)


def _short(count: int) -> str:
    """Such as 7.35M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)

"""M2: ten tasks of five classes each, more tasks than levels (section 4.2, Table 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from recipes.recipe import Recipe
from recipes.settings import PAPER, PAPER_RHOS, SMALL, Comparison, Scale, for_seeds, paper_model

# "batch size of 256 for large-scale dataset (ImageNet)": ours of all ten tasks together, 26 images of each.
PAPER_BATCH = 26
PAPER_IMAGES = 4_000  # of each task, 800 of each class
PAPER_SIZES = (84, 224)

SMALL_SETS = ("cifar10", "fashion_mnist", "mnist")  # ten classes each: two tasks of five
SMALL_RHOS = (0.3,)


def m2(scale: Scale, seeds: Sequence[int] = (0,)) -> list[Recipe]:
    """Ten tasks of five classes: one trunk for all, Cross-stitch, Routing and DEN at 84x84, DEN at 224x224 (Table 3).

    At the small scale six tasks of five classes, of three data sets at 32x32.
    """
    if scale == "paper":
        compared = [_paper(size) for size in PAPER_SIZES]
    else:
        tasks = {
            f"{name}_{index}": {"dataset": name, "subset": 2_000, "image_size": 32, "group": (index, 2, 5)}
            for name in SMALL_SETS
            for index in range(2)
        }
        model = {"name": "simple_conv_net", "selector": "light", "image_size": 32, "base_size": 32}
        train = replace(SMALL, batch_size=32)
        compared = [Comparison("m2", scale, "simple_conv_net", tasks, model, train)]
    rhos: tuple[float, ...] = PAPER_RHOS if scale == "paper" else SMALL_RHOS

    def runs(seed: int) -> Iterator[Recipe]:
        for comparison in compared:
            large = comparison.model["name"] == "simple_conv_net_224"
            for rho in rhos:
                row = f"{'DEN' if large else 'DENs'} (rho = {rho:g})" if rho in PAPER_RHOS else None
                yield comparison.den(seed, rho, row=row)
            if not large:  # the paper has its competitors at 84x84 alone
                yield comparison.dense(seed)
                yield comparison.recipe(seed, "cross_stitch", row="Cross-stitch")
                yield comparison.recipe(seed, "routing", row="Routing")

    return for_seeds(seeds, runs)


def _paper(size: int) -> Comparison:
    tasks: dict[str, dict[str, Any]] = {
        f"task_{index}": {
            "dataset": "mini_imagenet", "subset": PAPER_IMAGES, "image_size": size, "group": (index, 10, 5),
        }
        for index in range(10)
    }  # fmt: skip
    model = paper_model(f"simple_conv_net_{size}")
    return Comparison("m2", "paper", f"{size}x{size}", tasks, model, replace(PAPER, batch_size=PAPER_BATCH))

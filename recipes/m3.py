"""M3: hierarchical classification, a coarse and a fine label for each image (section 4.3, Table 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recipes.recipe import Recipe
from recipes.settings import PAPER, SMALL, Comparison, Scale, for_seeds, paper_model

ORDER = ("coarse", "fine")  # "the lowest and highest levels [...] to perform the coarse and fine classifications"


def m3(scale: Scale, seeds: Sequence[int] = (0,)) -> list[Recipe]:
    """Coarse and fine classes of an image: two networks, NestedNet, PackNet*, and DEN with one path (Table 4).

    At the small scale CIFAR-10's animals and vehicles beside its ten classes.
    """
    if scale == "paper":
        data: dict[str, Any] = {"dataset": "cifar100"}
        compared = Comparison("m3", scale, "wrn_32_4", _both(data), paper_model("wrn_32_4"), PAPER)
        rhos: tuple[float, ...] = (1.0,)
    else:
        data = {"dataset": "cifar10", "subset": 10_000}
        model = {"name": "wrn_14_1", "selector": "light", "base_size": 16}
        compared, rhos = Comparison("m3", scale, "wrn_14_1", _both(data), model, SMALL), (0.3,)
    apart = {head: {**data, "labels": head} for head in ORDER}

    def runs(seed: int) -> Iterator[Recipe]:
        yield from (compared.den(seed, rho) for rho in rhos)
        yield compared.recipe(seed, "independent", row="Baseline", tasks=apart)
        yield compared.recipe(seed, "nestednet", row="NestedNet", tasks=apart, options={"order": ORDER})
        yield compared.recipe(seed, "packnet", row="PackNet*", tasks=apart, options={"order": ORDER})

    return for_seeds(seeds, runs)


def _both(data: Mapping[str, Any]) -> dict[str, Any]:
    """One task of two labels: every image has one path, which both heads read."""
    return {str(data["dataset"]): {**data, "labels": "both"}}

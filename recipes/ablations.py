"""The ablations of appendix A.2 (Figure 5): how many levels, and which initial distribution. One task, one backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from recipes import c1
from recipes.recipe import Recipe
from recipes.settings import PAPER, PAPER_RHOS, Comparison, Scale, for_seeds, paper_model

# Each level halves the one above, as the ratios of three and four levels that the printed sizes tell.
LEVELS = {2: (0, 1), 3: (0, 0.5, 1), 4: (0, 0.25, 0.5, 1), 5: (0, 0.125, 0.25, 0.5, 1)}


def levels(scale: Scale, seeds: Sequence[int] = (0,)) -> list[Recipe]:
    """Two to five levels a block (Figure 5 a)."""
    base, rhos = _base("levels", scale)
    by_count = {count: replace(base, model={**base.model, "ratios": ratios}) for count, ratios in LEVELS.items()}
    return for_seeds(
        seeds,
        lambda seed: (
            comparison.den(seed, rho, variant=f"{count}levels_rho{rho:g}", row=None)
            for count, comparison in by_count.items()
            for rho in rhos
        ),
    )


def initial(scale: Scale, seeds: Sequence[int] = (0,)) -> list[Recipe]:
    """Equation 8, uniform, or the untrained selector as the first stage's model distribution (Figure 5 b)."""
    base, rhos = _base("initial", scale)
    trained = {
        "equation8": base.train,
        "uniform": replace(base.train, tau=0.0),
        "selector": replace(base.train, initial="selector"),
    }
    return for_seeds(
        seeds,
        lambda seed: (
            base.den(seed, rho, train=train, variant=f"{name}_rho{rho:g}", row=None)
            for name, train in trained.items()
            for rho in rhos
        ),
    )


def _base(scenario: str, scale: Scale) -> tuple[Comparison, tuple[float, ...]]:
    if scale == "paper":
        tasks, name = {"cifar100": {"dataset": "cifar100"}}, "wrn_32_4"
        return Comparison(scenario, scale, name, tasks, paper_model(name), PAPER), PAPER_RHOS
    return replace(c1.small_comparison(), scenario=scenario), c1.SMALL_RHOS[:1]

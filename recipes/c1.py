"""C1: network compression, one task (section 4.4, Table 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recipes.recipe import Recipe
from recipes.settings import PAPER, PAPER_RHOS, SMALL, Comparison, Scale, for_seeds, paper_model

DATA_SETS = ("cifar10", "cifar100")
# Printed: 6.44M and 9.24M parameters; of the 23.45M that ResNet-50 has in its convolutions.
PRUNED = {"cifar10": 6.44e6 / 23_454_912, "cifar100": 9.24e6 / 23_454_912}
SMALL_RHOS = (0.3, 1.0)


def c1(scale: Scale, seeds: Sequence[int] = (0,)) -> list[Recipe]:
    """One network made smaller for each image: the backbone, NestedNet, BlockDrop, pruning and DEN (Table 5).

    At the small scale also a random selector, and static slim networks of each DEN's FLOPs.
    """
    runs = _paper if scale == "paper" else _small
    return for_seeds(seeds, lambda seed: runs(seed, seeds[0]))


def _paper(seed: int, first_seed: int) -> Iterator[Recipe]:
    for data in DATA_SETS:
        tasks = {data: {"dataset": data}}

        def comparison(name: str, tasks: dict = tasks, data: str = data) -> Comparison:
            return Comparison("c1", "paper", f"{data}/{name}", tasks, paper_model(name), PAPER)

        vgg = comparison("vgg_16")
        yield vgg.dense(seed)
        yield vgg.recipe(seed, "nestednet", options={"levels": 2})
        yield vgg.den(seed, 0.1)
        resnet = comparison("resnet_50")
        yield resnet.den(seed, 1.0, row="DEN (rho = 1) (ResNet-50)")
        yield resnet.recipe(seed, "pruned", row="Pruning (ResNet-50)", options={"share": PRUNED[data]})
        for name, levels in (("resnext_29_8x64d", 3), ("resnext_29_4x64d", 2)):
            resnext = comparison(name)
            yield resnext.dense(seed)
            yield resnext.recipe(seed, "nestednet", options={"levels": levels})
            own_policy = {key: value for key, value in resnext.model.items() if key != "selector"}
            yield resnext.recipe(seed, "blockdrop", row="BlockDrop", model=own_policy)
            yield from (resnext.den(seed, rho) for rho in PAPER_RHOS)
        yield comparison("resnext_29_2x64d").dense(seed)


def small_comparison() -> Comparison:
    """A part of CIFAR-10 and a small WRN, images entering at 16x16."""
    model = {"name": "wrn_14_1", "selector": "light", "base_size": 16}
    tasks = {"cifar10": {"dataset": "cifar10", "subset": 10_000}}
    return Comparison("c1", "small", "wrn_14_1", tasks, model, SMALL)


def _small(seed: int, first_seed: int) -> Iterator[Recipe]:
    wrn = small_comparison()
    dens = [wrn.den(seed, rho) for rho in SMALL_RHOS]
    yield from dens
    yield wrn.dense(seed)
    yield wrn.recipe(seed, "random", row="DEN + rand sel")
    for recipe in dens:
        twin = f"{recipe.method_key}/seed{first_seed}"  # one size for every seed
        yield wrn.recipe(seed, "slim", variant=f"as_den_{recipe.variant}", share_of=twin)
    yield wrn.recipe(seed, "blockdrop", row="BlockDrop", options={"curriculum_epochs": 2, "joint_epochs": 2})

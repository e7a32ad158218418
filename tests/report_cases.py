"""Run folders with known results, written by the code that writes real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from den.metrics import Evaluation
from den.results import Run, read_run, save_results

IMAGES = 40
CLASSES = 4


def evaluation(
    right: int,
    *,
    blocks: int = 3,
    levels: int = 4,
    flops: int = 500_000,
    seed: int = 0,
    selector: bool = True,
    own_cost: float | None = None,
) -> Evaluation:
    """So many of 40 images right; levels and probabilities random, labels always the same."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(IMAGES) % CLASSES
    wrong = torch.randperm(IMAGES, generator=generator)[right:]
    prediction = label.clone()
    prediction[wrong] = (label[wrong] + 1) % CLASSES
    probs = torch.rand(IMAGES, blocks, levels, generator=generator).softmax(2)
    level = probs.argmax(2)
    return Evaluation(
        prediction=prediction,
        label=label,
        level=level,
        probs=probs if selector else None,
        cost=level.double().mean(1).float() / max(1, levels - 1),
        flops=torch.full((IMAGES,), flops),
        parameters=torch.full((IMAGES,), 300_000),
        stored_parameters=1_000_000,
        selector_flops=20_000 if selector else 0,
        own_cost=None if own_cost is None else torch.full((IMAGES,), own_cost),
    )


def write_run(
    folder: Path,
    *,
    right: int = 30,
    seed: int = 0,
    method: str = "den",
    policy: str = "selector",
    tasks: tuple[str, ...] = ("digits",),
    model: str = "wrn_8_1",
    blocks: int = 3,
    levels: int = 4,
    flops: int | Mapping[str, int] = 500_000,
    budgets: Mapping[float, int] | None = None,
    own_cost: float | None = None,
    metrics: tuple[dict[str, Any], ...] = (),
    **more: Any,
) -> Run:
    """A finished run.

    flops: an image, or by task. budgets: of a selector that is told one, and the FLOPs at each. more: `about`
    (scenario, scale, row), `train` (rho, tau, share), `model_options` and `top` (any other part), as in config.json.
    """
    options: dict[str, Any] = {"blocks": blocks, "levels": levels, "seed": seed, "own_cost": own_cost}
    evaluations = {}
    for task in tasks:
        cost = flops if isinstance(flops, int) else flops[task]
        policies = {policy: evaluation(right, flops=cost, selector=policy == "selector", **options)}
        if method == "den":
            policies["random"] = evaluation(12, flops=cost, selector=False, **options)
            policies["full"] = evaluation(32, flops=1_000_000, selector=False, **options)
        for budget, spent in (budgets or {}).items():
            policies[f"budget {budget:g}"] = evaluation(right, flops=spent, **options)
        evaluations[task] = policies
    folder.mkdir(parents=True)
    ratios = [level / (levels - 1) for level in range(levels)] if levels > 1 else [1.0]
    about = {"method": method, "policy": policy, "seed": seed, **more.get("about", {})}
    about = {"scenario": None, "scale": None, "row": None, **about}
    train = {"seed": seed, "out": str(folder), "batch_size": 8, **more.get("train", {})}
    described = {"name": model, "ratios": ratios, **more.get("model_options", {})}
    config = {"train": train, "model": described, "about": about, "source": {}, **more.get("top", {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    save_results(folder, evaluations)
    return read_run(folder)


def training_log(levels: int = 4, epochs: int = 3) -> tuple[dict[str, Any], ...]:
    """Two stages of an estimator and a selector, as Algorithm 1 logs them."""
    lines = []
    for stage in range(2):
        for epoch in range(epochs):
            usage = {f"level_{level}": 1 / levels for level in range(levels)}
            common = {"stage": stage, "epoch": epoch, "seconds": 1.0, "images_per_second": 900 + 50 * epoch}
            lines.append({**common, "phase": "estimator", "loss": 1.0, "accuracy": 70.0, "cost": 0.8, **usage})
        for epoch in range(epochs):
            lines.append(
                {"stage": stage, "epoch": epoch, "seconds": 1.0, "phase": "selector", "loss": 1.4, "reward": 1.4,
                 "entropy": 1.2, "cost": 0.6, **usage}
            )  # fmt: skip
    return tuple(lines)


def check_written(paths: list[Path], *texts: str) -> None:
    """The files are a picture that is not blank, and an SVG that holds the texts."""
    png, svg = paths
    pixels = np.asarray(Image.open(png).convert("L"))
    assert pixels.shape[0] > 300
    assert pixels.std() > 5
    drawn = svg.read_text()
    for text in texts:
        assert text in drawn
    assert not list(png.parent.glob(".*"))

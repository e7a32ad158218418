"""Trains a small network on two tasks, a DEN or a competitor, and writes its weights and log:
`python -m tests.distributed_case OUT DEVICES METHOD`.

The global batch is 32 images of each task, whatever the number of processes; no augmentation, whose draws belong to a
process.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

import den
from den.baselines import METHODS, train
from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from den.tasks import load_task


def main(out: Path, devices: int, method: str = "den") -> None:
    digits = load_task("digits", subset=96, augment=None, val_fraction=1 / 3)
    digits = replace(digits, test=digits.test.subset(torch.arange(64)))
    tasks = [digits, replace(digits, name="again", joint=None)]
    # float64, so that the order of sums does not matter
    shared = {"batch_size": 32 // devices, "accelerator": "cpu", "devices": devices, "precision": "64-true"}
    if method != "den":
        own = {"curriculum_epochs": 1, "joint_epochs": 1} if method == "blockdrop" else {}
        config = METHODS[method].Config(**shared, **own, lr=0.05, epochs=2, out=out, progress=False)
        options = {"selector": {"widths": (4, 8), "blocks_per_stage": 1}, "base_size": 8}
        train(method, "wrn_8_1", tasks, config, options=options)
        return
    torch.manual_seed(0)
    model = den.create_model(
        "wrn_8_1", {"digits": 10, "again": 10}, selector={"widths": (4, 8), "blocks_per_stage": 1}, base_size=8
    )
    config = TrainConfig(
        rho=1.0,
        stages=2,
        **shared,
        target_cost=0.4,
        weighting="uncertainty",
        estimator=EstimatorConfig(
            lr=0.05, first_epochs=1, epochs=1, sandwich=True, full_share=0.25, rare_boost=0.5, ema=0.5
        ),
        selector=SelectorConfig(lr=1e-2, epochs=1, paths=2, baseline="moving_average", split="val"),
        out=out,
        progress=False,
    )
    trainer = den.Trainer(model, tasks, config)
    trainer.fit()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

"""`den bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from den.cli.common import Saved, UserError, load_model, pick_device, pick_tasks, print_json, read_task, user_input

if TYPE_CHECKING:
    from torch import Tensor

    from den.model import DEN
    from den.timing import Latency


@dataclass
class Bench:
    """Milliseconds an image of the dense network (plain PyTorch, channels_last, norms folded) and of the frozen DEN, in
    one run on the same images, after checking that their results are equal.

    ratio: how many times faster the DEN is. efficiency: ratio over FLOP ratio; 1 means that each FLOP saved is time
    saved. All three columns include the selector; "no selector" is the time with the levels given.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """Run folder of den train, a folder that den.save wrote, or the name of a backbone such as wrn_32_4, with random
    weights."""
    batch: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (1, 8, 64)
    """Batch sizes."""
    mixes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MIX [MIX ...]")] = ()
    """Levels of a batch: selector, on the task's test images; full (all top); uniform (every level equally often);
    paper (mean cost 0.53); top1-of-4 (one in four at the top level, the rest at the lowest); skip (all lowest); or the
    number of a level. None: uniform and full, after selector for a trained model."""
    root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder that holds the data sets of a trained model; None: the one of training."""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Side of the images; None: that of the task's, or the size that the backbone is made for."""
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Task of a trained model; None: the first."""
    selector: Literal["paper", "light"] = "paper"
    """Selector of a backbone given by name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of both networks."""
    seconds: float = 2.0
    """About how long each pair of batch and mix is measured; at least 5 rounds."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:1."""
    backend: Literal["auto", "cpu", "triton", "grouped", "reference"] = "auto"
    """Of den_kernels; auto takes the fastest on this machine."""
    json: bool = False
    """Print JSON."""

    def run(self, arguments: list[str]) -> None:
        """Measure and print."""
        for batch in self.batch:
            if batch < 1:
                raise UserError(f"batch is {batch}; it must be at least 1")
        import torch
        from tqdm import tqdm

        from den.timing import hardware, latency

        model, images, mixes = self._subject()
        with user_input():
            results = latency(
                model,
                images,
                self.task or next(iter(model.tasks)),
                batches=self.batch,
                mixes=mixes,
                seconds=self.seconds,
                dtype=getattr(torch, self.dtype),
                backend=self.backend,
                progress=lambda pairs: tqdm(pairs, desc="measuring", leave=False, disable=None),
            )
        machine = hardware(images.device)
        side = f"{images.shape[2]}x{images.shape[3]}"
        if self.json:
            head: dict[str, Any] = {"hardware": machine, "dtype": self.dtype, "image_size": list(images.shape[2:])}
            print_json({**head, "model": self.model, "results": [result.asdict() for result in results]})
        else:
            print(f"{model.config['name']} at {side}, {self.dtype}, backend {results[0].backend}; {machine}")
            print(latency_table(results))

    def _subject(self) -> tuple[DEN, Tensor, tuple[str, ...]]:
        """The model, images for it, and the mixes."""
        import torch

        from den.model import create_model

        device = pick_device(self.device)
        torch.manual_seed(0)
        path = Path(self.model)
        count = max(64, *self.batch)
        if path.exists():
            saved = load_model(path, self.device)
            task = pick_tasks(saved.model, [self.task] if self.task else [])[0]
            mixes = self.mixes or (("selector", "uniform", "full") if saved.has_selector else ("uniform", "full"))
            if "selector" in mixes:  # what it chooses for noise would say nothing
                saved.check_selector("give --mixes uniform or full")
                images = self._test_images(saved, task, count)
            else:
                images = self._noise(saved.model, count, saved.preprocessing_of(task)["image_size"])
            return saved.model, images.to(device), mixes
        if "/" in self.model:
            raise UserError(f"{path} is missing; give a run folder, a folder that den.save wrote, or a backbone's name")
        with user_input():
            model = create_model(self.model, {self.task or "bench": 10}, selector=self.selector).to(device).eval()
        return model, self._noise(model, count, None).to(device), self.mixes or ("uniform", "full")

    def _test_images(self, saved: Saved, name: str, count: int) -> Tensor:
        given: dict[str, Any] = {} if self.root is None else {"root": str(self.root)}
        if self.image_size is not None:
            given["image_size"] = self.image_size
        task = read_task(saved, name, given)
        return next(iter(task.batches("test", min(count, len(task.test)), training=False)))[0]

    def _noise(self, model: DEN, count: int, task_size: list[int] | None) -> Tensor:
        import torch

        size = task_size or [model.estimator.image_size] * 2
        if self.image_size is not None:
            size = [self.image_size] * 2
        if min(size) < 1:
            raise UserError(f"image-size is {self.image_size}; it must be at least 1")
        return torch.randn(count, model.estimator.in_channels, *size)


def latency_table(results: list[Latency]) -> str:
    """A row a batch and mix, milliseconds for an image."""
    from den.report import format_table

    header = ["batch", "mix", "cost", "dense ms", "DEN ms", "no selector", "ratio", "FLOP ratio", "efficiency"]
    rows = [
        [
            str(r.batch),
            r.mix,
            f"{r.cost:.3f}",
            f"{r.dense_ms:.3f}",
            f"{r.den_ms:.3f}",
            f"{r.estimator_ms:.3f}",
            f"{r.ratio:.2f}",
            f"{r.flop_ratio:.2f}",
            f"{r.efficiency:.2f}",
        ]
        for r in results
    ]
    return format_table(header, rows, left=(1,))

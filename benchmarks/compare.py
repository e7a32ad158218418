"""Two builds of the project against each other: what a change to a kernel is worth, on a machine that others use too.

    python -m benchmarks.compare BEFORE [AFTER] [--model wrn_32_4] [--batch 1] [--mixes full,skip] [--subject float32]

BEFORE and AFTER (default: this one) are checkouts with their extension built in place (`python setup.py build_ext
--inplace`). Each lives in a process of its own and both take turns, a few calls each, so that a slow minute of the
machine meets both: what counts is the ratio of the two medians of a turn, of which the median and the quartiles over
all turns are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import MIXES, MODELS, ModelCase
from benchmarks.lineup import SUBJECTS, Subject
from benchmarks.networks import images, network
from benchmarks.worker import ROOT, Job, Worker


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each mix."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout of the project, its extension built")
    parser.add_argument("after", type=Path, nargs="?", default=ROOT, help="another; default: this one")
    parser.add_argument("--model", choices=[case.name for case in MODELS], default=MODELS[0].name)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mixes", default="full,uniform", help="comma-separated level mixes")
    parser.add_argument("--subject", choices=list(SUBJECTS), default="float32", help="how it is frozen")
    parser.add_argument("--selector", action="store_true", help="with the selector in front")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--calls", type=int, default=5, help="timed calls in a turn")
    options = parser.parse_args(arguments)
    case = next(case for case in MODELS if case.name == options.model)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Worker(options.threads, root=options.before)) as before,
        closing(Worker(options.threads, root=options.after)) as after,
    ):
        for name in options.mixes.split(","):
            job = den_job(case, SUBJECTS[options.subject], options.batch, name, Path(folder), options.selector)
            for worker in (before, after):
                worker.build(job)
            if not np.allclose(before.result(), after.result(), rtol=1e-2, atol=1e-2):
                print(f"{name}: the builds disagree")
            print(line(name, *in_turns(before, after, options.turns, options.calls)), flush=True)


def den_job(case: ModelCase, subject: Subject, batch: int, mix: str, folder: Path, selector: bool = False) -> Job:
    """The frozen DEN on the `cpu` backend at the levels of a mix; selector: with its selector in front."""
    path = folder / "images.npy"
    np.save(path, images(case, batch).contiguous().numpy())
    level = MIXES[mix].levels(batch, network(case.name).num_blocks, case.ratios)
    engine = "benchmarks.torch_engines:den_frozen"
    options = {"backend": "cpu", "freeze": dict(subject.freeze), "selector": selector}
    return Job(engine, case.name, subject.dtype, str(path), tuple(map(tuple, level.tolist())), options)


def in_turns(before: Worker, after: Worker, turns: int, calls: int) -> tuple[list[float], list[float]]:
    """The median seconds of each turn, of either build; who begins alternates."""
    seconds: dict[Worker, list[float]] = {before: [], after: []}
    for turn in range(turns):
        for worker in (before, after) if turn % 2 else (after, before):
            seconds[worker].append(statistics.median(worker.time(calls)))
    return seconds[before], seconds[after]


def line(mix: str, before: Sequence[float], after: Sequence[float]) -> str:
    """The speed-up with its quartiles, and the milliseconds."""
    ratios = [old / new for old, new in zip(before, after, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    old, new = (1000 * statistics.median(seconds) for seconds in (before, after))
    return f"{mix:10} {middle:.3f}x (quartiles {low:.3f} to {high:.3f}), {old:.3g} -> {new:.3g} ms"


if __name__ == "__main__":
    main()

"""Memory of one forward: what the frozen DEN needs besides its weights, and what its weights take, packed.

    python -m benchmarks.memory [--models wrn_32_4] [--batches 1,64] [--subject float32] [--mixes full,skip]

Activations: the most by which the resident set of a fresh process grew during its first forward, in MB (1e6 bytes):
images and weights are there before and do not count; scratch memory of the kernels and code loaded on first use do.
Weights: all parameters and buffers. N samples, B blocks.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import den
from benchmarks.cases import MIXES, MODELS, ModelCase
from benchmarks.lineup import DENSE, SUBJECTS, Bench, Subject
from benchmarks.networks import network
from den.dense import dense
from den_kernels.backends import load

BACKEND = "cpu"
# glibc would keep freed maps for the next one, and growth would miss them: each large map gets pages of its own.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=MODELS[0].name, help="comma-separated names of benchmarks/cases.py")
    parser.add_argument("--batches", default="1,64", help="comma-separated")
    parser.add_argument("--subject", choices=SUBJECTS, default="float32", help="form of the frozen DEN")
    parser.add_argument("--mixes", default="full,uniform,skip", help="comma-separated level mixes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    subject = SUBJECTS[options.subject]
    reason = load(BACKEND).unavailable() or load(BACKEND).rejects(torch.device("cpu"), getattr(torch, subject.dtype))
    if reason or subject.missing():
        parser.error(f"{subject.name}: {reason or subject.missing()}")
    cases = {case.name: case for case in MODELS}
    names, mixes = options.models.split(","), options.mixes.split(",")
    for what, chosen, known in (("models", names, cases), ("mixes", mixes, MIXES)):
        if not set(chosen) <= set(known):
            parser.error(f"{what} are among {', '.join(known)}, not {','.join(chosen)}")
    for name in names:
        without = [mix for mix in mixes if not MIXES[mix].fits(cases[name].ratios)]
        if without:
            parser.error(f"{name} has no level for {', '.join(without)}: its ratios are {cases[name].ratios}")
    for name in names:
        print("\n".join(weight_lines(cases[name], subject)))
        for batch in map(int, options.batches.split(",")):
            for line in activation_lines(cases[name], subject, batch, mixes, options.threads):
                print(line)


def weight_lines(case: ModelCase, subject: Subject) -> list[str]:
    """Bytes of the weights, dense and packed."""
    model, dtype = network(case.name), getattr(torch, subject.dtype)
    fast = den.freeze(model, dtype=dtype, backend=BACKEND, **subject.freeze)
    selector = held_bytes(fast.selector)
    return [
        f"{case.name}, {subject.name}: weights",
        f"  {'dense':24} {held_bytes(dense(model, dtype=dtype)) / 1e6:8.1f} MB",
        f"  {subject.label(BACKEND):24} {(held_bytes(fast) - selector) / 1e6:8.1f} MB",
        f"  {'selector':24} {selector / 1e6:8.1f} MB",
    ]


def held_bytes(module: nn.Module) -> int:
    """Of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def activation_lines(case: ModelCase, subject: Subject, batch: int, mixes: Sequence[str], threads: int) -> list[str]:
    """Growth of a fresh process during its first forward, for the dense network and the DEN at each mix."""
    lines = [f"{case.name}, {subject.name}, batch {batch}: most growth during a forward"]
    blocks = network(case.name).num_blocks
    with tempfile.TemporaryDirectory() as folder:
        for mix in ("", *mixes):
            bench = Bench(Path(folder), threads, environment=MALLOC)
            try:
                if mix:
                    engine = bench.den(subject, case, MIXES[mix].levels(batch, blocks, case.ratios), BACKEND)
                else:
                    engine = bench.dense(DENSE["eager"], case, subject.dtype, batch)
                lines.append(f"  {f'{engine.name} {mix}':24} {engine.peak_bytes() / 1e6:8.1f} MB")
            finally:
                bench.close()
    return lines


if __name__ == "__main__":
    main()

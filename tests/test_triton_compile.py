"""The kernels compiled for GPUs that need not be there: tensor cores used, shared memory within the limit, no spills.

The compiles run side by side in processes of their own, where TRITON_INTERPRET is not set. Triton's cache keeps them:
a second run takes seconds.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import pytest
import torch

from den_kernels.backends.triton import configs, tile_tables

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ARCHS = (80, 89, 90)
KINDS = {"half": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
THROUGH_REGISTERS = ("first, pre-activation", "weight gradient")
CORE = ("conv2d", "first", "first, pre-activation", "last", "last, activating")
# Of training: products, and passes over memory that multiply no matrices.
PRODUCTS = ("data gradient", "data gradient, stride 2", "weight gradient", "weight gradient, 3x3 map")
# The launch that stands for each kernel of the tables.
TABLED = {
    "conv2d": "conv2d, full",
    "conv2d-in": "conv2d",
    "conv2d-out": "conv2d",
    "conv2d-in-out": "conv2d",
    "first": "first",
    "first-pre": "first, pre-activation",
    "inner": "inner",
    "last": "last",
}


class Job(NamedTuple):
    """One kernel at one shape; `tile` None is what the heuristic picks there."""

    arch: int
    kind: str
    kernel: str
    samples: int = 256
    channels: int = 64
    size: int = 32
    groups: int = 1
    tile: configs.TileConfig | None = None


class Outcome(NamedTuple):
    job: Job
    tile: configs.TileConfig
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    instruction: str
    vector_copies: int


def _start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(job: Job) -> Outcome:
    from den_kernels.backends.triton import offline

    torch.set_float32_matmul_precision("high" if job.kind == "tf32" else "highest")
    shape = (KINDS[job.kind], job.samples, job.channels, job.size, job.groups)
    launches = offline.typical_launches(*shape) | offline.training_launches(*shape)
    launch = launches[job.kernel] if job.tile is None else launches[job.kernel]._replace(tile=job.tile)
    report = offline.compile_launch(launch, job.arch)
    return Outcome(
        job,
        launch.tile,
        report.registers,
        report.spill_bytes,
        report.shared_bytes,
        offline.SHARED_LIMIT_KIB[job.arch] * 1024,
        report.matrix_instruction,
        report.vector_copies,
    )


@pytest.fixture(scope="module")
def pool():
    workers = min(os.cpu_count() or 1, 8)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as executor:
        yield executor


def _exhausted(outcome: Outcome) -> bool:
    return outcome.shared_bytes > outcome.shared_limit or outcome.spill_bytes > 0


def _wrong(outcome: Outcome) -> bool:
    job, tile = outcome.job, outcome.tile
    # wgmma takes 64 rows at least; exact float32 has no tensor-core form.
    hopper = job.arch >= 90 and tile.block_m >= 64
    instruction = "fma" if job.kind == "fp32" else "wgmma" if hopper else "mma.sync"
    # Loads of both operands stay asynchronous and 16 bytes a thread wide: a mask that lost its alignment would show.
    bytes_of_copies = 16 * 32 * tile.num_warps
    rows = [side * tile.block_k * KINDS[job.kind].itemsize for side in (tile.block_m, tile.block_n)]
    copies = tile.num_stages * sum(size // bytes_of_copies for size in rows)
    vectors = job.channels // job.groups % 16 == 0
    return outcome.instruction != instruction or _exhausted(outcome) or (vectors and outcome.vector_copies < copies)


def _check(outcomes) -> None:
    wrong = [outcome for outcome in outcomes if _wrong(outcome)]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("arch", ARCHS)
def test_wide_resnet_in_bf16(pool, arch):
    stages = ((256, 64, 32), (256, 128, 16), (256, 256, 8), (1, 64, 32))
    _check(pool.map(_compile, [Job(arch, "half", kernel, *stage) for stage in stages for kernel in CORE]))


@pytest.mark.parametrize("arch", ARCHS)
def test_other_forms_of_the_kernels(pool, arch):
    rest = ("conv2d, full", "inner", "last, pooled", "last, activating all")
    jobs = [Job(arch, "half", kernel) for kernel in rest]
    jobs += [Job(arch, "half", kernel, channels=20) for kernel in CORE]
    jobs += [Job(arch, "half", "inner", channels=256, groups=groups) for groups in (4, 32)]
    jobs += [Job(arch, "half", kernel) for kernel in ("projection", "conv2d, residual")]
    _check(pool.map(_compile, jobs))


@pytest.mark.parametrize("arch", ARCHS)
def test_parts_of_a_reduction_and_their_sum(pool, arch):
    """One image at the deepest stage: small tiles, and a launch that adds what the parts of each found."""
    parts = ("first, pre-activation", "last")
    _check(pool.map(_compile, [Job(arch, "half", kernel, 1, 256, 8) for kernel in parts]))
    sums = [Job(arch, "half", f"{kernel}, sum of parts", 1, 256, 8) for kernel in parts]
    assert not [outcome for outcome in pool.map(_compile, sums) if _exhausted(outcome) or outcome.instruction != "fma"]


@pytest.mark.parametrize("arch", ARCHS)
def test_training_kernels(pool, arch):
    outcomes = list(pool.map(_compile, [Job(arch, "half", kernel) for kernel in _training_kernels()]))
    wrong = [outcome for outcome in outcomes if _exhausted(outcome)]
    assert not wrong, "\n".join(map(str, wrong))
    for outcome in outcomes:
        assert (outcome.instruction != "fma") == (outcome.job.kernel in PRODUCTS), outcome


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_where_channels_are_many(pool, arch):
    jobs = [Job(arch, "half", kernel, 256, 256, 8) for kernel in PRODUCTS]
    jobs += [Job(arch, kind, "weight gradient", 256, 128, 16) for kind in ("tf32", "fp32")]
    _check(pool.map(_compile, jobs))


def _training_kernels() -> list[str]:
    from den_kernels.backends.triton import offline

    return list(offline.training_launches(torch.bfloat16))


def test_every_tile_of_the_shipped_tables(pool):
    """None is shipped before a GPU has been measured; each is compiled for the GPU that it was measured on."""
    jobs = set()
    for path in tile_tables.FOLDER.glob("*.json"):
        content = tile_tables.read(path)
        major, minor = content["capability"]
        for key, entry in content["entries"].items():
            kernel, kind = key.split(", ")[:2]
            tile = configs.TileConfig(**entry["tile"])
            jobs.add(Job(min(10 * major + minor, max(ARCHS)), kind, TABLED[kernel], tile=tile))
    outcomes = pool.map(_compile, sorted(jobs), chunksize=4)
    assert not [outcome for outcome in outcomes if outcome.shared_bytes > outcome.shared_limit]


@pytest.mark.parametrize("kind", ["fp32", "tf32"])
@pytest.mark.parametrize("arch", ARCHS)
def test_float32(pool, arch, kind):
    _check(pool.map(_compile, [Job(arch, kind, kernel, 256, 128, 16) for kernel in CORE]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_that_the_heuristic_can_pick(pool, arch, kind):
    gradients = ("data gradient", "weight gradient") if kind == "half" else ()  # whose tiles are those of the others
    jobs = [
        Job(arch, kind, kernel, tile=tile)
        for kernel in (*CORE, *gradients)
        if kernel != "last"  # whose registers are fewer than with an activation to write
        for tile in configs.tiles(kind, kernel in THROUGH_REGISTERS)
    ]
    _check(pool.map(_compile, jobs, chunksize=4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_heuristic_stays_within_its_table(kind):
    table = {passing: set(configs.tiles(kind, passing)) for passing in (False, True)}
    for samples in (1, 8, 1024):
        for rows in (1, 16, 49, 64, 1024, 12544):
            for channels in (1, 3, 16, 24, 64, 200, 2048):
                for elastic in (False, True):
                    picked = configs.choose(
                        kind,
                        samples=samples,
                        rows=rows,
                        reduction=channels,
                        columns=channels,
                        elastic_in=elastic,
                        elastic_out=elastic,
                        through_registers=elastic,
                        vectors=channels % 16 == 0,
                        multiprocessors=132,
                    )
                    assert picked in table[elastic]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_maps_are_small(kind):
    """So small that `products` divides by their width with a multiplication."""
    for pixels in range(257, 20000):
        assert not configs.choose_weight_gradient(kind, pixels=pixels, outputs=64, inputs=64, vectors=True)[1], pixels


def test_an_importer_without_triton_learns_why(monkeypatch):
    from den_kernels.backends import triton as backend

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backend.unavailable.cache_clear()
    reason = backend.unavailable()
    backend.unavailable.cache_clear()
    assert "triton is not installed" in reason
    assert "pip install" in reason


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused_outside_the_interpreter():
    from den_kernels.backends import triton as backend

    assert backend.rejects(torch.device("cpu"), torch.float32)
    assert "float64" in backend.rejects(torch.device("cuda", 0), torch.float64)

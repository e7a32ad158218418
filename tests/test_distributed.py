"""Two processes train as one does on the same global batch; batch norm over both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import distributed_case
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

import den_kernels as dk

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
needs_gloo = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")


def norm_case(rank: int, world: int, folder: str) -> None:
    """One process's rows of a batch through norms of both kinds; gradients as DDP has them, the mean."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 3, 3, dtype=torch.float64, generator=generator)[rank::world].requires_grad_()
    level = torch.tensor([0, 1, 2, 1, 1, 2])[rank::world]  # one process has the only sample at level 0
    width = torch.tensor([0, 2, 5])[level]
    torch.manual_seed(1)
    norms = torch.nn.ModuleDict(
        {"elastic": dk.DENBatchNorm2d(5, 3), "hidden": dk.DENBatchNorm2d(5), "plain": torch.nn.BatchNorm2d(5)}
    ).double()
    for p in norms.parameters():
        torch.nn.init.uniform_(p)
    dk.sync_batch_norm(norms)
    y = norms["plain"](norms["hidden"](norms["elastic"](x, level), width=width, relu=True))
    (y.pow(3).mean()).backward()
    for p in norms.parameters():
        if world > 1:
            torch.distributed.all_reduce(p.grad)
            p.grad /= world
    found = {"y": y.detach(), "dx": x.grad / world, **norms.state_dict()}
    found.update({f"d{name}": p.grad for name, p in norms.named_parameters()})
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


@needs_gloo
@pytest.mark.slow
def test_batch_norm_over_processes_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    norm_case(0, 1, str(tmp_path))
    mp.spawn(norm_case, (2, str(tmp_path)), nprocs=2)
    whole = torch.load(tmp_path / "1-0.pt")
    halves = [torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1)]
    for rank, half in enumerate(halves):
        for name, value in whole.items():
            expected = value[rank::2] if name in ("y", "dx") else value
            torch.testing.assert_close(half[name], expected, msg=lambda text, name=name: f"{name}: {text}")


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("method", ["den", "random", "blockdrop"])
def test_two_processes_train_as_one(method: str, tmp_path: Path) -> None:
    """Options that draw, average or count over a batch; in float64, though Fabric hands logits on in float32: the
    same weights, optimizers and log."""
    distributed_case.main(tmp_path / "1", 1, method)
    command = [sys.executable, "-m", "tests.distributed_case", str(tmp_path / "2"), "2", method]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=300, capture_output=True)
    for file in ("model", "trainer"):
        one, two = (load_file(tmp_path / f"{devices}/checkpoint/{file}.safetensors") for devices in (1, 2))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-7, rtol=1e-6, msg=lambda t, name=name: f"{name}: {t}")
    logs = [
        [json.loads(line) for line in (tmp_path / f"{devices}/metrics.jsonl").read_text().splitlines()]
        for devices in (1, 2)
    ]
    assert len(logs[0]) == {"den": 4, "random": 2, "blockdrop": 4}[method]
    for one, two in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if k not in ("seconds", "images_per_second")} == {
            k: v for k, v in two.items() if k not in ("seconds", "images_per_second")
        }
    assert json.loads((tmp_path / "1/summary.json").read_text()) == json.loads(
        (tmp_path / "2/summary.json").read_text()
    )

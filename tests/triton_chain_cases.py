"""Chains whose pre-activation blocks hand on activations (`den_kernels.backends.triton.chain`): against the reference
in float64, and bit for bit against blocks that work their pre-activations out by themselves.

Run as triton_interpreter_cases.py is, whose fixture fills new tensors with NaN: an activation that nobody wrote shows.
Suffixes: N samples, B blocks with levels.
"""

from __future__ import annotations

import pytest
import torch
from triton_interpreter_cases import _IDS, _close, _map, _poisoned_empty, _random  # noqa: F401

import den_kernels as dk
from den_kernels.backends import reference as reference_backend
from den_kernels.backends import triton as backend
from den_kernels.backends.triton import block as block_planner
from den_kernels.backends.triton import launch
from den_kernels.block import BlockArguments
from den_kernels.chain import alone, flatten, one_by_one

WIDTHS = (0, 8, 16, 32)


def _block(inputs: int, outputs: int, stride: int, widths=WIDTHS, pre=True, projects=False, seed=0) -> BlockArguments:
    """A basic block in the arguments of the reference and, packed, of the Triton backend: weights are [O, I, H, W]."""
    hidden, levels = widths[-1], len(widths)
    weights = [_random(hidden, inputs, 3, 3, seed=seed), _random(outputs, hidden, 3, 3, seed=seed + 1)]
    scale, shift = ([_random(levels, o, seed=seed + s) for o in (hidden, outputs)] for s in (2, 3))
    norm = [_random(inputs, seed=seed + s) if pre else None for s in (4, 5)]
    projection = [_random(outputs, inputs, 1, 1) / inputs**0.5] + [_random(levels, outputs, seed=s) for s in (6, 7)]
    return BlockArguments(
        torch.tensor(widths, dtype=torch.int32),
        [w / (3 * w.shape[1] ** 0.5) for w in weights],
        scale,
        shift,
        *norm,
        [3, 3],
        [stride, 1],
        [1, 1],
        projection if projects else [],
        not pre,
    )


CHAINS = (
    "one map",
    "a map, then a smaller one",
    "projections",
    "a projection in place",
    "one level among four",
    "other levels",
    "no level 0",
    "post-activation",
)


def _chains() -> dict[str, list[BlockArguments]]:
    """By what stands next to each other; made where a test's device is."""
    same = [_block(16, 16, 1, seed=10 * b) for b in range(4)]
    down = _block(16, 24, 2, seed=50)
    return {
        "one map": same,
        "a map, then a smaller one": [*same[:2], down, _block(24, 24, 1, seed=60)],
        "projections": [_block(8, 16, 1, projects=True), same[0], _block(16, 24, 2, projects=True), _block(24, 24, 1)],
        "a projection in place": [same[0], _block(16, 16, 1, projects=True, seed=70), same[1]],
        "one level among four": [same[0], _block(16, 16, 1, (16,)), _block(16, 16, 1, (16,), seed=80), same[1]],
        "other levels": [same[0], same[1], _block(16, 16, 1, (0, 16)), _block(16, 16, 1, (0, 16), seed=90)],
        "no level 0": [same[0], _block(16, 16, 1, (8, 16)), _block(16, 16, 1, (8, 32), seed=90)],
        "post-activation": [same[0], _block(16, 16, 1, pre=False), same[1], same[2]],
    }


def _run(residual_chain, x, level_NB, blocks, dtype, packed) -> torch.Tensor:
    """A chain of blocks on levels that are taken below the number that each has."""
    levels = [len(block.widths) for block in blocks]
    rows_BN = level_NB.t()[: sum(l > 1 for l in levels)] % torch.tensor([[l] for l in levels if l > 1])
    plan = dk.plan_levels(rows_BN.t(), max(levels))
    pack = backend.pack_weight if packed else lambda weight, groups: weight
    moved = [
        block._replace(
            weight=[pack(w.to(dtype), 1) for w in block.weight],
            projection=[pack(t.to(dtype), 1) if t.dim() == 4 else t for t in block.projection],
        )
        for block in blocks
    ]
    tensors, spec = flatten(moved)
    channels = blocks[-1].scale[-1].shape[1]
    height, columns = (-(-size // torch.Size(b.output[1] for b in blocks).numel()) for size in x.shape[2:])
    out = torch.empty(len(x), channels, height, columns, dtype=dtype, memory_format=torch.channels_last)
    residual_chain(x.to(dtype), out, *plan, tensors, spec)
    return out


by_themselves = one_by_one(alone(backend.residual_block), backend.fused_conv2d)


@pytest.fixture
def planned(monkeypatch):
    """The launches of what runs, in order."""
    found: list = []
    monkeypatch.setattr(launch, "run", lambda one, device, run=launch.run: (found.append(one), run(one, device)))
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CHAINS] + [(CHAINS[1], dtype) for dtype in _IDS if dtype != torch.float32],
)
def test_a_chain_equals_the_reference(name, dtype, planned):
    blocks = _chains()[name]
    # Blocks that run behind one or two that do not, and the other way round, at levels that differ.
    ran = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]])
    level_NB = ran * (1 + (torch.arange(len(ran))[:, None] + torch.arange(4)) % 3)
    x = _map(len(ran), blocks[0].weight[0].shape[1], 2, 2, dtype)
    got = _run(backend.residual_chain, x, level_NB, blocks, dtype, True)
    activating = [one for one in planned if one.arguments.get("pre_scale_ptr") is not None]
    behind = [block for block, front in zip(blocks[1:], blocks, strict=False) if block.pre_scale is not None]
    assert len(behind) >= 2
    assert len(activating) == 1  # the first block's alone
    _close(got, _run(reference_backend.residual_chain, x, level_NB, blocks, torch.float64, False), dtype)
    assert torch.equal(got, _run(by_themselves, x, level_NB, blocks, dtype, True))


def test_sums_of_parts_are_handed_on(planned, monkeypatch):
    """As on a device with room for more programs than a small batch has tiles."""
    monkeypatch.setattr(block_planner, "multiprocessors", lambda device: 20)
    blocks = [_block(32, 32, 1, (0, 16, 48), seed=10 * b) for b in range(2)]
    level_NB = torch.tensor([[1, 2], [2, 0]])
    x = _map(2, 32, 4, 3)
    got = _run(backend.residual_chain, x, level_NB, blocks, torch.float32, True)
    assert any(one.constants.get("SUM_OF", 0) > 1 and one.arguments.get("activated_ptr") is not None for one in planned)
    wanted = _run(reference_backend.residual_chain, x, level_NB, blocks, torch.float64, False)
    _close(got, wanted, torch.float32)

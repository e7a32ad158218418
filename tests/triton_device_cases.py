"""What a kernel must do on its device beyond right numbers: repeat, replay, never wait, fit PyTorch's operators.

Not collected by itself: `benchmarks.gpu_validate` runs it on a GPU, test_triton_interpreter.py the part that the
interpreter can. The numbers are in triton_interpreter_cases.py. Suffixes: N samples, C channels, L levels.
"""

from __future__ import annotations

import os

import pytest
import torch
from den_cases import TWO_TASKS, bottleneck, image_shape, resnet, resnext, vary_paths, vgg, wrn

import den
import den_kernels as dk
from den.cuda_graph import captured
from den_kernels import reference
from den_kernels.block import BlockArguments
from den_kernels.chain import flatten

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
OPS = torch.ops.den_kernels
WIDTHS = (0, 8, 16, 32)
GEOMETRY = ((1, 1), (1, 1), (1, 1), 1)
MAKERS = (wrn, resnet, resnext, bottleneck, vgg)


@pytest.fixture(autouse=True)
def _on_the_device():
    """New tensors are there; convolutions that are compared with are in full float32."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with DEVICE:
        yield
    torch.backends.cudnn.allow_tf32 = allowed


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE)


def _map(*shape: int, seed: int = 0) -> torch.Tensor:
    return _random(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def _conv_arguments(requires_grad: bool = False) -> tuple:
    x, weight, bias = _map(3, 16, 3, 2), _random(32, 16, 3, 3) / 12, _random(32)
    widths = torch.tensor([16, 7, 0]), torch.tensor([32, 16, 3])
    return *(t.requires_grad_(requires_grad) for t in (x, weight, bias)), *widths, *GEOMETRY, "triton"


def _block() -> dk.FusedResidualBlock:
    weights = [_random(32, 16, 3, 3) / 12, _random(16, 32, 3, 3) / 17]
    tables = [_random(1, 4, 32), _random(1, 4, 16)]
    return dk.FusedResidualBlock(
        weights, tables, tables, WIDTHS, strides=(1, 1), pre_scale=_random(1, 16), pre_shift=_random(1, 16),
        backend="triton",
    )  # fmt: skip


def _plan(*levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return dk.plan_levels(torch.tensor(levels)[:, None], len(WIDTHS)).block(0)


def _calls() -> dict:
    """Work by name: a function of no arguments that returns tensors."""
    x, weight, _, in_width, out_width, *rest = _conv_arguments()
    grad, block, image = _map(3, 32, 3, 2, seed=1), _block(), _map(5, 16, 6, 6)
    levels = torch.tensor([[3, 0], [1, 2], [2, 3], [0, 0]])
    return {
        "conv2d": lambda: [OPS.conv2d(*_conv_arguments())],
        "conv2d_backward": lambda: OPS.conv2d_backward(
            grad, x, weight, in_width, out_width, *rest[:-1], [True, True, True], "triton"
        ),
        "residual_block": lambda: [block(image, *_plan(3, 0, 1, 2, 2))],
        "plan": lambda: dk.plan_levels(levels, 4),
    }


@pytest.mark.parametrize("name", ["conv2d", "conv2d_backward", "residual_block", "plan"])
def test_repeats_bit_for_bit(name):
    call = _calls()[name]
    first = [t.clone() for t in call()]
    for _ in range(1 if DEVICE.type == "cpu" else 10):
        for ours, theirs in zip(call(), first, strict=True):
            assert torch.equal(ours, theirs)


def test_opcheck_conv2d():
    torch.library.opcheck(OPS.conv2d.default, _conv_arguments(requires_grad=True))


def test_opcheck_blocks_and_plan():
    block, x = _block(), _map(2, 16, 2, 2)
    plan = _plan(1, 0)
    torch.library.opcheck(OPS.residual_block.default, (x, *plan, *block.arguments(), "triton"))
    torch.library.opcheck(OPS.residual_block_.default, (x, *plan, *block.arguments(), "triton"))
    plans = [torch.stack([rows, rows]) for rows in plan]
    chain = flatten([BlockArguments(*block.arguments())] * 2)
    torch.library.opcheck(OPS.residual_chain.default, (x, *plans, *chain, "triton"))
    torch.library.opcheck(OPS.plan.default, (torch.randint(0, 4, (5, 3)), 4))


@pytest.mark.parametrize("make", MAKERS)
def test_a_frozen_model_gives_the_models_logits(make):
    """All of it at once: stem, selector, plan, blocks, tail."""
    model = make(TWO_TASKS, task_norm="per_task").to(DEVICE)
    frozen = den.freeze(model, backend="triton")
    x = _random(2 if DEVICE.type == "cpu" else 9, *image_shape(make))
    level = torch.arange(len(x) * model.num_blocks).view(len(x), -1) % model.num_levels
    wanted = model.double()(x.double(), "b", level).logits
    torch.testing.assert_close(frozen(x, "b", level).logits.double(), wanted, rtol=1e-3, atol=1e-3)


@GPU
def test_a_graph_replays_right_with_other_levels():
    block, x = _block().to(DEVICE), _map(6, 16, 6, 6)
    level = torch.zeros(6, dtype=torch.int64)

    def call() -> tuple[torch.Tensor]:
        return (block(x, *dk.plan_levels(level[:, None], len(WIDTHS)).block(0)),)

    replay, (out,) = captured(call, DEVICE)
    for levels in ([0] * 6, [3] * 6, [3, 0, 1, 2, 0, 3], [0, 0, 0, 0, 0, 1]):
        level.copy_(torch.tensor(levels))
        replay()
        assert torch.equal(out, call()[0]), levels


@GPU
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_frozen_model_in_a_cuda_graph(make, dtype):
    model = make(TWO_TASKS, task_norm="per_task").to(DEVICE)
    vary_paths(model, _random(16, *image_shape(make)))
    plain = den.freeze(model, dtype, backend="triton")
    graphed = den.freeze(model, dtype, backend="triton", cuda_graph=(3, 8))
    paths = set()
    for seed, batch in enumerate((8, 3, 8, 8)):
        x = _random(batch, *image_shape(make), seed=seed)
        for task in TWO_TASKS:
            ours, theirs = graphed(x, task), plain(x, task)
            assert torch.equal(ours.level, theirs.level)
            assert torch.equal(ours.logits, theirs.logits)
            level = torch.randint(model.num_levels, (batch, model.num_blocks))
            assert torch.equal(graphed(x, task, level).logits, plain(x, task, level).logits)
            paths |= {tuple(path) for path in ours.level.tolist()}
    assert len(paths) > 1, "the images took one path: nothing was shown"
    with pytest.raises(ValueError, match="x has 4 images"):
        graphed(_random(4, *image_shape(make)))


@GPU
def test_nothing_waits_for_the_gpu():
    model = wrn(backend="triton").to(DEVICE)
    frozen, x = den.freeze(model, backend="triton"), _random(4, *image_shape(wrn))
    level = torch.randint(4, (4, model.num_blocks))
    estimator = model.train().estimator

    def step() -> None:
        estimator(x, level, "a").square().sum().backward()

    frozen(x)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        frozen(x)
        frozen(x, level=level)
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
def test_more_elements_than_32_bits_count():
    """Samples lie 64-bit offsets apart: the last one of a batch of 4 GiB."""
    samples, channels, size = 520, 64, 256
    x = torch.empty(samples, channels, size, size, dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x[-1] = _random(channels, size, size).bfloat16()
    weight = _random(16, channels, 1, 1).bfloat16() / 8
    width = torch.full((samples,), 0)
    width[-1] = channels
    got = dk.den_conv2d(x, weight, None, width, backend="triton")[-1:]
    wanted = reference.den_conv2d(x[-1:].double(), weight.double(), None, width[-1:])
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)

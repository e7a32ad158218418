"""Nothing between images and gradients asks a device for a value: "meta" tensors have none, and raise when asked."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from den_cases import MAKERS, image_shape

import den
from den.losses import levels_at, sample_levels
from den_kernels import ops
from den_kernels.backends import load

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
META = torch.device("meta")


def test_meta_tensors_have_no_values() -> None:
    """The instrument itself."""
    x = torch.ones(3, device="meta")
    for read in (lambda: x.sum().item(), lambda: x.tolist(), lambda: x.cpu()):
        with pytest.raises((NotImplementedError, RuntimeError)):
            read()


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_training_step_reads_nothing_back(make) -> None:
    model = make().to("meta").train()
    x = torch.empty(4, *image_shape(make), device="meta")
    level = torch.empty(4, model.num_blocks, dtype=torch.int64, device="meta")
    task = next(iter(model.tasks))
    out = model(x, task=task)
    loss = torch.nn.functional.cross_entropy(model(x, task=task, level=level).logits, level[:, 0])
    (loss + out.level_probs.sum()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_sampling_paths_reads_nothing_back() -> None:
    level = sample_levels(torch.empty(4, 3, 5, device="meta"), num_paths=2, epsilon=0.1)
    assert level.shape == (2, 4, 3)
    assert level.device.type == "meta"


def test_levels_follow_their_probabilities() -> None:
    """Evenly spread numbers hit each level as often as its probability says, and one of probability 0 never."""
    probs = torch.tensor([[[0, 0.25, 0.5, 0.25, 0], [0.1, 0.2, 0.3, 0.4, 0]]])
    steps = torch.linspace(0, 1 - 2**-24, 10001).view(-1, 1, 1).expand(-1, 1, 2)
    level = levels_at(probs, steps)
    share = torch.stack([(level == l).float().mean(0) for l in range(5)], -1)
    torch.testing.assert_close(share, probs, atol=2e-4, rtol=0)
    assert (share[probs == 0] == 0).all()


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_frozen_network_reads_nothing_back(make) -> None:
    frozen = den.freeze(make().to("meta"), backend="grouped")
    out = frozen(torch.empty(4, *image_shape(make), device="meta"), task=next(iter(frozen.tasks)))
    assert out.logits.shape[0] == 4
    assert out.level.device.type == "meta"


@pytest.fixture
def launches(monkeypatch):
    """The Triton backend as on a GPU, up to its launches, which are kept."""
    from den_kernels.backends import triton as backend
    from den_kernels.backends.triton import launch

    kept = []
    monkeypatch.setattr(launch, "run", lambda one, device: kept.append(one))
    monkeypatch.setattr(ops, "resolve", lambda name, device, dtype: backend)
    return kept


def _kernels(launches) -> list[str]:
    for one in launches:
        tensors = [value for value in one.arguments.values() if isinstance(value, torch.Tensor)]
        assert all(tensor.device == META for tensor in tensors)
        assert all(isinstance(value, int | float | torch.Tensor | None) for value in one.arguments.values())
    return [one.kernel.__name__ for one in launches]


@needs_triton
def test_operators_of_a_training_step_only_launch(launches) -> None:
    x, weight = torch.empty(64, 16, 8, 8, device=META), torch.empty(32, 16, 3, 3, device=META)
    bias, width = torch.empty(32, device=META), torch.empty(64, dtype=torch.int32, device=META)
    geometry = ((2, 2), (1, 1), (1, 1), 1)
    level, order, count = load("triton").plan_levels(torch.empty(64, 3, dtype=torch.int64, device=META), 4)
    assert [tuple(t.shape) for t in (level, order, count)] == [(3, 64), (3, 64), (3, 4)]
    y = ops._conv2d(x, weight, bias, width, width, *geometry, "triton")
    total = ops._conv2d_add(x, weight, y, width, *geometry, "triton")
    row, table = torch.empty(64, dtype=torch.int64, device=META), torch.empty(4, 32, device=META)
    z, *statistics = ops._batch_norm(total, row, width, table, table, 4, 1e-5, True, "triton")
    norm = ops._batch_norm_backward(z, y, row, width, table, table, *statistics, 1e-5, True, "triton")
    grads = ops._conv2d_backward(z, x, weight, width, width, *geometry, [True] * 3, "triton")
    for ours, like in zip((*norm, *grads), (y, table, table, x, weight, bias), strict=True):
        assert ours.shape == like.shape
        assert ours.device == META
    assert _kernels(launches) == [
        *("plan_kernel", "conv2d_kernel", "conv2d_kernel"),
        *("moments_kernel", "statistics_kernel", "normalise_kernel"),
        *("gradient_sums_kernel", "parameter_gradients_kernel", "input_gradient_kernel"),
        *("data_gradient_kernel", "members_kernel", "weight_gradient_kernel", "sum_kernel"),
        *("bias_gradient_kernel", "sum_kernel"),
    ]


@needs_triton
@pytest.mark.parametrize("samples", [1, 256])
def test_a_fused_block_only_launches(launches, samples) -> None:
    """A small batch of a small map has its reductions in parts; a batch that fills the device has not."""
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=META)  # noqa: E731
    x = empty(samples, 256, 8, 8).to(memory_format=torch.channels_last)
    integers = [empty(n, dtype=torch.int32) for n in (samples, samples, 4, 4)]
    weight, table = empty(256, 3, 3, 256), empty(4, 256)
    lists = [weight] * 2, [table] * 2, [table] * 2
    projection = [empty(256, 1, 1, 256), table, table]
    block = (*integers, *lists, None, None, [3, 3], [2, 1], [1, 1], projection, True)
    assert ops._residual_block(x, *block, "triton").shape == (samples, 256, 4, 4)
    small = ["projection_kernel", *["hidden_kernel"] * 2, *["last_kernel"] * 2]
    assert _kernels(launches) == (small if samples == 1 else ["projection_kernel", "hidden_kernel", "last_kernel"])

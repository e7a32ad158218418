"""The layers: an nn.Conv2d that is elastic, and batch norm over the samples that ran."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import den_kernels as dk


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (2, 1), "padding_mode": "circular", "groups": 2},
    ],
)
def test_without_level_it_is_conv2d(options: dict) -> None:
    plain = nn.Conv2d(4, 8, 3, **options)
    elastic = dk.DENConv2d(4, 8, 3, **options, out_widths=(0, 4, 8))
    assert isinstance(elastic, nn.Conv2d)
    assert elastic.state_dict().keys() == plain.state_dict().keys()
    elastic.load_state_dict(plain.state_dict())
    x = torch.randn(3, 4, 9, 9, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    assert torch.equal(elastic(x), plain(z))
    elastic(x).square().sum().backward()
    plain(z).square().sum().backward()
    assert torch.equal(x.grad, z.grad)
    assert torch.equal(elastic.weight.grad, plain.weight.grad)
    torch.testing.assert_close(elastic(x, level=2), plain(z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "replicate"}])
def test_padding_modes_with_levels(options: dict) -> None:
    conv = dk.DENConv2d(4, 8, 3, **options, in_widths=(1, 4), out_widths=(2, 8))
    x = torch.randn(2, 4, 7, 7)
    y = conv(x, torch.tensor([0, 1]))
    small = nn.Conv2d(1, 2, 3, **options)
    small.weight.data, small.bias.data = conv.weight.data[:2, :1], conv.bias.data[:2]
    torch.testing.assert_close(y[:1, :2], small(x[:1, :1]))
    assert (y[0, 2:] == 0).all()
    torch.testing.assert_close(y[1:], conv(x[1:]))


def test_from_conv_shares_parameters_and_repr_prints() -> None:
    plain = nn.Conv2d(4, 8, 3, padding=1).eval()
    elastic = dk.DENConv2d.from_conv(plain, out_widths=(4, 8))
    assert elastic.weight is plain.weight
    assert not elastic.training
    assert "out_widths=(4, 8)" in repr(elastic)
    assert "kernel_size=(3, 3)" in repr(elastic)
    with pytest.raises(TypeError, match="conv is Linear"):
        dk.DENConv2d.from_conv(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("widths", "groups"), [((4, 2, 8), 1), ((0, 4), 1), ((-1, 8), 1), ((), 1), ((3, 8), 2)], ids=str
)
def test_bad_widths_are_named(widths: tuple, groups: int) -> None:
    with pytest.raises(ValueError, match="out_widths is"):
        dk.DENConv2d(4, 8, 3, groups=groups, out_widths=widths)


def test_bad_levels_are_named() -> None:
    conv = dk.DENConv2d(4, 8, 3, out_widths=(4, 8))
    x = torch.zeros(2, 4, 5, 5)
    for level, error, message in (
        (torch.tensor([0, 2]), ValueError, "level holds 2; it must be between 0 and 1"),
        (torch.tensor([-1, 0]), ValueError, "level holds -1"),
        (torch.tensor([0.0, 1.0]), TypeError, "level is torch.float32"),
        (torch.tensor([0]), ValueError, "level has shape"),
        (2, ValueError, "level is 2"),
    ):
        with pytest.raises(error, match=message):
            conv(x, level)


BACKENDS = [name for name in dk.available_backends() if name not in ("reference", "triton")]


def elastic_linear(backend: str, dtype: torch.dtype, bias: bool = True, unit: int = 7) -> tuple[dk.DENLinear, dict]:
    """A layer of 3 -> 4 units of features, elastic on both sides, and the levels and widths of 9 rows."""
    torch.manual_seed(0)
    tables = {"in_widths": (0, unit, 2 * unit, 3 * unit), "out_widths": (unit, unit, 2 * unit, 4 * unit)}
    layer = dk.DENLinear(3 * unit, 4 * unit, bias, dtype=dtype, backend=backend, **tables)
    level = torch.tensor([3, 0, 2, 1, 1, 3, 2, 0, 2])
    widths = {name[:-1]: torch.tensor(table)[level] for name, table in tables.items()}
    return layer, {"level": level, **widths}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_is_the_reference_in_value_and_gradient(backend: str, bias: bool) -> None:
    layer, case = elastic_linear(backend, torch.float32, bias)
    x = torch.randn(9, 21, requires_grad=True)
    leaves = {"dx": x, "dweight": layer.weight, **({"dbias": layer.bias} if bias else {})}
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves.values()]
    wanted = dk.reference.den_linear(
        *exact[:2], exact[2] if bias else None, in_width=case["in_width"], out_width=case["out_width"]
    )
    y = layer(x, case["level"])
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-6)
    beyond = torch.arange(28) >= case["out_width"][:, None]
    assert (y[beyond] == 0).all()
    grad = torch.randn(9, 28)
    wanted_grads = torch.autograd.grad(wanted, exact, grad.double())
    for name, ours, theirs in zip(leaves, torch.autograd.grad(y, [*leaves.values()], grad), wanted_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_linear_reference_is_the_masked_layer() -> None:
    """Widths as zeros: on both sides of an ordinary layer."""
    layer, case = elastic_linear("reference", torch.float64)
    x = torch.randn(9, 21, dtype=torch.float64)
    reads, writes = (torch.arange(n) < case[name][:, None] for n, name in ((21, "in_width"), (28, "out_width")))
    wanted = F.linear(x * reads, layer.weight, layer.bias) * writes
    ours = dk.reference.den_linear(x, layer.weight, layer.bias, case["in_width"], case["out_width"])
    torch.testing.assert_close(ours, wanted)
    assert torch.equal(dk.reference.den_linear(x[:0], layer.weight, layer.bias), x.new_empty(0, 28))


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_reads_nothing_beyond_the_widths_and_knows_no_batch_mates(backend: str) -> None:
    # A unit of 16: with odd ones PyTorch's own 1x1 convolution, which `grouped` calls, rounds by a row's place.
    layer, case = elastic_linear(backend, torch.float32, unit=16)
    x, level = torch.randn(9, 48), case["level"]
    y = layer(x, level)
    poisoned = torch.where(torch.arange(48) < case["in_width"][:, None], x, torch.nan)
    assert torch.equal(layer(poisoned, level), y)
    order = torch.tensor([4, 8, 0, 2, 6, 1, 3, 7, 5])
    assert torch.equal(layer(x[order], level[order]), y[order])
    others, levels = torch.randn_like(x), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 3])
    others[6], levels[6] = x[6], level[6]
    assert torch.equal(layer(others, levels)[6], y[6])


def test_linear_weight_gradient_of_features_that_no_row_ran_is_zero() -> None:
    layer, _ = elastic_linear("auto", torch.float32)
    layer(torch.randn(4, 21), torch.tensor([0, 1, 1, 2])).square().sum().backward()
    assert (layer.weight.grad[14:] == 0).all()
    assert (layer.weight.grad[:, 14:] == 0).all()
    assert (layer.bias.grad[14:] == 0).all()
    assert (layer.weight.grad[:14, 7:14].abs().sum(1) > 0).all()


def test_linear_without_level_is_nn_linear() -> None:
    layer, _ = elastic_linear("grouped", torch.float32)
    plain = nn.Linear(21, 28)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 21)
    assert torch.equal(layer(x), plain(x))
    torch.testing.assert_close(layer(x[0], 3), plain(x[0]))
    assert "in_widths=(0, 7, 14, 21)" in repr(layer)
    assert layer.num_levels == 4
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x[0], 3).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 21\)"):
        layer(x, 3)
    with pytest.raises(ValueError, match="out_widths is"):
        dk.DENLinear(4, 8, out_widths=(4, 2, 8))
    with pytest.raises(ValueError, match="in_widths has 1 levels, but out_widths has 2"):
        dk.DENLinear(4, 8, in_widths=(4,), out_widths=(4, 8))


def batch_norm_by_loop(x, level, width, weight, bias, num_levels, eps):
    """Each row and channel normalised over exactly the samples that ran it."""
    y = torch.zeros_like(x)
    for row in range(num_levels):
        for c in range(x.shape[1]):
            members = (level == row) & (width > c)
            if members.any():
                values = x[members, c]
                normal = (values - values.mean()) / (values.var(unbiased=False) + eps).sqrt()
                y[members, c] = normal * weight[row, c] + bias[row, c]
    return y


def test_batch_norm_over_the_samples_that_ran() -> None:
    torch.manual_seed(0)
    norm = dk.DENBatchNorm2d(6, num_levels=3, num_sets=2, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(9, 6, 4, 5, dtype=torch.float64) * 3 + 7
    level = torch.tensor([0, 0, 2, 2, 2, 0, 2, 0, 2])
    width = torch.tensor([6, 3, 6, 2, 0, 1, 5, 6, 3])
    leaves = [x.requires_grad_(), norm.weight, norm.bias]
    expected = batch_norm_by_loop(x, level, width, norm.weight[3:], norm.bias[3:], 3, norm.eps)
    y = norm(x, level, width, set_index=1)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    names = ("dx", "dweight", "dbias")
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    for name, ours, theirs in zip(names, torch.autograd.grad(y, leaves, grad), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")

    assert norm.num_batches_tracked.tolist() == [0, 0, 0, 1, 0, 1]
    untouched = [0, 1, 2, 4]
    assert (norm.running_mean[untouched] == 0).all()
    assert (norm.running_var[untouched] == 1).all()
    members = (level == 2) & (width > 4)
    torch.testing.assert_close(norm.running_mean[5, 4], 0.1 * x[members, 4].mean().detach())
    torch.testing.assert_close(norm.running_var[5, 4], 0.9 + 0.1 * x[members, 4].var().detach())

    norm.eval()
    scale, shift = norm.scale_shift(1)
    expected = (x * scale[level][:, :, None, None] + shift[level][:, :, None, None]) * (
        torch.arange(6) < width.view(-1, 1)
    )[:, :, None, None]
    torch.testing.assert_close(norm(x, level, width, set_index=1), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", dk.available_backends())
def test_batch_norm_with_a_relu(training: bool, backend: str) -> None:
    if backend == "triton":
        pytest.skip("takes the tensors of a GPU")
    torch.manual_seed(0)
    x, width = torch.randn(5, 6, 4, 4), torch.tensor([6, 0, 2, 4, 6])
    norms = [dk.DENBatchNorm2d(6, backend=backend).train(training) for _ in range(2)]
    leaves = [x.clone().requires_grad_() for _ in norms]
    ours, theirs = norms[0](leaves[0], width=width, relu=True), F.relu(norms[1](leaves[1], width=width))
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(x)
    gradients = [
        torch.autograd.grad(y, (leaf, norm.weight, norm.bias), grad)
        for y, leaf, norm in zip((ours, theirs), leaves, norms, strict=True)
    ]
    for name, a, b in zip(("dx", "dweight", "dbias"), *gradients, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(norms[0].running_var, norms[1].running_var)


@pytest.mark.parametrize("training", [True, False])
def test_plain_batch_norm_equals_torch(training: bool) -> None:
    ours, theirs = dk.DENBatchNorm2d(5).train(training), nn.BatchNorm2d(5).train(training)
    x = torch.randn(4, 5, 6, 6) * 2 + 1
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean[0], theirs.running_mean)
    torch.testing.assert_close(ours.running_var[0], theirs.running_var)


def test_batch_norm_errors() -> None:
    with pytest.raises(ValueError, match="num_levels is 0"):
        dk.DENBatchNorm2d(4, 0)
    norm = dk.DENBatchNorm2d(4, 2)
    with pytest.raises(ValueError, match="x has shape"):
        norm(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="set_index is 1"):
        norm(torch.zeros(2, 4, 4, 4), set_index=1)

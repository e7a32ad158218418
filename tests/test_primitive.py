"""The primitive on every backend of this machine against the specification: values, gradients, exactness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import den_kernels as dk

BACKENDS = [name for name in dk.available_backends() if name not in ("reference", "triton")]
NAN = float("nan")


@st.composite
def conv_cases(draw) -> dict:
    """A convolution of any geometry with widths for each sample."""
    groups = draw(st.sampled_from((1, 1, 1, 2, 4)))
    per_group_in, per_group_out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    channels, outputs = groups * per_group_in, groups * per_group_out
    kernel = draw(st.tuples(st.sampled_from((1, 2, 3, 5)), st.sampled_from((1, 3, 4))))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, dilation[d] * (kernel[d] - 1) + 1 - 2 * padding[d]) for d in (0, 1)]
    size = [draw(st.integers(least[d], least[d] + 9)) for d in (0, 1)]
    n = draw(st.integers(1, 9))
    step_in, step_out = (1, 1) if groups == 1 else (per_group_in, per_group_out)
    widths = [
        draw(st.none() | st.lists(st.integers(0, total // step).map(lambda k, s=step: k * s), min_size=n, max_size=n))
        for total, step in ((channels, step_in), (outputs, step_out))
    ]
    return {
        "shape": (n, channels, *size),
        "weight_shape": (outputs, per_group_in, *kernel),
        "bias": draw(st.booleans()),
        "in_width": widths[0],
        "out_width": widths[1],
        "channels_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
        "geometry": {
            "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        },
    }


def tensors(case: dict, dtype: torch.dtype) -> tuple:
    """x, weight, bias, in_width, out_width of a case, made in float64 and rounded."""
    g = torch.Generator().manual_seed(case["seed"])
    x = torch.randn(case["shape"], generator=g, dtype=torch.float64)
    weight = torch.randn(case["weight_shape"], generator=g, dtype=torch.float64)
    bias = torch.randn(case["weight_shape"][0], generator=g, dtype=torch.float64) if case["bias"] else None
    if case["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    widths = [None if w is None else torch.tensor(w, dtype=torch.int64) for w in (case["in_width"], case["out_width"])]
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *widths


def poison(x: Tensor, width: Tensor | None) -> Tensor:
    """x with NaN in the channels that must not be read."""
    if width is None:
        return x
    inactive = torch.arange(x.shape[1]) >= width.view(-1, 1)
    return x.masked_fill(inactive[:, :, None, None], NAN)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest error over largest value, named."""
    assert actual.shape == expected.shape, name
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max()
        bound = tolerance * max(1.0, float(expected.abs().max()))
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"


def gradients(function, x, weight, bias, grad, *widths, **geometry) -> list[Tensor | None]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(leaves[0], leaves[1], leaves[2] if bias is not None else None, *widths, **geometry)
    return list(torch.autograd.grad(y, leaves, grad.to(y.dtype), materialize_grads=True, allow_unused=True))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=conv_cases())
@settings(max_examples=60, deadline=None)
def test_forward_equals_reference(backend: str, case: dict) -> None:
    x, weight, bias, *widths = tensors(case, torch.float64)
    expected = dk.reference.den_conv2d(x, weight, bias, *widths, **case["geometry"])
    y = dk.den_conv2d(
        poison(x, widths[0]).float(),
        weight.float(),
        None if bias is None else bias.float(),
        *widths,
        **case["geometry"],
        backend=backend,
    )
    assert_close("y", y, expected, 2e-5)
    if widths[1] is not None:
        inactive = torch.arange(y.shape[1]) >= widths[1].view(-1, 1)
        assert (y[inactive] == 0).all(), "an inactive output channel is not exactly 0"


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=conv_cases())
@settings(max_examples=40, deadline=None)
def test_gradients_equal_reference(backend: str, case: dict) -> None:
    x, weight, bias, *widths = tensors(case, torch.float64)
    expected_y = dk.reference.den_conv2d(x, weight, bias, *widths, **case["geometry"])
    grad = torch.randn(expected_y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = gradients(dk.reference.den_conv2d, x, weight, bias, grad, *widths, **case["geometry"])

    def run(*args, **kwargs):
        return dk.den_conv2d(*args, **kwargs, backend=backend)

    args = [x.float(), weight.float(), None if bias is None else bias.float()]
    actual = gradients(run, *args, grad.float(), *widths, **case["geometry"])
    for name, ours, theirs in zip(("dx", "dweight", "dbias"), actual, expected, strict=False):
        assert_close(name, ours, theirs, 5e-5)
    if widths[1] is not None and case["geometry"]["groups"] == 1:
        unused = torch.arange(weight.shape[0]) >= widths[1].max()
        assert (actual[1][unused] == 0).all(), "dweight of channels that no sample ran is not exactly 0"


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=conv_cases())
@settings(max_examples=20, deadline=None)
def test_on_a_residual_equals_reference(backend: str, case: dict) -> None:
    x, weight, _, in_width, _ = tensors(case, torch.float64)
    geometry = case["geometry"]
    residual = torch.randn_like(dk.reference.den_conv2d(x, weight, None, in_width, None, **geometry))
    grad = torch.randn_like(residual)

    def run(function, dtype, **more):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, residual)]
        y = function(*leaves, **more)
        grads = torch.autograd.grad(y, leaves, grad.to(dtype), materialize_grads=True, allow_unused=True)
        return [y.detach(), *grads]

    def specified(x, weight, residual):
        return residual + dk.reference.den_conv2d(x, weight, None, in_width, None, **geometry)

    def operator(x, weight, residual):
        return dk.den_conv2d(x, weight, None, in_width, residual=residual, backend=backend, **geometry)

    results = zip(run(operator, torch.float32), run(specified, torch.float64), strict=True)
    for name, (ours, theirs) in zip(("y", "dx", "dweight", "dresidual"), results, strict=True):
        assert_close(name, ours, theirs, 5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=conv_cases(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_result_is_independent_of_batch_mates(backend: str, case: dict, data) -> None:
    x, weight, bias, *widths = tensors(case, torch.float32)
    n = x.shape[0]
    y = dk.den_conv2d(x, weight, bias, *widths, **case["geometry"], backend=backend)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    kept = int(order[0])
    other = torch.randn_like(x[order])
    other[0] = x[kept]
    if case["channels_last"]:
        other = other.contiguous(memory_format=torch.channels_last)
    totals = (x.shape[1], weight.shape[0])
    mixed = []
    for width, total in zip(widths, totals, strict=True):
        if width is not None:
            step = total // case["geometry"]["groups"] if case["geometry"]["groups"] > 1 else 1
            drawn = data.draw(st.lists(st.integers(0, total // step), min_size=n, max_size=n))
            width = torch.cat([width[kept : kept + 1], torch.tensor(drawn[1:], dtype=torch.int64) * step])
        mixed.append(width)
    z = dk.den_conv2d(other, weight, bias, *mixed, **case["geometry"], backend=backend)
    assert torch.equal(z[0], y[kept]), "a sample's result changed with its batch mates"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(backend: str, batch: int) -> None:
    x, weight = torch.randn(batch, 8, 6, 5), torch.randn(16, 8, 3, 3)
    width = torch.full((batch,), 4)
    x.requires_grad_()
    weight.requires_grad_()
    y = dk.den_conv2d(x, weight, None, None, width, padding=1, backend=backend)
    assert y.shape == (batch, 16, 6, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape
    assert (weight.grad[4:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 8, 6, 5).to(dtype), torch.randn(16, 8, 3, 3).to(dtype)
    in_width, out_width = torch.tensor([8, 4, 2]), torch.tensor([4, 16, 0])
    y = dk.den_conv2d(x, weight, None, in_width, out_width, padding=1, backend=backend)
    expected = dk.reference.den_conv2d(x.double(), weight.double(), None, in_width, out_width, padding=1)
    assert y.dtype == dtype
    assert_close("y", y, expected, {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_width_is_conv2d(backend: str) -> None:
    x, weight, bias = torch.randn(5, 8, 9, 9), torch.randn(12, 8, 3, 3), torch.randn(12)
    expected = torch.nn.functional.conv2d(x, weight, bias, 2, 1)
    assert torch.equal(dk.den_conv2d(x, weight, bias, stride=2, padding=1, backend=backend), expected)
    full = dk.den_conv2d(
        x, weight, bias, torch.full((5,), 8), torch.full((5,), 12), stride=2, padding=1, backend=backend
    )
    assert_close("y", full, expected, 1e-5)

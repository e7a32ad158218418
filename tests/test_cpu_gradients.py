"""The C++ kernels of training against float64: gradients of the convolution, batch norm, the convolution on a residual.

Every instruction set of this machine, one to three threads whose bits must agree, NaN in whatever must not be read and
in buffers that must be written. N samples, C channels, R rows of statistics.
"""

from __future__ import annotations

import pytest
import torch
from cpu_cases import convolutions, isas, outputs_start_as_nan, poison, widths
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from den_kernels import reference
from den_kernels.backends import batch_norm as plain
from den_kernels.backends import cpu


def poisoned(x: Tensor, width: Tensor | None) -> Tensor:
    """x in float32 and channels_last, with NaN in the channels beyond each sample's width."""
    return poison(x.detach().float().clone(memory_format=torch.channels_last), width)


def run_with_threads(isa: str, run):
    """Results of `run`, the same bits with 1, 2 and 3 threads and in a second call, in memory that was NaN."""
    cpu.set_isa(isa)
    results = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        with outputs_start_as_nan():
            results.append(run())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a, b), "the bits depend on the number of threads or the call"
    return results[0]


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest error over largest value, named."""
    assert actual.shape == expected.shape, name
    if expected.numel():
        bound = tolerance * max(1.0, float(expected.abs().max()))
        error = float((actual.double() - expected).abs().max())
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"


# The convolution


@st.composite
def winograd_convolutions(draw):
    """3x3 of stride 1 with channels and tiles enough for Winograd's weight gradient; ragged maps and widths too."""
    groups = draw(st.sampled_from([1, 1, 2]))
    group_in, group_out = (draw(st.sampled_from([16, 20, 33, 48, 64])) for _ in range(2))
    samples = draw(st.sampled_from([5, 16, 33]))
    size = draw(st.sampled_from([(20, 13), (8, 8), (15, 34), (47, 4)]))
    return {
        "shape": (samples, groups * group_in, *size),
        "weight": (groups * group_out, group_in, 3, 3),
        "in_width": widths(draw, groups * group_in, group_in if groups > 1 else 1, samples),
        "out_width": widths(draw, groups * group_out, group_out if groups > 1 else 1, samples),
        "geometry": ((1, 1), (draw(st.integers(0, 3)), draw(st.integers(0, 3))), (1, 1), groups),
        "seed": draw(st.integers(0, 1000)),
    }


def check_gradients(isa: str, case: dict, tolerance: float) -> None:
    torch.manual_seed(case["seed"])
    stride, padding, dilation, groups = case["geometry"]
    in_width, out_width = case["in_width"], case["out_width"]
    x, weight = (
        torch.randn(case["shape"]).double().requires_grad_(),
        torch.randn(case["weight"]).double().requires_grad_(),
    )
    bias = torch.zeros(weight.shape[0]).double().requires_grad_()
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    y = reference.den_conv2d(x, weight, bias, in_width, out_width, **geometry)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, weight, bias), grad, materialize_grads=True, allow_unused=True)

    x_f, grad_f, weight_f = poisoned(x, in_width), poisoned(grad, out_width), weight.detach().float()
    arguments = (grad_f, x_f, weight_f, in_width, out_width, *case["geometry"])
    actual = run_with_threads(isa, lambda: cpu.conv2d_backward(*arguments, (True, True, True)))
    for name, ours, theirs in zip(("dx", "dweight", "dbias"), actual, expected, strict=True):
        close(name, ours, theirs, tolerance)
    unread = torch.zeros(x.shape[:2], dtype=torch.bool)
    if in_width is not None:
        unread = torch.arange(x.shape[1]) >= in_width.view(-1, 1)
    assert (actual[0][unread] == 0).all(), "dx of a channel that was not read is not exactly 0"
    if out_width is not None and groups == 1:
        assert (actual[1][int(out_width.max()) :] == 0).all(), "dweight of channels that no sample ran is not exactly 0"
    if in_width is not None and groups == 1:
        assert (actual[1][:, int(in_width.max()) :] == 0).all()


@isas
@settings(max_examples=50, deadline=None)
@given(case=convolutions())
def test_gradients_equal_the_reference(isa, case) -> None:
    check_gradients(isa, case, 5e-6)


@isas
@settings(max_examples=8, deadline=None)
@given(case=winograd_convolutions())
def test_winograd_gradients_equal_the_reference(isa, case) -> None:
    check_gradients(isa, case, 2e-5)


@isas
def test_only_what_is_asked_for(isa) -> None:
    x, weight = torch.randn(3, 8, 6, 6), torch.randn(16, 8, 3, 3)
    grad = torch.randn(3, 16, 6, 6)
    width = torch.tensor([16, 4, 0])
    rest = (None, width, (1, 1), (1, 1), (1, 1), 1)
    everything = run_with_threads(isa, lambda: cpu.conv2d_backward(grad, x, weight, *rest, (True,) * 3))
    for i in range(3):
        mask = tuple(i == j for j in range(3))
        some = run_with_threads(isa, lambda mask=mask: cpu.conv2d_backward(grad, x, weight, *rest, mask))
        assert torch.equal(some[i], everything[i])
        assert [g is not None for g in some] == list(mask)


@isas
@pytest.mark.parametrize("stride", [1, 2])
def test_dx_of_a_sample_does_not_depend_on_batch_mates(isa, stride: int) -> None:
    cpu.set_isa(isa)
    x, weight = torch.randn(4, 24, 12, 12), torch.randn(40, 24, 3, 3)
    grad = torch.randn(4, 40, 12 // stride, 12 // stride)
    geometry = ((stride, stride), (1, 1), (1, 1), 1)
    results = []
    for mates in (0, 13, 40):
        width = torch.tensor([mates, 27, mates, mates])
        results.append(cpu.conv2d_backward(grad, x, weight, None, width, *geometry, (True, False, False))[0][1])
        moved = torch.tensor([2, 0, 3, 1])
        parts = (t[moved] for t in (grad, x))
        dx = cpu.conv2d_backward(*parts, weight, None, width[moved], *geometry, (True, False, False))[0]
        results.append(dx[3])
    assert all(torch.equal(r, results[0]) for r in results)


# On a residual


@isas
@settings(max_examples=30, deadline=None)
@given(case=convolutions())
def test_a_convolution_on_a_residual(isa, case) -> None:
    torch.manual_seed(case["seed"])
    stride, padding, dilation, groups = case["geometry"]
    x, weight = torch.randn(case["shape"]), torch.randn(case["weight"])
    in_width = case["in_width"]
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    convolved = reference.den_conv2d(x.double(), weight.double(), None, in_width, None, **geometry)
    residual = torch.randn(convolved.shape)
    residual[:, ::3] = -0.0
    arguments = (poisoned(x, in_width), weight, residual, in_width, *case["geometry"])
    (y,) = run_with_threads(isa, lambda: (cpu.conv2d_add(*arguments),))
    close("y", y, convolved + residual, 1e-5)
    for n, width in enumerate([] if in_width is None else in_width.tolist()):
        if width == 0:
            same = y[n].contiguous().view(torch.int32), residual[n].view(torch.int32)
            assert torch.equal(*same), "a sample of width 0 is not its residual bit for bit"


# Batch norm


@st.composite
def norms(draw):
    samples, rows = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    channels = draw(st.sampled_from([1, 3, 16, 20, 37, 64, 100]))
    few = st.lists(st.integers(0, channels), min_size=samples, max_size=samples)
    width = draw(st.one_of(st.none(), few))
    return {
        "shape": (samples, channels, draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        "rows": rows,
        "row": draw(st.lists(st.integers(0, rows - 1), min_size=samples, max_size=samples)) if rows > 1 else None,
        "width": width,
        "affine": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "mean": draw(st.sampled_from([0.0, 30.0])),
        "seed": draw(st.integers(0, 1000)),
    }


@isas
@settings(max_examples=50, deadline=None)
@given(case=norms())
def test_batch_norm_equals_plain_pytorch(isa, case) -> None:
    torch.manual_seed(case["seed"])
    x = (torch.randn(case["shape"]) * 3 + case["mean"]).double()
    row, width = (None if case[k] is None else torch.tensor(case[k]) for k in ("row", "width"))
    tables = [torch.randn(case["rows"], x.shape[1]) if case["affine"] else None for _ in range(2)]
    doubles = [None if t is None else t.double() for t in tables]
    options = (case["rows"], 1e-5, case["relu"])
    expected = plain.batch_norm(x, row, width, *doubles, *options)
    x_f = poisoned(x, width)
    actual = run_with_threads(isa, lambda: cpu.batch_norm(x_f, row, width, *tables, *options))
    for name, ours, theirs in zip(("y", "mean", "var", "count"), actual, expected, strict=True):
        close(name, ours, theirs, 2e-5)
    inactive = torch.arange(x.shape[1]) >= (torch.full(x.shape[:1], x.shape[1]) if width is None else width).view(-1, 1)
    assert (actual[0][inactive] == 0).all(), "y of a channel that was not run is not exactly 0"

    # Where the ReLU is within rounding of its kink, either side is right: no gradient comes from there.
    before = plain.batch_norm(x, row, width, *doubles, case["rows"], 1e-5, False)[0]
    grad = torch.randn_like(x) * (before.abs() > 1e-4)
    steepest = 1 + float(torch.rsqrt(expected[2][expected[3] > 0] + 1e-5).max()) if (expected[3] > 0).any() else 1
    expected = plain.batch_norm_backward(grad, x, row, width, *doubles, *expected[1:], *options[1:])
    grad_f = poisoned(grad, width)
    actual = run_with_threads(
        isa, lambda s=actual[1:]: cpu.batch_norm_backward(grad_f, x_f, row, width, *tables, *s, *options[1:])
    )
    for name, ours, theirs in zip(("dx", "dweight", "dbias"), actual, expected, strict=True):
        close(name, ours, theirs, 2e-5 * steepest)  # a sum that nearly cancels, times 1 / sqrt(var + eps)
    assert (actual[0][inactive] == 0).all(), "dx of a channel that was not run is not exactly 0"


@pytest.mark.parametrize(
    ("row", "width", "message"),
    [
        ([0, 2], None, r"row\[1\] is 2; it must be between 0 and 1"),
        (None, [4, 9], r"width\[1\] is 9; it must be between 0 and the 8 channels"),
    ],
)
def test_batch_norm_names_what_is_out_of_range(row, width, message) -> None:
    row, width = (None if values is None else torch.tensor(values) for values in (row, width))
    with pytest.raises(ValueError, match=message):
        cpu.batch_norm(torch.zeros(2, 8, 3, 3), row, width, None, None, 2, 1e-5, False)

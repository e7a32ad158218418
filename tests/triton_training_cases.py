"""What training adds, against the specification in float64, and the plan of a batch.

Run as triton_interpreter_cases.py is.
"""

from __future__ import annotations

import pytest
import torch
from triton_interpreter_cases import (
    CONVS,
    DEVICE,
    DTYPES,
    TOLERANCE,
    _close,
    _combinations,
    _map,
    _poison,
    _poisoned_empty,  # noqa: F401 - a fixture of this file too
    _random,
)

from den_kernels import reference
from den_kernels.backends import batch_norm as plain
from den_kernels.backends import triton as backend
from den_kernels.backends.triton import configs, launch, plan, weight_gradient
from den_kernels.plan import plan_levels

# Further walks over the taps for the data gradient: phases that meet some taps, and phases that meet none.
STRIDED = {
    "strided and dilated": (8, 9, (3, 2), (2, 3), (2, 1), (2, 2), 1, [8, 3, 5], [9, 4, 1]),
    "stride past the kernel": (16, 16, (1, 1), (3, 2), (0, 0), (1, 1), 1, [16, 3, 16], [16, 16, 4]),
}


@pytest.mark.parametrize(("samples", "blocks", "levels"), [(1, 1, 1), (9, 4, 3), (40, 3, 5), (37, 2, 4)])
def test_plan_equals_plain_pytorch(samples, blocks, levels, monkeypatch):
    """With tiles of 16 samples, so that the last case's order runs over three of them."""
    monkeypatch.setattr(plan, "_TILE", 16)
    generator = torch.Generator().manual_seed(samples)
    level = torch.randint(levels, (samples, blocks), generator=generator, device="cpu").to(DEVICE)
    for case in (level, level.int(), level.t().contiguous().t(), torch.zeros_like(level), level * 3 - 2):
        for name, got, want in zip(
            ("level", "order", "count"), backend.plan_levels(case, levels), plan_levels(case, levels), strict=True
        ):
            assert torch.equal(got, want), name


def test_plan_of_no_samples():
    level, order, count = backend.plan_levels(torch.zeros(0, 3, dtype=torch.int64), 4)
    assert level.shape == order.shape == (3, 0)
    assert torch.equal(count, torch.zeros(3, 4, dtype=torch.int32))


def _gradients(x, weight, bias, in_width, out_width, grad, **options):
    """Of x, weight and bias in float64, by autograd over the specification's loop of slices."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = reference.den_conv2d(*leaves, in_width, out_width, **options)
    return torch.autograd.grad(y, leaves, grad.double(), materialize_grads=True, allow_unused=True)


@_combinations(*CONVS, *STRIDED)
def test_conv2d_backward(name, widths, dtype):
    c, o, kernel, stride, padding, dilation, groups, in_width, out_width = (CONVS | STRIDED)[name]
    in_width = torch.tensor(in_width) if widths != "none" else None
    out_width = torch.tensor(out_width, dtype=torch.int32) if widths == "both" else None
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x, weight, bias = (
        _map(3, c, 5, 4, dtype),
        _random(o, c // groups, *kernel, dtype=dtype) / 8,
        _random(o, dtype=dtype),
    )
    grad = _random(*reference.den_conv2d(x.float(), weight.float(), **geometry).shape, seed=5, dtype=dtype) / 4
    if in_width is not None:
        _poison(x, in_width)
    if out_width is not None:
        _poison(grad, out_width)
    want = _gradients(x, weight, bias, in_width, out_width, grad, **geometry)
    got = backend.conv2d_backward(grad, x, weight, in_width, out_width, *geometry.values(), (True, True, True))
    for what, ours, theirs in zip(("dx", "dweight", "dbias"), got, want, strict=True):
        assert ours.dtype == dtype, what
        torch.testing.assert_close(
            ours.double(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=lambda m, what=what: f"{what}: {m}"
        )
        assert (ours[theirs == 0] == 0).all(), what


def test_conv2d_backward_makes_what_is_asked_for():
    x, weight, grad = _map(2, 6, 4, 4), _random(8, 6, 3, 3), _map(2, 8, 4, 4, seed=1)
    run = lambda *mask: backend.conv2d_backward(  # noqa: E731
        grad, x, weight, None, torch.tensor([3, 8]), (1, 1), (1, 1), (1, 1), 1, mask
    )
    every = run(True, True, True)
    for i in range(3):
        some = run(*(i == j for j in range(3)))
        assert [t.numel() > 0 for t in some] == [i == j for j in range(3)]
        assert torch.equal(some[i], every[i])


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "parts"),
    [
        ((1, 1), (1, 1), (1, 1), 1),
        ((3, 4), (1, 1), (1, 1), 1),
        ((5, 5), (1, 1), (1, 1), 2),
        ((8, 8), (1, 1), (1, 1), 6),
        ((5, 5), (3, 1), (1, 1), 2),
        ((7, 9), (1, 3), (1, 1), 2),
        ((14, 9), (3, 1), (2, 1), 2),
    ],
    ids=str,
)
def test_weight_gradient_in_any_number_of_parts(size, kernel, stride, parts, monkeypatch):
    """Maps of fewer pixels than a step, and of several, with padding or none; samples that skip; one part to many."""
    monkeypatch.setattr(weight_gradient, "multiprocessors", lambda device: 7)
    planned = []
    monkeypatch.setattr(launch, "run", lambda one, device, run=launch.run: (planned.append(one), run(one, device)))
    monkeypatch.setattr(configs, "_FAMILIES", {"fp32": ((16,), (16,), (16,), configs._fp32)})
    x, weight = _map(6, 20, *size), _random(24, 20, *kernel)
    grad = _map(6, 24, *(-(-pixels // step) for pixels, step in zip(size, stride, strict=True)), seed=1)
    in_width, out_width = torch.tensor([20, 16, 3, 0, 20, 17]), torch.tensor([24, 0, 16, 24, 5, 24])
    arguments = (_poison(grad, out_width), _poison(x, in_width), weight, in_width, out_width)
    padding = (kernel[0] // 2, kernel[1] // 2)
    run = lambda: backend.conv2d_backward(  # noqa: E731
        *arguments, stride, padding, (1, 1), 1, (False, True, True)
    )
    (_, dweight, dbias), again = run(), run()
    assert planned[1].arguments["splits"] == parts
    options = {"stride": stride, "padding": padding}
    _, want, want_bias = _gradients(x, weight, grad.new_zeros(24), in_width, out_width, grad, **options)
    torch.testing.assert_close(dweight.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dbias.double(), want_bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(dweight, again[1])
    assert torch.equal(dbias, again[2])


def test_data_gradient_does_not_depend_on_batch_mates():
    x, weight, grad = _map(4, 32, 6, 6), _random(32, 32, 3, 3), _map(4, 32, 3, 3, seed=1)
    in_width, out_width = torch.tensor([32, 8, 16, 0]), torch.tensor([8, 32, 24, 16])
    other = torch.tensor([3, 0, 1, 2])
    run = lambda order: backend.conv2d_backward(  # noqa: E731
        grad[order],
        x[order],
        weight,
        in_width[order],
        out_width[order],
        (2, 2),
        (1, 1),
        (1, 1),
        1,
        (True, False, False),
    )[0]
    assert torch.equal(run(torch.arange(4))[other], run(other))


def test_gradients_of_samples_that_all_skip_are_zero():
    x, weight, grad = _map(2, 16, 4, 4), _random(16, 16, 3, 3), _map(2, 16, 4, 4, seed=1)
    nothing = torch.zeros(2, dtype=torch.int32)
    for widths in ((nothing, None), (None, nothing), (nothing, nothing)):
        dx, dweight, _ = backend.conv2d_backward(
            grad, x, weight, *widths, (1, 1), (1, 1), (1, 1), 1, (True, True, False)
        )
        assert not dx.any()
        assert not dweight.any()


@DTYPES
def test_conv2d_add(dtype):
    x, weight, residual = _map(3, 16, 5, 5, dtype), _random(20, 16, 3, 3, dtype=dtype) / 8, _map(3, 20, 5, 5, dtype)
    residual[1, 0, 0, 0] = -0.0
    in_width = torch.tensor([16, 0, 5])
    got = backend.conv2d_add(_poison(x, in_width), weight, residual, in_width, (1, 1), (1, 1), (1, 1), 1)
    want = reference.den_conv2d(x.double(), weight.double(), None, in_width, padding=1) + residual.double()
    _close(got, want, dtype)
    assert torch.equal(*(t[1].contiguous().view(torch.int16) for t in (got, residual)))


@pytest.mark.parametrize(
    ("rows", "widths", "affine", "relu", "dtype"),
    [
        (1, False, True, True, torch.float32),
        (1, True, True, True, torch.float16),
        (3, True, True, True, torch.float32),
        (3, True, False, False, torch.float32),
    ],
)
def test_batch_norm(rows, widths, affine, relu, dtype):
    """Row 1 is run by no sample, one sample by no channel; the maps have two tiles of pixels and of channels."""
    x, grad = _map(5, 80, 9, 9, dtype) * 3 + 1, _map(5, 80, 9, 9, dtype, seed=1)
    row = torch.tensor([0, 2, 2, 0, 2]) if rows > 1 else None
    width = torch.tensor([80, 64, 20, 0, 7], dtype=torch.int32) if widths else None
    weight, bias = (_random(rows, 80, seed=s) for s in (2, 3)) if affine else (None, None)
    double = [None if t is None else t.double() for t in (x, weight, bias, grad)]
    y, *want = plain.batch_norm(double[0], row, width, *double[1:3], rows, 1e-3, relu)
    gradients = plain.batch_norm_backward(double[3], double[0], row, width, *double[1:3], *want, 1e-3, relu)
    if width is not None:
        _poison(x, width), _poison(grad, width)
    ours = backend.batch_norm(x, row, width, weight, bias, rows, 1e-3, relu)
    back = backend.batch_norm_backward(grad, x, row, width, weight, bias, *ours[1:], 1e-3, relu)
    names = ("y", "mean", "var", "count", "dx", "dweight", "dbias")
    for name, got, right in zip(names, (*ours, *back), (y, *want, *gradients), strict=True):
        tolerance = 2e-2 if dtype == torch.float16 else 2e-4 if name in ("dweight", "dbias") else 2e-5
        torch.testing.assert_close(
            got.double(), right, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (got[right == 0] == 0).all(), name
    again = backend.batch_norm(x, row, width, weight, bias, rows, 1e-3, relu)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_batch_norm_of_a_large_mean():
    """A variance far below the square of the mean, which a sum of squares would lose."""
    x = _map(3, 16, 6, 6) + 1000
    _, mean, var, _ = backend.batch_norm(x, None, None, None, None, 1, 1e-5, False)
    want_var, want_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean[0].double(), want_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var[0].double(), want_var, rtol=1e-3, atol=0)

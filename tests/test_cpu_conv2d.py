"""The elastic convolution of the C++ kernels against `den_kernels.reference` in float64: every instruction set of this
machine, float32 and bfloat16, poisoned inputs and outputs, batch mates that must not matter. N samples, C channels."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import NAN, channels_beyond, convolutions, dtypes, isas, outputs_start_as_nan, poison, widths
from hypothesis import given, settings
from hypothesis import strategies as st

from den_kernels import reference
from den_kernels.backends import cpu


def assert_exact_to_rounding(actual, expected) -> None:
    """Sums in float32, then one rounding to the dtype: within its epsilon of the float64 value."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    rtol = 1e-6 if actual.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=1e-5 * largest)


@isas
@dtypes
@settings(max_examples=80, deadline=None)
@given(
    case=convolutions(),
    has_bias=st.booleans(),
    channels_last=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
    threads=st.integers(1, 3),
)
def test_equals_the_reference(isa, dtype, case, has_bias, channels_last, index, threads) -> None:
    cpu.set_isa(isa)
    torch.set_num_threads(threads)
    torch.manual_seed(case["seed"])
    x, weight = torch.randn(case["shape"]).to(dtype), (torch.randn(case["weight"]) * 0.1).to(dtype)
    bias = torch.randn(weight.shape[0]).to(dtype) if has_bias else None
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    in_width, out_width = (None if w is None else w.to(index) for w in (case["in_width"], case["out_width"]))
    stride, padding, dilation, groups = case["geometry"]
    expected = reference.den_conv2d(
        x.double(),
        weight.double(),
        None if bias is None else bias.double(),
        in_width,
        out_width,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    poison(x, in_width)
    with outputs_start_as_nan():
        y = cpu.conv2d(x, weight, bias, in_width, out_width, *case["geometry"])
    assert y.dtype == dtype
    assert_exact_to_rounding(y, expected)
    for beyond in channels_beyond(y, out_width):
        assert torch.equal(beyond, torch.zeros_like(beyond))
    if channels_last:
        assert y.is_contiguous(memory_format=torch.channels_last)


@isas
@dtypes
def test_sample_does_not_depend_on_batch_mates_or_threads(isa, dtype) -> None:
    cpu.set_isa(isa)
    x = torch.randn(5, 40, 13, 13).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(72, 40, 3, 3).to(dtype), torch.randn(72).to(dtype)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for others in (0, 7, 40):
            in_width = torch.tensor([others, 19, others, 40, others])
            out_width = torch.tensor([72, 53, others, 72, 1])
            results.append(cpu.conv2d(x, weight, bias, in_width, out_width, *geometry)[[1, 3]])
            permuted = torch.tensor([4, 3, 0, 1, 2])
            y = cpu.conv2d(x[permuted], weight, bias, in_width[permuted], out_width[permuted], *geometry)
            results.append(y[[3, 1]])
    assert all(torch.equal(r, results[0]) for r in results)


@st.composite
def tiled_cases(draw):
    """Convolutions with enough tiles for Winograd's algorithm."""
    samples, outputs = draw(st.integers(4, 7)), draw(st.integers(16, 70))
    channels = draw(st.integers(16, 50) | st.sampled_from((16, 32, 48)))  # whole blocks are read without a copy
    return {
        "shape": (samples, channels, draw(st.integers(11, 19)), draw(st.integers(11, 19))),
        "outputs": outputs,
        "in_width": widths(draw, channels, 1, samples),
        "out_width": widths(draw, outputs, 1, samples),
        "padding": (draw(st.sampled_from((0, 1, 2, 9))), draw(st.sampled_from((0, 1, 2, 9)))),  # 9: whole tiles of it
        "extra": draw(st.sampled_from(["nothing", "bias", "residual"])),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 1000)),
    }


@isas
@dtypes
@settings(max_examples=40, deadline=None)
@given(case=tiled_cases())
def test_winograd_equals_the_reference(isa, dtype, case) -> None:
    cpu.set_isa(isa)
    torch.set_num_threads(case["threads"])
    torch.manual_seed(case["seed"])
    x = torch.randn(case["shape"]).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(case["outputs"], x.shape[1], 3, 3) * 0.1).to(dtype)
    bias = torch.randn(case["outputs"]).to(dtype) if case["extra"] == "bias" else None
    in_width, out_width = case["in_width"], case["out_width"]
    expected = reference.den_conv2d(
        x.double(),
        weight.double(),
        None if bias is None else bias.double(),
        in_width,
        out_width,
        padding=case["padding"],
    )
    residual = torch.randn(expected.shape).to(dtype) if case["extra"] == "residual" else None
    if residual is not None:
        expected = expected + residual.double()
    poison(x, in_width)
    y = cpu.conv2d(x, weight, bias, in_width, out_width, (1, 1), case["padding"], (1, 1), 1, residual)
    largest = float(expected.abs().max())
    rtol = 0.0 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=3e-5 * largest)
    if residual is None:
        for beyond in channels_beyond(y, out_width):
            assert torch.equal(beyond, torch.zeros_like(beyond))
    elif in_width is not None:
        assert torch.equal(y[in_width == 0], residual[in_width == 0]), "width 0 is the residual, bit for bit"


@isas
@dtypes
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((1, 1), (2, 2), (0, 0), (1, 1)),
        ((1, 3), (3, 1), (0, 1), (1, 2)),
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((5, 3), (2, 2), (4, 0), (2, 1)),
    ],
)
def test_a_map_larger_than_the_cache(isa, dtype, kernel, stride, padding, dilation) -> None:
    """One thread takes it a band of rows after the other, several threads all at once: the same bits."""
    cpu.set_isa(isa)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 96, 61, 50).to(dtype), (torch.randn(40, 96, *kernel) * 0.05).to(dtype)
    in_width, out_width = torch.tensor([96, 33]), torch.tensor([40, 25])
    expected = reference.den_conv2d(
        x.double(), weight.double(), None, in_width, out_width, stride=stride, padding=padding, dilation=dilation
    )
    x[1, 33:] = NAN
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(cpu.conv2d(x, weight, None, in_width, out_width, stride, padding, dilation, 1))
    assert_exact_to_rounding(results[0], expected)
    assert torch.equal(*results)


# What tiles of pixels and channels meet: channels, their widths, outputs, their widths, size, kernel, groups.
FORMS = {
    "channels of less than a tile": (64, (16, 30), 32, (32, 16), (16, 16), 3, 1),
    "whole tiles and a part": (80, (80, 34), 48, (48, 17), (9, 17), 3, 1),
    "a width inside a pair": (40, (33, 7), 16, (16, 9), (8, 8), 3, 1),
    "rows joined over their padding": (32, (32, 16), 33, (33, 8), (7, 4), 3, 1),
    "one pixel": (64, (64, 32), 64, (64, 48), (1, 1), 3, 1),
    "more tiles than are listed at once": (32, (32, 32), 16, (16, 16), (70, 23), 3, 1),
    "1x1, pixel by pixel": (96, (96, 64), 64, (64, 32), (30, 21), 1, 1),
    "1x1, outputs one by one": (64, (64, 16), 80, (80, 48), (13, 5), 1, 1),
    "1x1 of many weights": (1056, (1056, 64), 544, (544, 512), (3, 5), 1, 1),
    "groups of a block": (128, None, 96, None, (8, 9), 3, 4),
    "groups inside a block": (64, None, 64, None, (6, 16), 3, 8),
    "groups across blocks": (96, None, 48, None, (6, 5), 3, 4),
}


@isas
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_bfloat16_of_every_form(isa, form) -> None:
    channels, in_widths, outputs, out_widths, size, kernel, groups = form
    cpu.set_isa(isa)
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(outputs, channels // groups, kernel, kernel) * 0.1).bfloat16()
    in_width, out_width = (None if widths is None else torch.tensor(widths) for widths in (in_widths, out_widths))
    expected = reference.den_conv2d(
        x.double(), weight.double(), None, in_width, out_width, padding=kernel // 2, groups=groups
    )
    poison(x, in_width)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y = cpu.conv2d(x, weight, None, in_width, out_width, (1, 1), (kernel // 2,) * 2, (1, 1), groups)
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=3e-5 * float(expected.abs().max()))
        results.append(y)
    assert torch.equal(*results), "cutting the work for threads changes no bit"


@isas
@dtypes
@pytest.mark.parametrize("width", [8, 27])
@pytest.mark.parametrize("samples", [1, 4], ids=["direct", "winograd"])
def test_weights_beyond_the_widths_are_not_read(isa, dtype, width, samples) -> None:
    cpu.set_isa(isa)
    x, weight = torch.randn(samples, 40, 9, 9).to(dtype), torch.randn(72, 40, 3, 3).to(dtype)
    width_N, geometry = torch.full((samples,), width), ((1, 1), (1, 1), (1, 1), 1)
    expected = cpu.conv2d(x, weight, None, width_N, width_N, *geometry)
    weight[:, width:], weight[width:] = NAN, NAN
    assert torch.equal(cpu.conv2d(x, weight, None, width_N, width_N, *geometry), expected)


@isas
def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(isa) -> None:
    cpu.set_isa(isa)
    # 1 + k / 256 lies on a rounding tie of bfloat16 for odd k; 1 + k / 512 between ties.
    terms = torch.arange(1, 18) / 512
    x = torch.stack([torch.ones(17), terms], 1)[..., None, None].bfloat16()
    x = torch.cat([x, torch.full((1, 2, 1, 1), NAN).bfloat16(), torch.full((1, 2, 1, 1), float("inf")).bfloat16()])
    weight = torch.ones(20, 2, 1, 1, dtype=torch.bfloat16)
    y = cpu.conv2d(x, weight, None, None, None, (1, 1), (0, 0), (1, 1), 1)
    expected = x.float().sum(1, keepdim=True).bfloat16().expand(-1, 20, -1, -1)
    assert torch.equal(y[:17], expected[:17])
    assert y[17].isnan().all()
    assert torch.equal(y[18], expected[18])


@pytest.mark.parametrize(
    ("in_width", "out_width", "groups", "message"),
    [
        ([1, 9], None, 1, r"in_width\[1\] is 9; it must be between 0 and the 8 channels"),
        ([-1, 2], None, 1, r"in_width\[0\] is -1;"),
        (None, [0, 13], 1, r"out_width\[1\] is 13; it must be between 0 and the 12 channels"),
        ([8, 2], None, 2, r"in_width\[1\] is 2; with groups=2 it must be a multiple of 4 channels"),
        (None, [7, 6], 2, r"out_width\[0\] is 7; with groups=2 it must be a multiple of 6 channels"),
    ],
)
def test_names_a_width_out_of_range(in_width, out_width, groups, message) -> None:
    x, weight = torch.zeros(2, 8, 5, 5), torch.zeros(12, 8 // groups, 3, 3)
    widths = (None if w is None else torch.tensor(w) for w in (in_width, out_width))
    with pytest.raises(ValueError, match=message):
        cpu.conv2d(x, weight, None, *widths, (1, 1), (1, 1), (1, 1), groups)

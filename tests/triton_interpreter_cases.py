"""Every kernel against the specification: on CPU tensors in the interpreter (test_triton_interpreter.py), or on a GPU
(`benchmarks.gpu_validate`).

The interpreter checks logic only; it is blind to races and layouts. Its bfloat16 products are wrong, so there the half
case is float16. Shapes are tiny because a program takes milliseconds. Suffixes: N samples, C channels, H W space, L
levels.
"""

from __future__ import annotations

import os

import pytest
import torch

from den_kernels import reference
from den_kernels.backends import triton as backend
from den_kernels.backends.triton import block as block_planner
from den_kernels.backends.triton import configs, launch
from den_kernels.fused import FusedResidualBlock
from den_kernels.fused_conv import FusedConv2d
from den_kernels.plan import plan_levels

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_IDS = {torch.float32: "fp32", torch.float16: "fp16"} | ({torch.bfloat16: "bf16"} if DEVICE.type == "cuda" else {})
DTYPES = pytest.mark.parametrize("dtype", list(_IDS), ids=list(_IDS.values()))


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """New tensors are on the device, and torch.empty is filled with NaN, outputs and the hidden buffer included."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with DEVICE:
        yield
    torch.use_deterministic_algorithms(False)


def _random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)


def _map(n, c, h, w, dtype=torch.float32, seed=0):
    return _random(n, c, h, w, seed=seed, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _close(got, want, dtype):
    torch.testing.assert_close(got.double(), want.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def _poison(x, width_N):
    for n, width in enumerate(width_N.tolist()):
        x[n, width:] = float("nan")
    return x


# channels, outputs, kernel, stride, padding, dilation, groups, in_width, out_width
CONVS = {
    "3x3": (20, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1, [20, 5, 0], [40, 13, 0]),
    "3x3 aligned": (32, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1, [32, 16, 7], [16, 32, 8]),
    "1x1": (48, 17, (1, 1), (1, 1), (0, 0), (1, 1), 1, [48, 1, 33], [17, 16, 1]),
    "stride 2": (16, 16, (3, 3), (2, 2), (1, 1), (1, 1), 1, [4, 8, 16], [16, 8, 4]),
    "uneven": (6, 9, (2, 3), (1, 2), (0, 2), (2, 1), 1, [6, 2, 3], [9, 4, 1]),
    "groups": (24, 48, (3, 3), (1, 1), (1, 1), (1, 1), 2, [24, 12, 0], [48, 24, 24]),
    "narrow groups": (16, 32, (3, 3), (1, 1), (1, 1), (1, 1), 8, [16, 6, 2], [32, 12, 8]),
    "depthwise": (20, 20, (3, 3), (1, 1), (1, 1), (1, 1), 20, [20, 7, 1], [20, 3, 2]),
}
HALF = ("3x3 aligned", "stride 2", "uneven", "narrow groups")


def _combinations(*names):
    """Each geometry with both widths in float32; other widths and the half dtypes with some."""
    cases = [(name, "both", torch.float32) for name in names]
    cases += [(name, widths, torch.float32) for name in ("1x1", "stride 2", "groups") for widths in ("in", "none")]
    cases += [(name, "both", dtype) for name in HALF for dtype in _IDS if dtype != torch.float32]
    return pytest.mark.parametrize(("name", "widths", "dtype"), cases, ids=[f"{n}-{w}-{_IDS[d]}" for n, w, d in cases])


@_combinations(*CONVS)
def test_conv2d(name, widths, dtype):
    c, o, kernel, stride, padding, dilation, groups, in_width, out_width = CONVS[name]
    in_width = torch.tensor(in_width) if widths != "none" else None
    out_width = torch.tensor(out_width, dtype=torch.int32) if widths == "both" else None
    x = _map(3, c, 7, 5, dtype)
    if in_width is not None:
        _poison(x, in_width)
    weight, bias = _random(o, c // groups, *kernel, dtype=dtype) / 8, _random(o, dtype=dtype)
    got = backend.conv2d(x, weight, bias, in_width, out_width, stride, padding, dilation, groups)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    want = reference.den_conv2d(x.double(), weight.double(), bias.double(), in_width, out_width, **options)
    assert got.dtype == dtype
    _close(got, want, dtype)
    if out_width is not None:
        for n, width in enumerate(out_width.tolist()):
            assert (got[n, width:] == 0).all()


def test_conv2d_takes_any_layout_and_no_bias():
    x, weight = _random(2, 6, 5, 4), _random(8, 6, 3, 3)
    width = torch.tensor([3, 6])
    got = backend.conv2d(x, weight, None, width, None, (1, 1), (1, 1), (1, 1), 1)
    _close(got, reference.den_conv2d(x.double(), weight.double(), None, width, padding=1), torch.float32)


def test_conv2d_clamps_widths_out_of_range():
    x, weight = _map(2, 6, 5, 4), _random(8, 6, 3, 3)
    wild, tame = torch.tensor([2**40, -3]), torch.tensor([6, 0])
    got = backend.conv2d(x, weight, None, wild, wild, (1, 1), (1, 1), (1, 1), 1)
    want = reference.den_conv2d(x.double(), weight.double(), None, tame, torch.tensor([8, 0]), padding=1)
    _close(got, want, torch.float32)


def test_conv2d_of_no_samples():
    x, weight = _map(0, 6, 5, 4), _random(8, 6, 3, 3)
    empty = torch.zeros(0, dtype=torch.int32)
    assert backend.conv2d(x, weight, None, empty, empty, (1, 1), (1, 1), (1, 1), 1).shape == (0, 8, 5, 4)


def test_conv2d_does_not_depend_on_batch_mates():
    x, weight = _map(4, 32, 6, 6), _random(32, 32, 3, 3)
    in_width, out_width = torch.tensor([32, 8, 16, 0]), torch.tensor([8, 32, 24, 16])
    other = torch.tensor([3, 0, 1, 2])
    run = lambda order: backend.conv2d(  # noqa: E731
        x[order], weight, None, in_width[order], out_width[order], (1, 1), (1, 1), (1, 1), 1
    )
    assert torch.equal(run(torch.arange(4))[other], run(other))


# in, out, kernel, stride, groups, widths read and made
FUSED_CONVS = {
    "3x3": (20, 40, 3, 1, 1, (5, 20, 20), (13, 13, 40)),
    "aligned": (32, 32, 3, 1, 1, (8, 16, 32), (16, 32, 32)),
    "1x1": (48, 17, 1, 1, 1, (1, 33, 48), (17, 17, 17)),
    "stride 2": (16, 24, 3, 2, 1, (16, 16, 16), (4, 8, 24)),
    "groups": (24, 48, 3, 1, 2, (12, 12, 24), (24, 24, 48)),
}


@DTYPES
@pytest.mark.parametrize("name", FUSED_CONVS)
def test_fused_conv2d(name, dtype):
    c, o, kernel, stride, groups, read, made = FUSED_CONVS[name]
    level = torch.tensor([2, 0, 1, 1], dtype=torch.int32)
    x = _poison(_map(4, c, 7, 5, dtype), torch.tensor(read)[level.long()])
    weight = _random(o, c // groups, kernel, kernel, dtype=dtype) / 8
    scale, shift = _random(3, o), _random(3, o, seed=1)
    inside = torch.arange(o) < torch.tensor(made)[:, None]
    size = [-(-side // stride) for side in (7, 5)]
    out = torch.empty(4, o, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    widths = [torch.tensor(values, dtype=torch.int32) for values in (read, made)]
    tables = scale * inside, shift * inside
    packed = backend.pack_weight(weight, groups)
    backend.fused_conv2d(x, out, level, level, *widths, packed, *tables, kernel, stride, groups, True)
    options = {"in_widths": read, "out_widths": made, "stride": stride, "groups": groups, "relu": True}
    want = reference.fused_conv2d(x.double(), level, weight.double(), scale.double(), shift.double(), **options)
    _close(out, want, dtype)
    for n, l in enumerate(level.tolist()):
        assert (out[n, made[l] :] == 0).all()


# in, hidden, out, kernels, strides, groups, widths
BLOCKS = {
    "basic": (16, 32, 16, (3, 3), (1, 1), (1, 1), (0, 8, 16, 32)),
    "odd widths": (9, 21, 9, (3, 3), (1, 1), (1, 1), (0, 5, 11, 21)),
    "stride and more channels": (8, 16, 20, (3, 3), (2, 1), (1, 1), (0, 4, 8, 16)),
    "stride in the second": (8, 16, 8, (3, 3), (1, 2), (1, 1), (0, 4, 16)),
    "no level 0": (16, 16, 16, (3, 3), (1, 1), (1, 1), (8, 16)),
    "one level": (16, 16, 16, (3, 3), (1, 1), (1, 1), (16,)),
    "bottleneck": (32, 16, 32, (1, 3, 1), (1, 1, 1), (1, 1, 1), (0, 4, 8, 16)),
    "bottleneck stride 3": (8, 16, 24, (1, 3, 1), (1, 3, 1), (1, 1, 1), (0, 3, 16)),
    "paths": (16, 32, 16, (1, 3, 1), (1, 1, 1), (1, 2, 1), (0, 16, 32)),
    "narrow paths": (16, 32, 16, (1, 3, 1), (1, 2, 1), (1, 8, 1), (0, 4, 12, 32)),
    "deep": (32, 48, 32, (3, 3), (1, 1), (1, 1), (0, 16, 48)),
    "deep, strided": (32, 32, 48, (3, 3), (2, 1), (1, 1), (0, 8, 32)),
    "wide groups": (16, 64, 16, (1, 3, 1), (1, 1, 1), (1, 2, 1), (0, 32, 64)),
    "uneven paths": (16, 48, 16, (1, 3, 1), (1, 1, 1), (1, 4, 1), (0, 12, 36, 48)),
}
PARTED = ("deep", "deep, strided", "wide groups")  # for reductions in parts


class _Block:
    def __init__(self, name, dtype=torch.float32, pre=False, relu=True, projection=False):
        c, hidden, self.out, self.kernels, self.strides, self.groups, self.widths = BLOCKS[name]
        self.channels, self.relu, self.dtype = c, relu, dtype
        ins = [c] + [hidden] * (len(self.kernels) - 1)
        outs = [hidden] * (len(self.kernels) - 1) + [self.out]
        self.weight = [
            _random(o, i // g, k, k, dtype=dtype) / (k * (i // g) ** 0.5)
            for o, i, g, k in zip(outs, ins, self.groups, self.kernels, strict=True)
        ]
        levels = len(self.widths)
        self.scale = [_random(levels, o, seed=1) for o in outs]
        self.shift = [_random(levels, o, seed=2) for o in outs]
        self.pre_scale = _random(c, seed=3) if pre else None
        self.pre_shift = _random(c, seed=4) if pre else None
        self.projection = []
        if projection:
            self.projection = [_random(self.out, c, 1, 1, seed=5, dtype=dtype) / c**0.5]
            self.projection += [_random(levels, self.out, seed=seed) for seed in (6, 7)]

    def reference(self, x, level, dtype=torch.float64):
        return reference.residual_block(
            x.to(dtype),
            level,
            self.widths,
            [w.to(dtype) for w in self.weight],
            [table.to(dtype) for table in self.scale],
            [table.to(dtype) for table in self.shift],
            pre_scale=self.pre_scale if self.pre_scale is None else self.pre_scale.to(dtype),
            pre_shift=self.pre_shift if self.pre_shift is None else self.pre_shift.to(dtype),
            stride=self.strides,
            groups=self.groups,
            projection=[t.to(dtype) for t in self.projection],
            relu=self.relu,
        )

    def run(self, x, level, out=None):
        _, order, count = plan_levels(level[:, None], len(self.widths))
        step = torch.Size(self.strides).numel()
        if out is None:
            shape = (x.shape[0], self.out, -(-x.shape[2] // step), -(-x.shape[3] // step))
            out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        backend.residual_block(
            x,
            out,
            level,
            order[0],
            count[0],
            torch.tensor(self.widths, dtype=torch.int32),
            [backend.pack_weight(w, g) for w, g in zip(self.weight, self.groups, strict=True)],
            self.scale,
            self.shift,
            self.pre_scale,
            self.pre_shift,
            self.kernels,
            self.strides,
            self.groups,
            [backend.pack_weight(self.projection[0], 1), *self.projection[1:]] if self.projection else [],
            self.relu,
        )
        return out


def _levels(block, n):
    return (torch.arange(n, dtype=torch.int32) + 1) % len(block.widths)


@DTYPES
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in PARTED])
def test_residual_block(name, dtype):
    block = _Block(name, dtype)
    x = _map(4, block.channels, 7, 5, dtype)
    level = _levels(block, 4)
    _close(block.run(x, level), block.reference(x, level), dtype)


@DTYPES
@pytest.mark.parametrize("name", ["basic", "odd widths", "stride and more channels", "bottleneck"])
def test_residual_block_with_pre_activation(name, dtype):
    block = _Block(name, dtype, pre=True, relu=False)
    x = _map(4, block.channels, 7, 5, dtype)
    level = _levels(block, 4)
    _close(block.run(x, level), block.reference(x, level), dtype)


@pytest.mark.parametrize("name", ["basic", "stride and more channels", "bottleneck stride 3", "narrow paths"])
def test_level_0_is_the_shortcut_bit_for_bit(name):
    block = _Block(name)
    x = _map(3, block.channels, 7, 5)
    x[1, 0, 0, 0] = -0.0
    level = torch.tensor([len(block.widths) - 1, 0, 0], dtype=torch.int32)
    if block.widths[0] == 0:
        got, want = block.run(x, level)[1:], block.reference(x, level, x.dtype)[1:]
        assert torch.equal(got.contiguous().view(torch.int32), want.contiguous().view(torch.int32))


@pytest.mark.parametrize("name", ["basic", "odd widths", "bottleneck"])
def test_in_place(name):
    block = _Block(name)
    x = _map(4, block.channels, 7, 5)
    level = torch.tensor([1, 0, 2, 3], dtype=torch.int32)
    want = block.run(x, level)
    got = x.clone(memory_format=torch.preserve_format)
    block.run(got, level, out=got)
    assert torch.equal(got, want)


@DTYPES
@pytest.mark.parametrize("name", ["basic", "stride and more channels", "bottleneck stride 3"])
def test_projection(name, dtype):
    """A sample at level 0 is its projection, without the ReLU."""
    block = _Block(name, dtype, projection=True)
    x = _map(4, block.channels, 7, 5, dtype)
    level = _levels(block, 4)
    got = block.run(x, level)
    _close(got, block.reference(x, level), dtype)
    assert (got[level == 0] < 0).any()


def test_projection_in_place():
    block = _Block("basic", projection=True)
    x = _map(3, block.channels, 5, 5)
    level = torch.tensor([1, 0, 3], dtype=torch.int32)
    want = block.run(x, level)
    got = x.clone(memory_format=torch.preserve_format)
    block.run(got, level, out=got)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("name", "pre", "projection"),
    [("basic", True, False), ("deep", False, False), ("deep, strided", False, True), ("wide groups", False, False)],
)
def test_parts_of_a_reduction_are_added_in_order(name, pre, projection, monkeypatch):
    """As on a device with room for more programs than a small batch has tiles."""
    monkeypatch.setattr(block_planner, "multiprocessors", lambda device: 20)
    planned = []
    monkeypatch.setattr(launch, "run", lambda one, device, run=launch.run: (planned.append(one), run(one, device)))
    block = _Block(name, pre=pre, relu=not pre, projection=projection)
    x = _map(2, block.channels, 4, 3)
    level = torch.tensor([1, 0], dtype=torch.int32)
    got = block.run(x, level)
    assert any(one.constants.get("SUM_OF", 0) > 1 for one in planned)
    _close(got, block.reference(x, level), torch.float32)
    assert torch.equal(got, block.run(x, level))


@pytest.mark.parametrize("level", [0, 3])
def test_one_sample(level):
    block = _Block("basic")
    x = _map(1, block.channels, 4, 4)
    level = torch.tensor([level], dtype=torch.int32)
    _close(block.run(x, level), block.reference(x, level), torch.float32)


def test_no_samples():
    block = _Block("basic")
    x = _map(0, block.channels, 4, 4)
    assert block.run(x, torch.zeros(0, dtype=torch.int32)).shape == x.shape


@pytest.mark.parametrize("name", ["basic", "narrow paths"])
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    block = _Block(name)
    x = _map(4, block.channels, 6, 6)
    one, other = torch.tensor([1, 0, 2, 2], dtype=torch.int32), torch.tensor([0, 2, 2, 1], dtype=torch.int32)
    mixed = torch.stack((x[1], x[3], x[2], x[0])).contiguous(memory_format=torch.channels_last)
    first, second = block.run(x, one), block.run(mixed, other)
    assert torch.equal(first[0], second[3])
    assert torch.equal(first[2], second[2])
    assert torch.equal(first[3], second[1])


def test_nan_of_one_sample_stays_there():
    block = _Block("basic")
    x = _map(3, block.channels, 5, 5)
    x[1] = float("nan")
    level = torch.tensor([3, 3, 1], dtype=torch.int32)
    got = block.run(x, level)
    assert got[1].isnan().all()
    assert not got[0].isnan().any()
    assert not got[2].isnan().any()


@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("block_k", [16, 32])
def test_every_cut_into_tiles_gives_the_same_numbers(block_m, block_k, monkeypatch):
    """Tiles smaller than the map and the channels, which tiny shapes would not meet otherwise."""
    tile = configs.TileConfig(block_m, 16, block_k, 4, 2)
    monkeypatch.setattr(configs, "choose", lambda *_, **__: tile)
    for name, pre in (("odd widths", True), ("paths", False)):
        block = _Block(name, pre=pre)
        x = _map(2, block.channels, 7, 6)
        level = _levels(block, 2)
        _close(block.run(x, level), block.reference(x, level), torch.float32)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter's")
def test_cpu_tensors_are_taken_in_the_interpreter_only_in_its_dtypes():
    assert backend.unavailable() is None
    assert backend.rejects(torch.device("cpu"), torch.float32) is None
    assert "float64" in backend.rejects(torch.device("cpu"), torch.float64)


def test_a_map_that_is_not_channels_last_is_refused():
    block = _Block("basic")
    x = _random(2, block.channels, 4, 4)
    with pytest.raises(ValueError, match="x must be channels_last"):
        block.run(x, torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("name", ["triton", "grouped", "reference"])
@pytest.mark.parametrize("size", [1, 3])
def test_fused_layers_keep_copies_of_their_weights(name, size):
    """Of 1x1 filters and of channels_last ones too, where packing has nothing to move."""
    level = torch.tensor([1, 0], dtype=torch.int32)
    order = torch.arange(2, dtype=torch.int32)
    for layout in (torch.contiguous_format, torch.channels_last):
        weights = [_random(16, 16, size, size, seed=s).contiguous(memory_format=layout) for s in range(2)]
        tables = [torch.ones(1, 2, 16), torch.zeros(1, 2, 16)]
        layer = FusedConv2d(weights[0], *tables, backend=name)
        block = FusedResidualBlock(weights, [tables[0]] * 2, [tables[1]] * 2, [0, 16], strides=[1, 1], backend=name)
        x = _map(2, 16, 4, 4)

        def results(x=x, layer=layer, block=block):
            return layer(x, level, order), *(getattr(part, key) for part in (layer, block) for key in part.packed())

        before = [result.clone() for result in results()]
        for weight in weights:
            weight.zero_()
        assert all(torch.equal(now, then) for now, then in zip(results(), before, strict=True))

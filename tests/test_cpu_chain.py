"""Chains with a first convolution and a pool: every backend against the reference, and what must not depend on what."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_cases import FunctionRecorder, Recorder, dtypes, isas
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import den_kernels as dk
from den_kernels.backends import cpu
from den_kernels.backends.cpu.weights import winograd_tile

BACKENDS = [name for name in dk.available_backends() if name not in ("reference", "triton")]
WIDTHS = (0, 5, 12)
CHANNELS, SETS = 12, 2


def make_chain(
    backend: str, dtype: torch.dtype, pool: str, seed: int = 0, channels: int = CHANNELS, max_pool: bool = False
) -> dk.FusedChain:
    """A strided convolution of 3 channels (and a max pool), two blocks with a choice, one of a single level, a pool."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def tables(levels: int) -> tuple[torch.Tensor, torch.Tensor]:
        return 1 + 0.2 * normal(SETS, levels, channels), 0.2 * normal(SETS, levels, channels)

    form = {"winograd": False, "backend": backend}
    layers: list[dk.FusedConv2d | dk.FusedResidualBlock] = [
        dk.FusedConv2d(
            normal(channels, 3, 3, 3).to(dtype) / 5, *tables(1), stride=2, relu=True, max_pool=max_pool, **form
        )
    ]
    choice = (*WIDTHS[:-1], channels)
    for widths in (choice, (channels,), choice):
        weights = [normal(channels, channels, 3, 3).to(dtype) / 10 for _ in range(2)]
        scale, shift = zip(*(tables(len(widths)) for _ in weights), strict=True)
        layers.append(dk.FusedResidualBlock(weights, scale, shift, widths, strides=[1, 1], relu=True, **form))
    norm = 1 + 0.2 * normal(SETS, channels), normal(SETS, channels)
    ends = {"map": None, "mean": dk.FusedPool(), "norm": dk.FusedPool(*norm)}
    return dk.FusedChain(layers, ends[pool])


def images(count: int, dtype: torch.dtype, size: tuple[int, int] = (11, 6)) -> torch.Tensor:
    return torch.randn(count, 3, *size).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pool", ["map", "mean", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry_stride", [None, 1, 3])
@pytest.mark.parametrize("max_pool", [False, True])
def test_a_chain_with_ends_equals_the_reference(backend, dtype, pool, max_pool, entry_stride):
    x, level = images(5, dtype), torch.randint(len(WIDTHS), (5, 2))
    before = x.clone()
    for set_index in range(SETS):
        y, wanted = (
            make_chain(name, dtype, pool, max_pool=max_pool)(
                x, dk.plan_levels(level, len(WIDTHS)), set_index, entry_stride
            )
            for name in (backend, "reference")
        )
        assert y.shape == wanted.shape
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            y.float(),
            wanted.float(),
            rtol=0,
            atol=tolerance * wanted.float().abs().max().item(),
            msg=f"set {set_index}",
        )
    assert torch.equal(x, before), "x was overwritten"


@pytest.mark.parametrize("channels", [1, 7, 8, 33, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@isas
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (6, 7)])
def test_the_max_pool_of_any_channels_is_pytorchs(isa, channels, dtype, size):
    """To the bit, negative values and NaN included."""
    cpu.set_isa(isa)
    torch.manual_seed(channels)
    weight = torch.randn(channels, 2, 1, 1).to(dtype)
    form = {"scale": torch.ones(1, 1, channels), "shift": torch.full((1, 1, channels), -1.0), "backend": "cpu"}
    conv, pooled = dk.FusedConv2d(weight, **form), dk.FusedConv2d(weight, **form, max_pool=True)
    x = torch.randn(3, 2, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    x[1, :, 0, -1] = torch.nan
    wanted = F.max_pool2d(dk.FusedChain([conv])(x), 3, 2, 1)
    torch.testing.assert_close(dk.FusedChain([pooled])(x), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels", [1, 7, 8, 33, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@isas
def test_the_pool_of_any_channels_is_the_mean(isa, channels, dtype):
    """The native pool against the module's own PyTorch, behind the same layers."""
    cpu.set_isa(isa)
    torch.manual_seed(channels)
    conv = dk.FusedConv2d(
        torch.randn(channels, 2, 1, 1).to(dtype), torch.ones(1, 1, channels), torch.zeros(1, 1, channels), backend="cpu"
    )
    x = torch.randn(3, 2, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    for pool in (dk.FusedPool(), dk.FusedPool(torch.rand(1, channels) + 0.5, torch.randn(1, channels))):
        y = dk.FusedChain([conv], pool)(x)
        wanted = pool(dk.FusedChain([conv])(x).double())
        bound = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(y.double(), wanted, rtol=bound, atol=bound, msg=f"norm: {pool.scale is not None}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_mates_and_threads_change_no_bit(backend):
    chain = make_chain(backend, torch.float32, "norm")
    x, level = images(6, torch.float32), torch.randint(len(WIDTHS), (6, 2))
    threads = torch.get_num_threads()
    y = chain(x, dk.plan_levels(level, len(WIDTHS)))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            if backend == "cpu":
                assert torch.equal(chain(x, dk.plan_levels(level, len(WIDTHS))), y), f"{count} threads"
                alone = chain(x[4:5], dk.plan_levels(level[4:5], len(WIDTHS)))
                assert torch.equal(alone, y[4:5]), f"alone, {count} threads"
    finally:
        torch.set_num_threads(threads)
    others, paths = torch.randn_like(x), torch.randint(len(WIDTHS), level.shape)
    others[4], paths[4] = x[4], level[4]
    assert torch.equal(chain(others, dk.plan_levels(paths, len(WIDTHS)))[4], y[4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("planned", [True, False])
def test_a_chain_follows_its_layers(backend, planned):
    """Weights moved or replaced after a call are those that the next call reads."""
    chain = make_chain(backend, torch.float32, "mean")
    x, level = images(2, torch.float32), torch.full((2, 2), 2)
    plan = dk.plan_levels(level, len(WIDTHS)) if planned else level
    before = chain(x, plan)
    for layer in chain.layers:
        layer.move_packed({name: torch.zeros_like(tensor) for name, tensor in layer.packed().items()})
    assert not torch.equal(chain(x, plan), before)


@pytest.mark.parametrize("pool", ["map", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_left_out_or_not_the_result_is_the_same(dtype, pool):
    chain = make_chain("cpu", dtype, pool)
    for count in (3, 0, 1):
        x, level = images(count, dtype), torch.randint(len(WIDTHS), (count, 2))
        bound = chain(x, level)
        assert (list(chain._bound.values())[-1] is not None) == (count > 0), f"{count} images"
        with Recorder() as seen:
            watched = chain(x, level)
        assert "den_kernels.residual_chain.default" in seen.names, f"{count} images: {seen.names}"
        assert torch.equal(bound, watched), f"{count} images"
        assert bound.stride() == watched.stride(), f"{count} images"
        assert torch.equal(chain(x.contiguous(), level), watched), f"{count} images, another layout"


def test_whoever_watches_sees_the_operator():
    chain, x = make_chain("cpu", torch.float32, "mean"), images(2, torch.float32)
    level = torch.ones(2, 2, dtype=torch.long)
    wanted = chain(x, level)
    with FlopCounterMode(display=False) as flops:
        chain(x, level)
    assert flops.get_total_flops() > 0, "FLOPs"
    with torch.profiler.profile() as profile:
        chain(x, level)
    assert "den_kernels::residual_chain" in {event.key for event in profile.key_averages()}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert chain(mode.from_tensor(x), level).shape == wanted.shape, "fake"
    subclass = torch.Tensor._make_subclass(type("Sub", (torch.Tensor,), {}), x)
    assert type(chain(subclass, level)) is not torch.Tensor, "subclass"
    with FunctionRecorder() as functions:
        chain(x, level)
    assert any("residual_chain" in name for name in functions.names), "function mode"
    graph = make_fx(lambda x: chain(x, level), pre_dispatch=True)(x)
    torch.testing.assert_close(graph(2 * x), chain(2 * x, level), msg="traced before dispatch")
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(lambda x: chain(x[None], level[:1]))(x)


def test_moved_weights_are_found():
    """Weights whose memory is moved under the same tensors, as sharing them with another process does."""
    chain, x = make_chain("cpu", torch.float32, "mean"), images(2, torch.float32)
    level = torch.ones(2, 2, dtype=torch.long)
    wanted = chain(x, level)
    places = [tensor.data_ptr() for layer in chain.layers for tensor in layer.packed().values()]
    for layer in chain.layers:
        for tensor in layer.packed().values():
            tensor.share_memory_()
    moved = [tensor.data_ptr() for layer in chain.layers for tensor in layer.packed().values()]
    assert set(places).isdisjoint(moved)
    assert torch.equal(chain(x, level), wanted)


@isas
def test_a_chain_serves_several_callers_and_sizes_at_once(isa):
    """What a chain keeps between calls is one call's at a time, and one size's and instruction set's alone."""
    cpu.set_isa(isa)
    chain = make_chain("cpu", torch.float32, "map", max_pool=True)
    generator = torch.Generator().manual_seed(0)
    jobs = []
    for i in range(12):
        x = images(1 + i % 3, torch.float32, (9 + i % 4, 8 + i % 2))
        level = torch.randint(len(WIDTHS), (x.shape[0], 2), generator=generator)
        jobs.append((x, level if i % 2 else dk.plan_levels(level, len(WIDTHS))))
    wanted = [make_chain("cpu", torch.float32, "map", max_pool=True)(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(lambda job: chain(*job), jobs * 20), wanted * 20, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@isas
def test_a_sample_in_a_chain_does_not_depend_on_batch_mates_or_threads(isa, dtype):
    """Whether a thread takes it through all layers or shares it in each."""
    cpu.set_isa(isa)
    chain = make_chain("cpu", dtype, "norm", channels=40, max_pool=True)
    x, level = images(7, dtype, (12, 19)), torch.randint(len(WIDTHS), (7, 2))
    level[2], level[5] = 0, len(WIDTHS) - 1
    wanted = torch.cat([chain(x[n : n + 1], level[n : n + 1]) for n in range(7)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(chain(x, level), wanted), f"{threads} threads"
        assert torch.equal(chain(x.flip(0), level.flip(0)), wanted.flip(0)), f"{threads} threads, in another order"


@dtypes
@isas
def test_a_block_frozen_for_one_instruction_set_runs_on_all(isa, dtype):
    """The form of its weights is that set's choice: Winograd's, but for bfloat16 where tiles of AMX multiply it."""
    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(32, 32, 3, 3, generator=generator) / 17).to(dtype) for _ in range(2)]
    tables = [torch.ones(1, 2, 32)] * 2, [torch.zeros(1, 2, 32)] * 2
    x = torch.randn(3, 32, 16, 16, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    plan = dk.plan_levels(torch.tensor([[1], [0], [1]]), 2).block(0)
    form = {"widths": (16, 32), "strides": [1, 1], "relu": True}
    wanted = dk.FusedResidualBlock(weights, *tables, **form, backend="reference")(x.clone(), *plan)
    cpu.set_isa(isa)
    assert winograd_tile(weights[0], 1, 1, 0) == (4 if dtype == torch.float32 else 0 if isa == "amx_bf16" else 2)
    block = dk.FusedResidualBlock(weights, *tables, **form, backend="cpu")
    for other in cpu.supported_isas():
        cpu.set_isa(other)
        y = block(x.clone(memory_format=torch.channels_last), *plan).float()
        atol = (1e-3 if dtype == torch.float32 else 2e-2) * float(wanted.float().abs().max())
        torch.testing.assert_close(y, wanted.float(), rtol=0, atol=atol, msg=f"frozen for {isa}, run on {other}")


def test_what_a_chain_refuses():
    first, second = (make_chain(name, torch.float32, "map").layers[0] for name in ("grouped", "reference"))
    with pytest.raises(ValueError, match="a chain takes layers of one"):
        dk.FusedChain([first, second])
    narrow = dk.FusedConv2d(torch.ones(4, 3, 3, 3), torch.ones(1, 2, 4), torch.ones(1, 2, 4), out_widths=(2, 4))
    with pytest.raises(ValueError, match=r"layers\[1\] is a FusedConv2d with levels"):
        dk.FusedChain([make_chain(narrow.backend, torch.float32, "map").layers[0], narrow])
    with pytest.raises(ValueError, match="go together"):
        dk.FusedPool(torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"\[sets, channels\]"):
        dk.FusedPool(torch.ones(4), torch.ones(4))


def test_a_level_of_a_block_of_one_level_is_0():
    block = make_chain("cpu", torch.float32, "map").layers[2]
    x = torch.randn(2, CHANNELS, 5, 5).contiguous(memory_format=torch.channels_last)
    level, order, count = dk.plan_levels(torch.zeros(2, 1, dtype=torch.long), 1).block(0)
    block(x, level, order, count)
    with pytest.raises(ValueError, match=r"level is \[0, 3\]; the block has one level"):
        block(x, torch.tensor([0, 3], dtype=torch.int32), order, count)
    with pytest.raises(ValueError, match="one entry a sample"):
        block(x, level[:1], order, count)


def test_a_plan_of_other_blocks_is_refused():
    chain = make_chain("cpu", torch.float32, "mean")
    with pytest.raises(ValueError, match="for each of 2 blocks"):
        chain(images(2, torch.float32), dk.plan_levels(torch.zeros(2, 3, dtype=torch.long), len(WIDTHS)))
    with pytest.raises(ValueError, match="level is None"):
        chain(images(2, torch.float32))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("max_pool", [False, True])
def test_opcheck_and_flops(backend, max_pool):
    chain = make_chain(backend, torch.float32, "norm", max_pool=max_pool)
    x, plan = images(2, torch.float32), dk.plan_levels(torch.tensor([[0, 2], [1, 2]]), len(WIDTHS))
    flat = chain._kept(0, tuple(x.shape), None, None)
    torch.library.opcheck(torch.ops.den_kernels.residual_chain.default, (x, *plan, *flat, backend))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        chain(x, plan)
    pixels, pairs = 6 * 3, CHANNELS * sum(2 * width for width in (0, 5, 12, 12, CHANNELS, CHANNELS))
    pooled = 3 * 2 if max_pool else pixels
    assert counter.get_total_flops() == 2 * 9 * (2 * 3 * CHANNELS * pixels + pairs * pooled)


@pytest.mark.parametrize("classes", [1, 10, 37])
@pytest.mark.parametrize("channels", [7, 12, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_head_in_the_chain_is_the_head_by_itself(backend, dtype, channels, classes):
    check_head(backend, dtype, channels, classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@isas
def test_a_head_of_any_instruction_set(isa, dtype):
    cpu.set_isa(isa)
    check_head("cpu", dtype, 33, 37)


def check_head(backend: str, dtype: torch.dtype, channels: int, classes: int) -> None:
    """In the chain it is what it is by itself, and a linear layer in float64, whatever the number of threads."""
    torch.manual_seed(channels)
    chain = make_chain(backend, dtype, "norm", channels=channels)
    weight, bias = torch.randn(classes, channels).to(dtype), torch.randn(classes)
    head = dk.FusedLinear(weight, bias, backend=backend)
    level = torch.randint(len(WIDTHS), (25, 2))
    x, plan = images(25, dtype), dk.plan_levels(level, len(WIDTHS))
    features, y = chain(x, plan), chain(x, plan, head=head)
    assert y.shape == (25, classes)
    assert torch.equal(y, head(features)), "by itself"
    wanted = features.double() @ weight.double().T + bias.double()
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y.double(), wanted, rtol=bound, atol=bound * wanted.abs().max().item())
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        chain(x, plan)
        without = counter.get_total_flops()
        chain(x, plan, head=head)
    assert counter.get_total_flops() == 2 * without + 2 * 25 * channels * classes
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        if backend == "cpu":
            assert torch.equal(chain(x, plan, head=head), y), "3 threads"
    finally:
        torch.set_num_threads(threads)
    head.move_packed({name: torch.zeros_like(tensor) for name, tensor in head.packed().items()})
    torch.testing.assert_close(chain(x, plan, head=head).float(), bias.to(dtype).float().expand(25, -1))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_levels_in_place_of_their_plan(backend):
    chain = make_chain(backend, torch.float32, "norm")
    x, level = images(6, torch.float32), torch.randint(len(WIDTHS), (6, 2))
    wanted = chain(x, dk.plan_levels(level, len(WIDTHS)))
    assert torch.equal(chain(x, level), wanted)
    counts = []
    for plan in (level, dk.plan_levels(level, len(WIDTHS))):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            chain(x, plan)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    flat = chain._kept(0, tuple(x.shape), None, None)
    torch.library.opcheck(torch.ops.den_kernels.residual_chain.default, (x, level, None, None, *flat, backend))


def test_levels_that_do_not_fit_are_named():
    chain = make_chain("cpu", torch.float32, "norm")
    x = images(2, torch.float32)
    with pytest.raises(ValueError, match=r"level\[1, 0\] is 3; it must be between 0 and 2"):
        chain(x, torch.tensor([[0, 1], [3, 0]]))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), .* of shape \(2, 2\)"):
        chain(x, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"level is torch.int32"):
        chain(x, torch.zeros(2, 2, dtype=torch.int32))

"""Frozen models in CUDA graphs: what can be said without a GPU.

The frozen forward, selector included, is run on meta tensors, which have no values: an operation that needs one, or
whose shape depends on one, and so would wait for the GPU, raises. The bookkeeping around a capture runs for real, with
a capture that repeats the call on the static buffers where a GPU would replay a graph. The graphs themselves are in
tests/triton_device_cases.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from den_cases import MAKERS, RESIDUAL, TWO_TASKS, image_shape, resnext, wrn
from torch import nn

import den
from den.cuda_graph import StaticCalls, check_capturable
from den_kernels.backends import load


def repeated(run):
    """In place of a graph: the same work on the same buffers, its results written where the first ones are."""
    outputs = run()

    def replay() -> None:
        for output, new in zip(outputs, run(), strict=True):
            if output is not None:
                output.copy_(new)

    return replay, outputs


def graphed(make=wrn, batches=(), tasks=None) -> den.FrozenDEN:
    frozen = den.freeze(make(tasks, backend="grouped"), backend="grouped")
    frozen.calls = StaticCalls(batches, frozen.dtype, repeated)
    return frozen


@pytest.fixture
def _triton_takes_meta_tensors(monkeypatch):
    backend = load("triton")
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(backend, "rejects", lambda device, dtype: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows no meta device


WAITS = (RuntimeError, NotImplementedError)  # what meta tensors raise, by operation


@pytest.mark.usefixtures("_triton_takes_meta_tensors")
@pytest.mark.parametrize("make", RESIDUAL)
@pytest.mark.parametrize("by_caller", [False, True], ids=["selector", "levels given"])
def test_nothing_in_a_frozen_call_waits_for_the_gpu(make, by_caller):
    model = make(TWO_TASKS, backend="triton", task_norm="per_task").to("meta")
    frozen = den.freeze(model, torch.bfloat16, backend="triton")
    x = torch.empty(5, *image_shape(make), device="meta")
    level = torch.empty(5, model.num_blocks, dtype=torch.int64, device="meta") if by_caller else None
    out = frozen(x, "b", level)
    assert out.logits.device.type == "meta"
    assert (out.logits.shape, out.level.shape) == ((5, 3), (5, model.num_blocks))
    for wait in (lambda: out.level.max().item(), lambda: out.level.nonzero(), lambda: x[out.level[:, 0] > 0]):
        with pytest.raises(WAITS):
            wait()


@pytest.mark.parametrize("make", [wrn, resnext])
def test_the_triton_backend_reads_no_value_on_the_host(make, monkeypatch):
    """From the planners of the launches down: tensors without values all the way to the GPU's queue."""
    pytest.importorskip("triton")
    from den_kernels.backends.triton import launch

    kernels = []
    monkeypatch.setattr(launch, "run", lambda one, device: kernels.append(one))
    backend = load("triton")
    frozen = den.freeze(make(backend="grouped"), backend="grouped")
    level, order = (torch.empty(6, dtype=torch.int32, device="meta") for _ in range(2))
    count = torch.empty(4, dtype=torch.int32, device="meta")
    size = image_shape(make)[1]
    for block in frozen.blocks:
        arguments = block.arguments()
        weights = [
            backend.pack_weights(torch.empty(w.shape, device="meta"), s, g, True)[0]
            for w, s, g in zip(arguments.weight, arguments.stride, arguments.groups, strict=True)
        ]
        x = torch.empty(6, block.in_channels, size, size, device="meta").to(memory_format=torch.channels_last)
        size = -(-size // max(block.strides))
        out = torch.empty(6, block.out_channels, size, size, device="meta").to(memory_format=torch.channels_last)
        moved = [
            [part.to("meta") if isinstance(part, torch.Tensor) else part for part in field]
            if isinstance(field, list)
            else field.to("meta")
            if isinstance(field, torch.Tensor)
            else field
            for field in arguments._replace(weight=weights)
        ]
        backend.residual_block(x, out, level, order, count, *moved)
    assert len(kernels) >= sum(len(block.kernel_sizes) for block in frozen.blocks)


@pytest.mark.parametrize("make", MAKERS)
def test_replayed_calls_give_what_calls_give(make):
    frozen = graphed(make, tasks=TWO_TASKS)
    plain = den.freeze(make(TWO_TASKS, backend="grouped"), backend="grouped")
    inputs = [torch.randn(4, *image_shape(make)) for _ in range(3)]
    levels = [torch.randint(plain.num_levels, (4, plain.num_blocks)) for _ in inputs]
    for task in TWO_TASKS:
        found = [frozen(x, task) for x in inputs] + [frozen(x, task, z) for x, z in zip(inputs, levels, strict=True)]
        wanted = [plain(x, task) for x in inputs] + [plain(x, task, z) for x, z in zip(inputs, levels, strict=True)]
        # Compared when all have run: a result must not be overwritten by a later call.
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours.logits, theirs.logits)
            assert torch.equal(ours.level, theirs.level)
            assert (ours.level_probs is None) == (theirs.level_probs is None)
    assert len(frozen.calls._recorded) == 4  # two tasks, with and without the selector


def test_other_dtypes_and_layouts_are_copied_in():
    frozen = graphed()
    x = torch.randn(3, 3, 8, 8)
    wanted = frozen(x).logits
    assert torch.equal(frozen(x.contiguous(memory_format=torch.channels_last)).logits, wanted)
    assert torch.equal(frozen(x.double()).logits, wanted)
    assert torch.equal(frozen(x, level=frozen(x).level).logits, wanted)
    assert torch.equal(frozen(x, level=[3, 0, 2]).logits, graphed()(x, level=torch.tensor([[3, 0, 2]] * 3)).logits)


def test_other_sizes_are_refused():
    frozen = graphed()
    frozen(torch.randn(3, 3, 8, 8))
    with pytest.raises(ValueError, match=r"x has 4 images.*graph of 3.*cuda_graph=\(3, 4\)"):
        frozen(torch.randn(4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images of \(3, 9, 8\).*\(3, 8, 8\)"):
        frozen(torch.randn(3, 3, 9, 8))
    several = graphed(batches=(1, 4))
    assert several(torch.randn(4, 3, 8, 8)).level.shape == several(torch.randn(4, 3, 8, 8)).level.shape == (4, 3)
    assert several(torch.randn(1, 3, 8, 8)).logits.shape == (1, 5)
    with pytest.raises(ValueError, match=r"x has 2 images.*graph of 1 or 4.*cuda_graph=\(1, 4, 2\)"):
        several(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="no images"):
        graphed()(torch.randn(0, 3, 8, 8))
    with pytest.raises(TypeError, match=r"dtype torch.uint8"):
        frozen(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))


def test_captured_inside_inference_mode_and_replayed_outside():
    frozen, x = graphed(), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        first = frozen(x).logits
    assert torch.equal(frozen(x).logits, first)


def test_copies_capture_their_own():
    frozen = graphed()
    x = torch.randn(2, 3, 8, 8)
    wanted = frozen(x).logits
    copied = copy.deepcopy(frozen)
    assert not copied.calls._recorded
    assert torch.equal(copied(x).logits, wanted)
    frozen.to("cpu")
    assert not frozen.calls._recorded


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_freezing_says_so():
    with pytest.raises(RuntimeError, match=r"the model is on cpu.*needs an NVIDIA GPU.*leave cuda_graph out"):
        den.freeze(wrn(), cuda_graph=True)
    with pytest.raises(RuntimeError, match="blocks run on the backend 'grouped', which waits"):
        check_capturable(torch.device("cuda"), ["triton", "grouped"])
    assert den.freeze(wrn(), cuda_graph=False).calls is None


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("all", TypeError, "cuda_graph is 'all'"),
        (8, TypeError, "cuda_graph is 8"),
        ((), TypeError, r"batch sizes such as \(1, 64\)"),
        ((1, True), TypeError, "cuda_graph is"),
        ((4, 0), ValueError, r"cuda_graph is \(4, 0\); batch sizes must be at least 1"),
    ],
)
def test_bad_batch_sizes_are_named(value, error, message):
    with pytest.raises(error, match=message):
        den.freeze(wrn(), cuda_graph=value)


@pytest.mark.usefixtures("_triton_takes_meta_tensors")
def test_a_selector_that_waits_is_found():
    class Waiting(nn.Module):
        def forward(self, x):
            return x.new_zeros(len(x), 3, 4) + float(x.sum())

    frozen = den.freeze(wrn(backend="triton", selector=Waiting()).to("meta"), backend="triton")
    with pytest.raises(WAITS):
        frozen(torch.empty(2, 3, 8, 8, device="meta"))


def test_captures_share_one_pool_and_one_stream(monkeypatch):
    """The allocator gives a pool's free block only to the stream that it was freed on."""
    used = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr("den.cuda_graph.captured", lambda run, device, *shared: (used.append(shared), repeated(run))[1])
    calls = StaticCalls((1, 2), torch.float32)
    for n in (1, 2):
        calls(lambda tasks, x: (x + 1,), ("a",), torch.zeros(n, 3, 4, 4))
    assert len(used) == 2
    assert used[0] == used[1]
    assert None not in used[0]
    assert copy.deepcopy(calls)._stream is None

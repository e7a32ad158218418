"""The frozen model and the plain network against the model in evaluation."""

import copy

import pytest
import torch
from den_cases import MAKERS, RESIDUAL, TWO_TASKS, bottleneck, image_shape, resnext, wrn

import den
import den_kernels as dk
from den.blocks import FreezeOptions, freeze_block, shortcut

BACKENDS = [name for name in dk.available_backends() if name != "triton"]


def images(make, count: int) -> torch.Tensor:
    return torch.randn(count, *image_shape(make))


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(ours, wanted.detach(), rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_equals_the_model_at_random_levels(make, backend):
    model = make(TWO_TASKS, task_norm="per_task")
    frozen = den.freeze(model, backend=backend)
    x = images(make, 7)
    for task in TWO_TASKS:
        level = torch.randint(model.num_levels, (7, model.num_blocks))
        out = frozen(x, task, level)
        close(out.logits, model(x, task, level).logits)
        assert torch.equal(out.level, level)
        assert out.level_probs is None
        assert not out.logits.requires_grad


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_selector_decides_alike(make, backend):
    model = make()
    frozen = den.freeze(model, backend=backend)
    x = images(make, 5)
    out, wanted = frozen(x), model(x)
    close(out.level_probs, wanted.level_probs)
    assert torch.equal(out.level, wanted.level)
    close(out.logits, wanted.logits)


@pytest.mark.parametrize("selector", ["light", {"widths": (4, 8), "blocks_per_stage": 2, "pool": 3}])
def test_pooled_selectors_and_strided_stems(selector):
    model = wrn(selector=selector, name="wrn_14_1")
    for size in (8, 11, 16, 25):
        x = torch.randn(3, 3, size, size)
        out, wanted = den.freeze(model)(x), model(x)
        close(out.level_probs, wanted.level_probs)
        close(out.logits, wanted.logits)


@pytest.mark.parametrize("make", RESIDUAL)
def test_shared_norms_and_full_levels(make):
    model = make(TWO_TASKS, bn="shared")
    frozen = den.freeze(model)
    x = images(make, 3)
    for task in TWO_TASKS:
        for level in range(4):
            close(frozen(x, task, [level] * 3).logits, model(x, task, [level] * 3).logits)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_callers_images_are_not_overwritten(make, layout):
    x = images(make, 4).contiguous(memory_format=layout)
    before = x.clone()
    den.freeze(make())(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("make", MAKERS)
def test_batch_mates_change_nothing(make):
    model = make()
    frozen = den.freeze(model)
    x = images(make, 6)
    level = torch.randint(model.num_levels, (6, model.num_blocks))
    logits = frozen(x, level=level).logits
    others, paths = torch.randn_like(x), torch.randint(model.num_levels, level.shape)
    others[4], paths[4] = x[4], level[4]
    assert torch.equal(frozen(others, level=paths).logits[4], logits[4])


@pytest.mark.parametrize("make", [resnext, bottleneck])
@pytest.mark.parametrize("backend", BACKENDS)
def test_level_0_of_a_bottleneck_is_the_shortcut(make, backend):
    for block in make().requires_grad_(False).estimator.blocks:
        plan = dk.plan_levels(torch.tensor([[0], [3], [0], [1]]), 4).block(0)
        x = torch.randn(4, block.in_channels, 7, 7).contiguous(memory_format=torch.channels_last)
        y = freeze_block(block, FreezeOptions(torch.float32, True, backend))(x, *plan, 0)
        if block.projection is None:
            wanted = shortcut(x, block.stride, block.out_channels)
            assert torch.equal(y[[0, 2]], wanted[[0, 2]])
        else:
            wanted = block.projection(x)
            close(y[[0, 2]], wanted[[0, 2]])
            assert (y[[0, 2]] < 0).any(), "a ReLU ran"
        assert not torch.equal(y[[1, 3]], wanted[[1, 3]])


def test_frozen_is_a_copy_in_evaluation_mode():
    model = wrn().train()
    frozen = den.freeze(model)
    x = images(wrn, 3)
    before = frozen(x).logits
    assert not frozen.train().training
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(1)
    assert torch.equal(frozen(x).logits, before)
    assert torch.equal(copy.deepcopy(frozen)(x).logits, before)
    assert not list(frozen.parameters()) or not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_bfloat16(make):
    model = make()
    frozen = den.freeze(model, torch.bfloat16, backend="grouped")
    x = images(make, 4)
    level = torch.randint(model.num_levels, (4, model.num_blocks))
    out = frozen(x, level=level).logits
    wanted = model(x, level=level).logits.detach()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())


@pytest.mark.parametrize("make", RESIDUAL)
def test_empty_and_single_batches(make):
    frozen = den.freeze(make())
    assert frozen(images(make, 0)).logits.shape == (0, 5)
    assert frozen(images(make, 1)).level.shape == (1, 3)


@pytest.mark.parametrize("make", MAKERS)
def test_compile(make):
    model = make()
    frozen = den.freeze(model, backend="grouped")
    torch.compiler.reset()  # else the models before this one count towards the limit of recompilations
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    x = images(make, 3)
    for _ in range(2):
        level = torch.randint(model.num_levels, (3, model.num_blocks))
        close(compiled(x, "a", level).logits, frozen(x, "a", level).logits)


def test_frozen_stays_where_it_was_made():
    frozen = den.freeze(wrn())
    assert frozen.to("cpu") is frozen
    for move in (lambda: frozen.to("meta"), lambda: frozen.double(), lambda: frozen.to(torch.bfloat16)):
        with pytest.raises(RuntimeError, match=r"frozen for cpu and torch.float32.*freeze that"):
            move()
    with pytest.raises(ValueError, match="x is on meta, but this model was frozen for cpu"):
        frozen(torch.zeros(1, 3, 8, 8, device="meta"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model",), TypeError, "model is a str"),
        ((None, torch.int8), TypeError, "torch.int8"),
        ((None, "bf16"), TypeError, "'bf16'"),
        ((None, None, "fast"), ValueError, "backend is 'fast'"),
    ],
)
def test_freeze_names_what_is_wrong(arguments, error, message):
    model, *rest = arguments
    with pytest.raises(error, match=message):
        den.freeze(model or wrn(), *rest)


@pytest.mark.parametrize("make", MAKERS)
def test_dense_is_the_plain_network_of_a_path(make):
    model = make(TWO_TASKS, task_norm="per_task")
    x = images(make, 3)
    for task in TWO_TASKS:
        top = [model.num_levels - 1] * model.num_blocks
        network = den.dense(model, task)
        close(network(x), model(x, task, top).logits)
        assert {type(m).__module__.split(".")[0] for m in network.modules()} <= {"torch", "den"}
        path = torch.randint(model.num_levels, (model.num_blocks,))
        close(den.dense(model, task, path)(x), model(x, task, path).logits)
    with pytest.raises(ValueError, match="task is 'c'"):
        den.dense(model, "c")
    with pytest.raises(ValueError, match="level holds 9"):
        den.dense(model, "a", [9] * model.num_blocks)
    with pytest.raises(TypeError, match="Linear"):
        den.dense(torch.nn.Linear(1, 1))


def test_dense_of_less_width_holds_less():
    model = wrn()
    sizes = [sum(p.numel() for p in den.dense(model, level=[level] * 3).parameters()) for level in range(4)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[3]

"""The model against its definition: values, gradients, statistics, and what it says to bad input."""

import pytest
import torch
from den_cases import (
    MAKERS,
    RESIDUAL,
    TWO_TASKS,
    all_paths,
    bottleneck,
    conv_net,
    image_shape,
    resnet,
    sliced_loop,
    unused_weights,
    vgg,
    wrn,
)
from torch import nn

import den
import den_kernels as dk
from den.blocks import BottleneckBlock, ResidualBlock, shortcut
from den.selector import Selector


@pytest.mark.parametrize("make", RESIDUAL)
@pytest.mark.parametrize("more", [0, 3, 8])
def test_every_path_is_the_sliced_network(make, more):
    model = make(TWO_TASKS, task_norm="per_task").double()
    level = all_paths(model)
    size = image_shape(make)[1] + more
    x = torch.randn(len(level), 3, size, size, dtype=torch.float64)
    for task in TWO_TASKS:
        out = model(x, task, level)
        assert torch.equal(out.level, level)
        assert out.level_probs is None
        torch.testing.assert_close(out.logits, sliced_loop(model, x, level, task))


def test_shared_batch_norm_is_the_sliced_network_too():
    model = resnet(bn="shared").double()
    assert model.estimator.blocks[0].norm2.num_levels == 1
    level = all_paths(model)
    x = torch.randn(len(level), 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x, level=level).logits, sliced_loop(model, x, level, "a"))


@pytest.mark.parametrize("make", [conv_net, vgg])
def test_pairs_of_layers_are_sliced_networks(make):
    model = make(TWO_TASKS, task_norm="per_task").double()
    level = all_paths(model)
    x = torch.randn(len(level), *image_shape(make), dtype=torch.float64)
    for task in TWO_TASKS:
        out = model(x, task, level).logits
        for n, path in enumerate(level):
            plain = den.dense(model, task, path)
            torch.testing.assert_close(out[n : n + 1], plain(x[n : n + 1]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("preactivation", [False, True])
def test_level_0_is_bitwise_the_shortcut(preactivation, training):
    hierarchy = den.Hierarchy((0, 0.5, 1))
    level = torch.tensor([0, 2, 0, 1])
    for channels, stride in ((8, 1), (16, 2)):
        block = ResidualBlock(8, channels, hierarchy, stride=stride, preactivation=preactivation, backend="grouped")
        block.train(training)
        x = torch.randn(4, 8, 7, 7)
        x[0, 0, 0, :3] = torch.tensor([-0.0, torch.inf, -1.0])
        wanted = shortcut(x, stride, channels)
        y = block(x, level)
        same = y.view(torch.int32) == wanted.view(torch.int32)
        assert same[[0, 2]].all()
        assert not same[1].all()
    assert torch.equal(shortcut(x, 1, 8), x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_level_0_of_a_bottleneck_is_bitwise_the_shortcut(projection, training):
    block = BottleneckBlock(8, 8, 16, den.Hierarchy((0, 0.5, 1)), stride=2, projection=projection, backend="grouped")
    block.train(training)
    x = torch.randn(4, 8, 7, 7)
    wanted = block.projection(x) if projection else shortcut(x, 2, 16)
    y = block(x, torch.tensor([0, 2, 0, 1]))
    same = y.view(torch.int32) == wanted.view(torch.int32)
    assert same[[0, 2]].all()
    assert (y[[0, 2]] < 0).any(), "a ReLU ran"
    assert not same[1].all()
    assert (y[[1, 3]] >= 0).all()


@pytest.mark.parametrize("make", MAKERS)
def test_batch_mates_change_nothing(make):
    """Bitwise, for one batch size: the same image and path among other images and paths.

    Elsewhere in the batch too, up to the last map: PyTorch's own linear layers round by the row's place in the batch.
    """
    model = make()
    maps = []
    model.estimator.tail.register_forward_hook(lambda _, args, __: maps.append(args[0]))
    x = torch.randn(6, *image_shape(make))
    level = torch.randint(model.num_levels, (6, model.num_blocks))
    logits = model(x, level=level).logits
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    model(x[order], level=level[order])
    assert torch.equal(maps[1], maps[0][order])
    others, paths = torch.randn_like(x), torch.randint(model.num_levels, level.shape)
    others[2], paths[2] = x[2], level[2]
    assert torch.equal(model(others, level=paths).logits[2], logits[2])


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_of_groups_that_no_sample_runs_are_not_read(make, frozen):
    """NaN in them changes nothing: the work is left out, not masked."""
    model = make()
    path = [model.num_levels - 2] * model.num_blocks
    x = torch.randn(2, *image_shape(make))
    wanted = model(x, level=path).logits
    with torch.no_grad():
        for block, level in zip(model.estimator.blocks, path, strict=True):
            for weight in unused_weights(block, block.widths[level]):
                weight.fill_(torch.nan)
    run = den.freeze(model) if frozen else model
    torch.testing.assert_close(run(x, level=path).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_autocast_trains(make):
    model = make().train()
    x, level = torch.randn(3, *image_shape(make)), torch.randint(model.num_levels, (3, model.num_blocks))
    wanted = model(x, level=level).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x, level=level).logits
    logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", RESIDUAL)
def test_gradients_reach_the_groups_that_ran_and_no_others(make):
    model = make().train()
    level = torch.tensor([[0, 1, 2], [0, 1, 1], [0, 0, 1]])
    model(torch.randn(3, *image_shape(make)), level=level).logits.square().sum().backward()
    for block, top in zip(model.estimator.blocks, level.amax(0).tolist(), strict=True):
        width = block.widths[top]
        layers = [module for module in block.modules() if isinstance(module, dk.DENConv2d)]
        for layer in layers:
            assert layer.weight.grad.shape == layer.weight.shape
        for layer in layers[:-1]:
            assert (layer.weight.grad[width:] == 0).all()
            assert (layer.weight.grad[:width].abs().amax((1, 2, 3)) > 0).all()
        assert (layers[-1].weight.grad[:, width:] == 0).all()
        assert (layers[-1].weight.grad[:, :width].abs().amax((0, 2, 3)) > 0).all()
    assert all(p.grad is not None for name, p in model.estimator.named_parameters() if "heads" not in name)
    assert all(p.grad is None for p in model.selector.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_training_lowers_the_loss(make):
    model = make().train()
    optimizer = torch.optim.SGD(model.estimator.parameters(), lr=0.02, momentum=0.9)
    x, label = torch.randn(10, *image_shape(make)), torch.arange(10) % 5
    level = torch.arange(10 * model.num_blocks).view(10, -1) % model.num_levels
    losses = []
    for _ in range(12):
        losses.append(nn.functional.cross_entropy(model(x, level=level).logits, label))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("make", RESIDUAL)
def test_gradients_are_those_of_the_sliced_network(make):
    model = make().double()
    level = torch.randint(4, (5, 3))
    x = torch.randn(5, *image_shape(make), dtype=torch.float64)
    target = torch.randn(5, 5, dtype=torch.float64)
    parameters = list(model.estimator.parameters())
    ours = torch.autograd.grad((model(x, level=level).logits * target).sum(), parameters, allow_unused=True)
    loop = torch.autograd.grad((sliced_loop(model, x, level, "a") * target).sum(), parameters, allow_unused=True)
    for mine, wanted, parameter in zip(ours, loop, parameters, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(parameter) if wanted is None else wanted)


def test_no_gradient_passes_through_the_choice_but_one_through_the_probabilities():
    model = wrn()
    out = model(torch.randn(3, 3, 8, 8))
    assert not out.level.requires_grad
    assert torch.equal(out.level, out.level_probs.argmax(2))
    out.logits.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in model.selector.parameters())
    out.level_probs.square().sum().backward()
    assert all(p.grad is not None for p in model.selector.parameters())


def _moved(norm: nn.Module, before: dict) -> torch.Tensor:
    return (norm.running_mean != before[norm][0]) | (norm.running_var != before[norm][1])


def _statistics(model: nn.Module) -> dict:
    norms = [m for m in model.modules() if hasattr(m, "num_sets")]
    return {m: (m.running_mean.clone(), m.running_var.clone()) for m in norms}


def test_statistics_of_levels_that_no_sample_took_stay():
    model = resnet().train()
    before = _statistics(model)
    model(torch.randn(4, 3, 8, 8), level=torch.tensor([[1, 0, 3]]).expand(4, -1))
    first, second, third = model.estimator.blocks
    assert _moved(first.norm2, before).any(1).tolist() == [False, True, False, False]
    assert _moved(first.norm1, before)[0].nonzero().flatten().tolist() == list(range(first.widths[1]))
    assert not _moved(second.norm1, before).any()
    assert not _moved(second.norm2, before).any()
    assert _moved(third.norm2, before).any(1).tolist() == [False, False, False, True]


def test_statistics_of_a_bottleneck_are_over_the_samples_that_ran():
    block = bottleneck().train().estimator.blocks[0]
    before = _statistics(block)
    x = torch.randn(4, 16, 6, 6)
    block(x, torch.tensor([0, 2, 0, 1]))
    for norm in (block.norm1, block.norm2):
        assert _moved(norm, before)[0].tolist() == [channel < block.widths[2] for channel in range(64)]
    assert _moved(block.norm3, before).any(1).tolist() == [False, True, True, False]
    a = block.conv1(x[[1, 3]])[:, : block.widths[1]]
    wanted = 0.9 * before[block.norm1][0][0, : block.widths[1]] + 0.1 * a.mean((0, 2, 3))
    torch.testing.assert_close(block.norm1.running_mean[0, : block.widths[1]], wanted, rtol=1e-5, atol=1e-6)
    projected = block.projection.conv(x)
    wanted = 0.9 * before[block.projection.norm][0][0] + 0.1 * projected.mean((0, 2, 3))
    torch.testing.assert_close(block.projection.norm.running_mean[0], wanted, rtol=1e-5, atol=1e-6)


def test_preactivation_statistics_are_over_the_samples_that_ran():
    model = wrn().train()
    block = model.estimator.blocks[0]
    before = _statistics(model)
    x = torch.randn(4, 16, 8, 8)
    block(x, torch.tensor([0, 2, 0, 1]))
    ran = x[[1, 3]]
    torch.testing.assert_close(
        block.norm1.running_mean[0], 0.9 * before[block.norm1][0][0] + 0.1 * ran.mean((0, 2, 3)), rtol=1e-5, atol=1e-6
    )
    moved = _moved(block.norm2, before)[0]
    assert moved.tolist() == [channel < block.widths[2] for channel in range(16)]
    before = _statistics(model)
    block(x, torch.zeros(4, dtype=torch.int64))
    assert not _moved(block.norm1, before).any()
    assert not _moved(block.norm2, before).any()


def test_tasks_with_norms_of_their_own_leave_each_other_alone():
    model = resnet(TWO_TASKS, task_norm="per_task").train()
    x, level = torch.randn(4, 3, 8, 8), torch.full((4, 3), 3)
    before = _statistics(model)
    model(x, "b", level)
    block = model.estimator.blocks[0]
    assert _moved(block.norm2, before).any(1).tolist() == [False] * 7 + [True]
    assert _moved(model.estimator.stem.norm, before).any(1).tolist() == [False, True]
    shared = resnet(TWO_TASKS)
    assert shared.estimator.stem.norm.running_mean.shape[0] == 1


def test_larger_images_enter_through_a_strided_stem():
    model = wrn()
    sizes = []
    model.estimator.blocks[0].register_forward_hook(lambda _, args, __: sizes.append(tuple(args[0].shape[2:])))
    for size in ((8, 8), (15, 15), (16, 16), (24, 24), (16, 32), (5, 5)):
        model(torch.randn(1, 3, *size), level=[1, 1, 1])
    assert sizes == [(8, 8), (15, 15), (8, 8), (8, 8), (8, 16), (5, 5)]
    native = wrn(base_size=None)
    native.estimator.blocks[0].register_forward_hook(lambda _, args, __: sizes.append(tuple(args[0].shape[2:])))
    native(torch.randn(1, 3, 24, 24))
    assert sizes[-1] == (24, 24)


def test_levels_may_be_one_path_a_list_or_any_integers():
    model = wrn()
    x = torch.randn(2, 3, 8, 8)
    wanted = model(x, level=torch.tensor([[1, 0, 3], [1, 0, 3]])).logits
    for level in (
        [1, 0, 3],
        (1, 0, 3),
        torch.tensor([1, 0, 3], dtype=torch.int32),
        torch.tensor([1, 0, 3], dtype=torch.uint8),
    ):
        out = model(x, level=level)
        assert torch.equal(out.logits, wanted)
        assert out.level.dtype == torch.int64
        assert out.level.shape == (2, 3)


@pytest.mark.parametrize("make", RESIDUAL)
def test_empty_and_single_batches(make):
    model = make()
    assert model(torch.zeros(0, *image_shape(make))).logits.shape == (0, 5)
    assert model(torch.zeros(1, *image_shape(make))).level_probs.shape == (1, 3, 4)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("how", ["compile", "export"])
def test_compile_and_export_take_the_levels_as_input(make, how):
    model = make().requires_grad_(False)
    x = torch.randn(3, *image_shape(make))
    if how == "compile":
        torch.compiler.reset()  # else the models before this one count towards the limit of recompilations
        graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        graph = torch.export.export(model, (x, "a", torch.zeros(3, model.num_blocks, dtype=torch.int64))).module()
    for _ in range(2):
        level = torch.randint(model.num_levels, (3, model.num_blocks))
        torch.testing.assert_close(graph(x, "a", level).logits, model(x, "a", level).logits)


def test_compile_takes_the_selector_too():
    model = wrn().requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(compiled(x, "a").logits, model(x, "a").logits)


def test_training_compiles():
    model = wrn().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, level = torch.randn(3, 3, 8, 8), torch.tensor([[0, 1, 2], [3, 0, 1], [2, 2, 0]])
    compiled(x, "a", level).logits.square().sum().backward()
    gradients = {name: p.grad for name, p in model.estimator.named_parameters()}
    again = wrn().train()
    again(x, "a", level).logits.square().sum().backward()
    for name, parameter in again.estimator.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    for mine, wanted in zip(model.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_initialisation_is_glorots():
    model = den.create_model("wrn_14_4", {"a": 10})
    weight = model.estimator.blocks[2].conv1.weight
    bound = (6 / (9 * (weight.shape[0] + weight.shape[1]))) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert (model.estimator.heads["a"].bias == 0).all()


def test_selector_masks_levels_that_a_block_lacks():
    selector = Selector(3, 4, level_counts=(4, 2, 3))
    probabilities = selector(torch.randn(2, 3, 32, 32)).softmax(2)
    assert (probabilities[:, 1, 2:] == 0).all()
    assert (probabilities[:, 2, 3:] == 0).all()
    assert (probabilities[:, 0] > 0).all()


X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x has shape \(3, 8, 8\)"),
        ({"x": X[:, :1]}, ValueError, r"\[N, 3, H, W\]"),
        ({"x": X[..., :0]}, ValueError, "at least one pixel"),
        ({"x": X.to(torch.uint8)}, TypeError, "torch.uint8"),
        ({"x": X.numpy()}, TypeError, "ndarray"),
        ({"x": X.to("meta")}, ValueError, "x is on meta"),
        ({"task": "c"}, ValueError, "task is 'c'.*'a', 'b'"),
        ({"task": None}, ValueError, "task is None"),
        ({"level": [0, 1]}, ValueError, r"\(2,\).*\[2, 3\], or \[B\]"),
        ({"level": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, r"\(3, 3\)"),
        ({"level": [0, 1, 4]}, ValueError, r"level holds 4.*\[0, 3\]"),
        ({"level": [0, -1, 0]}, ValueError, "level holds -1"),
        ({"level": torch.zeros(3)}, TypeError, "float32"),
        ({"level": torch.zeros(3, dtype=torch.bool)}, TypeError, "bool"),
        ({"level": "top"}, TypeError, "level is 'top'"),
        ({"level": 3}, TypeError, "level is 3"),
        ({"level": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "level is on meta"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_names_what_is_wrong(arguments, error, message, frozen):
    model = wrn(TWO_TASKS)
    model = den.freeze(model, backend="grouped") if frozen else model
    with pytest.raises(error, match=message):
        model(**{"x": X, "task": "a", **arguments})


@pytest.mark.parametrize("frozen", [False, True])
def test_fully_connected_layers_ask_for_their_image_size(frozen):
    for model, x, shapes in (
        (conv_net(), torch.zeros(1, 1, 40, 40), "2x2.*made for 1x1"),
        (vgg(), torch.zeros(1, 3, 12, 12), "3x3.*made for 2x2"),
    ):
        with pytest.raises(ValueError, match=rf"last map of {shapes}.*image_size"):
            (den.freeze(model) if frozen else model)(x)

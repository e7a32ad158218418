"""The defining property of each competitor whose network is a DEN: which weights, levels and rewards it may use."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from baseline_cases import OPTIONS, digits, quick, tasks_of
from den_cases import image_shape, resnet, resnext, vgg, wrn

import den
from den import baselines
from den.baselines import METHODS, slim_path
from den.baselines.blockdrop import Choice, open_blocks, reward
from den.baselines.packnet import owned

# Static slim


@pytest.mark.parametrize(
    ("name", "miss"), [("wrn_32_4", 0.003), ("resnet_42", 0.003), ("vgg_16", 0.003), ("resnext_29_4x64d", 0.015)]
)
def test_slim_path_meets_its_flops(name: str, miss: float) -> None:
    for share in (0.2, 0.53, 0.9):
        ratios, path = slim_path(name, share, 32)
        with torch.device("meta"):
            model = den.create_model(name, {"a": 2}, ratios=ratios)
        full = den.flops(model, [model.num_levels - 1] * model.num_blocks, 32)
        assert float(den.flops(model, path, 32) / full) == pytest.approx(share, abs=miss)
    assert set(slim_path(name, 1.0, 32)[1]) == {len(slim_path(name, 1.0, 32)[0]) - 1}


def test_slim_reads_its_own_weights_alone() -> None:
    method = METHODS["slim"]("wrn_8_1", [digits()], quick("slim", share=0.4), options=OPTIONS)
    method.fit()
    network, images = method.network.eval(), torch.randn(4, 3, 8, 8)
    expected = network(images, level=method.path).logits
    with torch.no_grad():
        for block, level in zip(network.estimator.blocks, method.path, strict=True):
            block.conv1.weight[block.widths[level] :] = float("nan")
            block.conv2.weight[:, block.widths[level] :] = float("nan")
    assert torch.equal(network(images, level=method.path).logits, expected)


# Random selector


def test_random_selector_trains_on_every_level_alike() -> None:
    method = METHODS["random"]("wrn_8_1", [digits()], quick("random", epochs=4), options=OPTIONS)
    seen = []
    real = method.network.estimator.forward
    method.network.estimator.forward = lambda x, level_NB, task: seen.append(level_NB) or real(x, level_NB, task)
    method.fit()
    level_NB = torch.cat(seen)
    share_BL = torch.nn.functional.one_hot(level_NB, 4).float().mean(0)
    deviation = (0.25 * 0.75 / len(level_NB)) ** 0.5
    assert len(level_NB) == 4 * 192
    assert (share_BL - 0.25).abs().max() < 4 * deviation


# NestedNet


def nested_gradients(method, task: str) -> dict[str, torch.Tensor]:
    estimator = method.network.train().estimator
    estimator.zero_grad()
    level_NB = torch.tensor(method.path(task)).expand(8, -1)
    estimator(torch.randn(8, 3, 8, 8), level_NB, task).square().sum().backward()
    return {name: p.grad for name, p in estimator.named_parameters() if p.grad is not None}


def test_nestednets_lower_level_is_inside_the_higher() -> None:
    method = METHODS["nestednet"]("wrn_8_1", tasks_of("nestednet"), quick("nestednet", order=("b", "a")))
    assert method.level == {"b": 0, "a": 1}
    low, high = nested_gradients(method, "b"), nested_gradients(method, "a")
    for b, block in enumerate(method.network.estimator.blocks):
        width = block.widths[0]
        assert 2 * width == block.widths[1]
        name = f"blocks.{b}.conv1.weight"
        assert low[name][width:].count_nonzero() == 0
        assert low[name][:width].count_nonzero() > 0
        assert (high[name].flatten(1).abs().sum(1) > 0).all()  # the shared part and its own


def test_nestednet_of_one_task_is_every_level_of_it() -> None:
    summary = baselines.train("nestednet", "wrn_8_1", [digits()], quick("nestednet"), options=OPTIONS)
    assert list(summary["digits"]) == ["L", "M", "H"]
    assert [policy["cost_mean"] for policy in summary["digits"].values()] == [0.25, 0.5, 1]


# PackNet*

PACKED = {"wrn": wrn, "resnet": resnet, "resnext": resnext, "vgg": vgg}


@pytest.mark.parametrize("make", PACKED.values(), ids=PACKED)
def test_packnets_tasks_divide_the_weights(make) -> None:
    """Every weight is trained by one task alone, and a task's logits read no later task's weight.

    (With a residual network's four levels and three tasks, a shift of one: its level 0 has nothing to train.)
    """
    tasks = {"a": 5, "b": 3, "c": 4}
    more = {"ratios": (0.25, 0.5, 1)} if make in (wrn, resnext) else {}
    model = make(tasks, task_norm="per_task", **more)
    levels = range(1, 4) if make is resnet else range(3)
    estimator = model.estimator
    masks = [owned(estimator, task, level) for task, level in zip(tasks, levels, strict=True)]
    if make is not resnet:
        for name, parameter in estimator.named_parameters():
            assert torch.equal(sum(mask[name].int() for mask in masks), torch.ones_like(parameter).int()), name
    images = torch.randn(3, *image_shape(make))
    for t, (task, level) in enumerate(zip(tasks, levels, strict=True)):
        path = [level] * model.num_blocks
        expected = model(images, task, path).logits
        saved = {name: p.detach().clone() for name, p in estimator.named_parameters()}
        with torch.no_grad():
            for name, parameter in estimator.named_parameters():
                for later in masks[t + 1 :]:
                    parameter[later[name]] = float("nan")
        assert torch.equal(model(images, task, path).logits, expected), task
        estimator.load_state_dict(saved, strict=False)


@pytest.mark.parametrize("name", ["wrn_8_1", "resnet_10", "resnext_11_4x16d"])
def test_packnet_leaves_earlier_tasks_as_they_were(name: str) -> None:
    """Weights and logits of the first task, bit for bit, after weight decay and momentum of the second."""
    config = quick("packnet", weight_decay=0.01, lr=0.1)
    method = METHODS["packnet"](name, tasks_of("packnet", 128), config, options=OPTIONS)
    network, images = method.network, torch.randn(16, 3, 8, 8)
    phases = method.phases()
    method.loop.run(phases[:1])
    mask = owned(network.estimator, "a", 0)
    before = {n: p.detach().clone() for n, p in network.estimator.named_parameters()}
    logits = network.eval()(images, "a", method.path("a")).logits
    other = network(images, "b", method.path("b")).logits
    method.loop.run(phases)
    for n, parameter in network.estimator.named_parameters():
        assert torch.equal(parameter[mask[n]], before[n][mask[n]]), n
    assert torch.equal(network.eval()(images, "a", method.path("a")).logits, logits)
    assert not torch.equal(network(images, "b", method.path("b")).logits, other)


# BlockDrop


def test_blockdrops_reward_by_hand() -> None:
    keep_NB = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    right_N = torch.tensor([True, True, True, False])
    assert reward(keep_NB, right_N, 5.0).tolist() == [0.75, 0.0, 1.0, -5.0]


def test_blockdrops_curriculum_opens_the_last_blocks_first() -> None:
    assert [open_blocks(epoch, 10, 4) for epoch in range(6)] == [1, 2, 3, 4, 4, 4]
    assert [open_blocks(epoch, 2, 5) for epoch in range(2)] == [3, 5]
    logits_NBL = torch.randn(64, 4, 2, requires_grad=True)
    choice = Choice(logits_NBL, 0.8, 2, torch.bernoulli)
    assert (choice.drawn_NB[:, :2] == 1).all()
    assert (choice.greedy_NB[:, :2] == 1).all()
    assert 0 < choice.drawn_NB[:, 2:].float().mean() < 1
    choice.loss(torch.randn(64), torch.zeros(64)).backward()
    assert logits_NBL.grad[:, :2].count_nonzero() == 0
    assert logits_NBL.grad[:, 2:].count_nonzero() > 0


def test_blockdrops_gradient_is_that_of_the_expected_reward() -> None:
    """Over all eight choices of three blocks, to within the sampling error of 200,000 draws."""
    torch.manual_seed(0)
    logits_BL, bound = torch.randn(3, 2, dtype=torch.float64), 0.8
    table = 5 * torch.rand(2, 2, 2, dtype=torch.float64)  # a reward for every choice
    exact_BL = logits_BL.clone().requires_grad_()
    s_B = exact_BL.softmax(1)[:, 1]
    keep_B = bound * s_B + (1 - bound) * (1 - s_B)
    expected = sum(
        table[u] * torch.prod(torch.stack([k if kept else 1 - k for k, kept in zip(keep_B, u, strict=True)]))
        for u in itertools.product((0, 1), repeat=3)
    )
    (-expected).backward()
    samples = 200_000
    drawn_BL = logits_BL.clone().requires_grad_()
    choice = Choice(drawn_BL.expand(samples, -1, -1), bound, 3, torch.bernoulli)
    rewards = [table[tuple(keep_NB.unbind(1))] for keep_NB in (choice.drawn_NB, choice.greedy_NB)]
    choice.loss(*rewards).backward()
    assert drawn_BL.grad == pytest.approx(exact_BL.grad, abs=6e-3)
    assert exact_BL.grad.abs().max() > 5e-2


def test_blockdrop_has_two_levels_and_a_fixed_network_in_the_curriculum() -> None:
    method = METHODS["blockdrop"]("wrn_8_1", [digits()], quick("blockdrop"), options=OPTIONS)
    assert method.network.estimator.hierarchy.ratios == (0, 1)
    phases = method.phases()
    method.loop.run(phases[:1])
    weights = [p.detach().clone() for p in method.network.parameters()]
    method.loop.run(phases[:2])
    estimator = len(list(method.network.estimator.parameters()))
    same = [torch.equal(p, w) for p, w in zip(method.network.parameters(), weights, strict=True)]
    assert all(same[:estimator])
    assert not any(same[estimator:])


def test_options_that_are_not_the_methods_levels_are_named() -> None:
    more = {**OPTIONS, "ratios": (0, 0.5, 1)}
    with pytest.raises(ValueError, match=r"ratios is \(0.0, 0.5, 1.0\); BlockDrop's levels are \(0, 1\)"):
        METHODS["blockdrop"]("wrn_8_1", [digits()], options=more)
    tasks = [*tasks_of("packnet"), replace(digits(), name="c"), replace(digits(), name="d")]
    with pytest.raises(ValueError, match="packnet needs a level for each of its 4 tasks"):
        METHODS["packnet"]("wrn_8_1", tasks, options=more)

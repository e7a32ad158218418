"""The defining property of each competitor with a network of its own kind."""

from __future__ import annotations

import pytest
import torch
from baseline_cases import OPTIONS, quick, tasks_of
from den_cases import MAKERS, image_shape, live_in
from hypothesis import given
from hypothesis import strategies as st

import den
from den.baselines import METHODS
from den.baselines.cross_stitch import CrossStitchNetworks, Stitch
from den.baselines.independent import IndependentNetworks
from den.baselines.pruned import PrunedNetwork, choose_widths, hidden_spaces, importance, reorder, unit
from den.baselines.routing import RoutedNetwork, Router, project, route
from den.flops import count_parameters, full_macs

TASKS = {"a": 5, "b": 3}


# Independent networks


def test_independent_networks_learn_as_if_alone() -> None:
    """Bit for bit the weights of a run on the first task only."""
    both, alone = (
        METHODS["independent"]("wrn_8_1", tasks, quick("independent", epochs=2), options=OPTIONS)
        for tasks in (tasks_of("independent"), tasks_of("independent")[:1])
    )
    both.fit()
    alone.fit()
    for (name, one), other in zip(
        both.network.networks["a"].state_dict().items(), alone.network.networks["a"].state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_path_of_another_level_is_refused() -> None:
    network = IndependentNetworks("wrn_8_1", TASKS, OPTIONS).eval()
    x = torch.randn(2, 3, 8, 8)
    assert network(x, "b", [0, 0, 0]).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="has one path, level 0 in every block"):
        network(x, "b", [0, 1, 0])


# Cross-stitch


def test_stitch_by_hand() -> None:
    unit = Stitch(2, 3, 0.75)
    with torch.no_grad():
        unit.alpha[0, 1, 2] = 2.0  # network a's third channel
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mixed_a, mixed_b = unit([a, b])
    assert torch.allclose(mixed_a[:, :2], 0.75 * a[:, :2] + 0.25 * b[:, :2])
    assert torch.allclose(mixed_a[:, 2], 0.75 * a[:, 2] + 2 * b[:, 2])
    assert torch.allclose(mixed_b, 0.75 * b + 0.25 * a)


@pytest.mark.parametrize(("name", "size", "units"), [("wrn_8_1", 8, 3), ("wrn_14_1", 8, 3), ("simple_conv_net", 28, 4)])
def test_cross_stitch_is_independent_networks_and_their_mixtures(name: str, size: int, units: int) -> None:
    """With nothing taken from the other network the logits are the network's own; else both learn from one task."""
    options = {"image_size": 28} if size == 28 else OPTIONS
    gradients = {}
    for same in (1.0, 0.9):
        network = live_in(CrossStitchNetworks(name, TASKS, options, same))
        assert len(network.units) == units
        x = torch.randn(4, 3, size, size)
        logits = network(x, "b").logits
        assert logits.shape == (4, 3)
        alone = network.columns[1](x, torch.zeros(4, network.num_blocks, dtype=torch.int64), "b")
        assert torch.allclose(logits, alone, atol=1e-5) == (same == 1.0)
        logits.square().sum().backward()
        gradients[same] = [
            sum(p.grad.abs().sum() for p in c.parameters() if p.grad is not None) for c in network.columns
        ]
    assert gradients[1.0][0] == 0 < gradients[1.0][1]
    assert min(gradients[0.9]) > 0


# Routing


def test_route_is_the_loop_over_samples() -> None:
    torch.manual_seed(0)
    blocks = [torch.nn.Linear(5, 4) for _ in range(3)]
    h, choice_N = torch.randn(7, 5), torch.tensor([2, 0, 2, 2, 0, 0, 2])  # nobody takes the second
    found = route(blocks, h, choice_N, lambda block, part: block(part))
    expected = torch.stack([blocks[k](row) for k, row in zip(choice_N.tolist(), h, strict=True)])
    assert torch.allclose(found, expected, atol=1e-6)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.floats(0, 0.15), st.integers(0, 99))
def test_projection_is_onto_the_simplex_and_the_nearest(values: list[float], floor: float, seed: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    found = project(x, floor)
    assert float(found.sum()) == pytest.approx(1)
    assert float(found.min()) >= floor - 1e-12
    others = torch.distributions.Dirichlet(torch.ones(len(values), dtype=torch.float64))
    torch.manual_seed(seed)
    candidates = floor + (1 - len(values) * floor) * others.sample((50,))
    assert (found - x).norm() <= (candidates - x).norm(dim=1).min() + 1e-9


def test_router_learns_by_hand_and_then_for_good() -> None:
    router = Router(2, 1, 2)
    choice_NP, reward_N = torch.tensor([[0], [1], [1]]), torch.tensor([-1.0, 1.0, 0.0])
    router.learn(1, choice_NP, reward_N, rate=0.1, value_rate=0.5, floor=0.05)
    # Mean rewards -1 and 1/2, half way: values -1/2 and 1/4, expected -1/8; gradients -3/8 and 3/8, each weighted 1/2.
    assert router.value_TPK[1, 0].tolist() == [-0.5, 0.25]
    assert router.prob_TPK[1, 0].tolist() == pytest.approx([0.5 - 0.01875, 0.5 + 0.01875])
    assert router.prob_TPK[0].tolist() == [[0.5, 0.5]]  # another task's agent
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        choice_NP = router.draw(1, 32, generator)
        router.learn(1, choice_NP, torch.where(choice_NP[:, 0] == 1, 0.8, 0.2), 0.1, 0.1, 0.05)
    assert router.prob_TPK[1, 0].tolist() == pytest.approx([0.05, 0.95], abs=1e-5)


@pytest.mark.parametrize(("name", "size", "layers"), [("simple_conv_net", 28, 2), ("wrn_8_1", 8, 3)])
def test_function_blocks_are_shared_by_choice(name: str, size: int, layers: int) -> None:
    """The hidden layers where there are some, else the blocks; only what is chosen gets a gradient."""
    options = {"image_size": 28} if size == 28 else OPTIONS
    network = live_in(RoutedNetwork(name, TASKS, options, 3)).train()
    assert network.num_blocks == layers
    x, path = torch.randn(4, 3, size, size), [2, *[0] * (layers - 1)]
    network(x, "a", path).logits.square().sum().backward()
    got = [any(p.grad is not None for p in block.parameters()) for block in network.function_blocks(0)]
    assert got == [False, False, True]
    out = network.eval()(x, "b")
    assert out.level_probs.shape == (4, layers, 3)
    counts = network.account(out.level, (size, size))
    single = den.create_model(name, TASKS, ratios=(1,), selector="light", **options)
    assert counts["flops"][0] == 2 * full_macs(single, size)
    routed = network.function_blocks
    weights = sum(
        p.numel() for layer in range(layers) for p in routed(layer)[0].parameters() if p.dim() > 2 or size == 28
    )
    assert counts["stored_parameters"] == count_parameters(single) + 2 * weights


# Channel pruning


@pytest.mark.parametrize("make", MAKERS)
def test_pruned_network_is_the_whole_with_channels_at_zero(make) -> None:
    """At level 0, after pruning, against the network as it was with the dropped channels' contract weights at zero."""
    pytest.importorskip("torch_pruning")
    network = pruned_network(make)
    x = torch.randn(3, *image_shape(make))
    whole, full = network(x, "a", [1] * network.num_blocks).logits, count_parameters(network.estimator)
    network.prune(0.5)
    assert torch.allclose(network(x, "a", [1] * network.num_blocks).logits, whole, atol=1e-4)  # only reordered
    counts = network.account(torch.zeros(1, network.num_blocks, dtype=torch.int64), image_shape(make)[1:])
    assert counts["stored_parameters"] == counts["parameters"][0] <= 0.5 * full
    one = max(2 * block.param_counts[1] * unit(block) // block.widths[1] for block in network.blocks)
    assert counts["stored_parameters"] + one > 0.5 * full  # no more than was needed
    found = network(x, "a").logits
    with torch.no_grad():
        for block in network.blocks:
            width = block.widths[0]
            for spaces in hidden_spaces(block):
                writes, norm, reads = spaces[-1]
                if norm is None:
                    writes.bias[width:] = 0
                reads.weight[:, width:] = 0
    assert torch.allclose(network(x, "a", [1] * network.num_blocks).logits, found, atol=1e-4)


def pruned_network(make) -> PrunedNetwork:
    """A network of `den_cases` with levels 1/2 and 1, as the competitor would have it."""
    network = PrunedNetwork("wrn_8_1", {"a": 5}, OPTIONS)
    network.estimator = with_two_levels(make)
    network.num_blocks = network.estimator.num_blocks
    network.width_B = torch.tensor([block.widths[1] for block in network.blocks])
    network.apply_widths()
    return network.eval()


def with_two_levels(make):
    """The estimator of a maker whose hierarchy may be fixed: its two highest levels, as tables."""
    model = make({"a": 5})
    for block in model.estimator.blocks:
        top = block.widths[-2:]
        block.widths, block.level_width = top, block.level_width[-2:].clone()
        block.hierarchy = den.Hierarchy((0.5, 1))
        for module in block.modules():
            rows = getattr(module, "num_levels", 1)
            if hasattr(module, "running_mean") and rows > 2:
                keep_last_two(module)
    return model.estimator


def keep_last_two(norm) -> None:
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        table = getattr(norm, name).detach()[-2:].clone()
        setattr(norm, name, torch.nn.Parameter(table) if name in ("weight", "bias") else table)
    norm.num_levels = 2


def test_channels_of_least_magnitude_go() -> None:
    pytest.importorskip("torch_pruning")
    network = live_in(PrunedNetwork("resnext_11_4x16d", TASKS, OPTIONS))
    block = network.blocks[1]
    size = unit(block)
    with torch.no_grad():
        for path in (0, 2):  # of four
            rows = slice(path * size, (path + 1) * size)
            block.conv1.weight[rows] *= 1e-3
            block.conv2.weight[rows] *= 1e-3
            block.conv3.weight[:, rows] *= 1e-3
    (score,) = importance(block)
    assert set(score.argsort()[:2].tolist()) == {0, 2}
    kept = block.conv3.weight[:, size : 2 * size].clone(), block.conv3.weight[:, 3 * size :].clone()
    reorder(block, [score])
    front = block.conv3.weight[:, :size], block.conv3.weight[:, size : 2 * size]
    assert all(any(torch.equal(f, k) for k in kept) for f in front)


def test_every_block_keeps_a_unit() -> None:
    estimator = IndependentNetworks("wrn_8_1", {"a": 5}, OPTIONS).networks["a"]
    scores = [[torch.zeros(block.widths[-1])] for block in estimator.blocks]
    with pytest.raises(ValueError, match=r"share is 0\.001; with one unit in each block"):
        choose_widths(estimator, scores, 0.001)
    assert choose_widths(estimator, scores, 1.0) == [16, 32, 64]

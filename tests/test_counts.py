"""Sizes printed in the paper, to the last parameter and multiply-add."""

import pytest
import torch
from den_cases import TINY_SELECTOR, conv_net, resnet, wrn
from torch.utils.flop_counter import FlopCounterMode

import den
from den.flops import block_macs, fixed_macs, full_macs, selector_macs


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def wrn_32_4() -> den.DEN:
    return den.create_model("wrn_32_4", {"cifar100": 100})


def test_wrn_32_4(wrn_32_4):
    assert wrn_32_4.num_blocks == 15
    assert den.count_parameters(wrn_32_4) == 7_345_584
    assert full_macs(wrn_32_4, 32) == 1_066_844_160
    assert den.flops(wrn_32_4, [3] * 15, 32).tolist() == [2 * 1_066_844_160]
    convs = [m for m in wrn_32_4.estimator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(conv.weight.numel() for conv in convs) == 7_345_584
    assert all(conv.bias is None for conv in convs)


def test_level_costs_are_the_ratios(wrn_32_4):
    expected = torch.tensor([0, 0.25, 0.5, 1]).expand(15, 4)
    torch.testing.assert_close(den.cost_ratios(wrn_32_4), expected, rtol=0, atol=0)
    macs_BL = block_macs(wrn_32_4, 32)
    assert torch.equal(macs_BL, (expected.double() * macs_BL[:, -1:]).long())
    stem = 432
    assert den.count_parameters(wrn_32_4, [0] * 15) == stem
    assert den.count_parameters(wrn_32_4, [1] * 15) == stem + (7_345_584 - stem) // 4
    assert fixed_macs(wrn_32_4, 32) == stem * 32 * 32


def test_nested_net_in_m1_averages_1_24_gflop(wrn_32_4):
    """Table 2b: three tasks on a quarter, half and all of the channels."""
    paths = torch.tensor([[1] * 15, [2] * 15, [3] * 15])
    mean = den.flops(wrn_32_4, paths, 32).double().mean().item()
    assert int(mean / 1e7) == 124  # 1.245, which the paper truncates


@pytest.mark.parametrize("size", [64, 96, (96, 128)])
def test_native_resolutions_cost_no_more_than_their_stem_stride_leaves(wrn_32_4, size):
    height, width = (size, size) if isinstance(size, int) else size
    stride = min(height, width) // 32
    scale = -(-height // stride) * -(-width // stride) / 1024
    assert full_macs(wrn_32_4, size) == pytest.approx(1_066_844_160 * scale, rel=0.02)
    if height == width:
        assert full_macs(wrn_32_4, size) == 1_066_844_160


def test_paper_selector_of_wrn(wrn_32_4):
    assert parameters(wrn_32_4.selector) / 1e6 == pytest.approx(0.37, abs=0.005)
    assert 2 * selector_macs(wrn_32_4, 32) / 1e9 == pytest.approx(0.11, abs=0.005)
    full = [3] * 15
    with_selector = den.flops(wrn_32_4, full, 32, include_selector=True)
    assert (with_selector - den.flops(wrn_32_4, full, 32)).item() == 2 * selector_macs(wrn_32_4, 32)


@pytest.mark.parametrize(
    ("name", "size", "count", "macs"),
    [("simple_conv_net_84", 84, 147_552, 27_458_048), ("simple_conv_net_224", 224, 847_968, 49_590_272)],
)
def test_simple_conv_net(name, size, count, macs):
    model = den.create_model(name, {"a": 5}, selector="light")
    assert den.count_parameters(model) == count
    assert full_macs(model, size) == macs
    assert den.cost_ratios(model).tolist() == [[0.5, 1], [0.5, 1]]
    assert model(torch.zeros(1, 3, size, size)).logits.shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "base_size"),
    [("wrn_8_1", 8), ("wrn_14_1", 8), ("wrn_14_2", 16), ("wrn_32_4", 32), ("simple_conv_net", 84)],
)
def test_light_selector_costs_at_most_three_percent(name, base_size):
    model = den.create_model(name, {"a": 5}, selector="light", base_size=base_size)
    assert 0 < selector_macs(model, base_size) <= 0.03 * full_macs(model, base_size)


@pytest.mark.parametrize("make", [wrn, resnet, conv_net])
def test_flops_are_those_that_pytorch_counts(make):
    """The FLOP counter on the plain network of the same path, less its head."""
    model = make()
    generator = torch.Generator().manual_seed(0)
    channels, size = (1, 28) if make is conv_net else (3, 16)
    for _ in range(5):
        path = torch.randint(model.num_levels, (model.num_blocks,), generator=generator)
        network = den.dense(model, level=path)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, channels, size, size))
        assert den.flops(model, path, size).item() == counter.get_total_flops() - 2 * network.head.weight.numel()


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_selector_flops_are_those_that_pytorch_counts(pool):
    model = wrn(selector={**TINY_SELECTOR, "pool": pool})
    with FlopCounterMode(display=False) as counter:
        model.selector(torch.zeros(1, 3, 17, 20))
    assert 2 * selector_macs(model, (17, 20)) == counter.get_total_flops() - 2 * model.selector.head.weight.numel()


def test_flops_of_a_batch_and_of_a_frozen_model():
    model = wrn()
    paths = torch.randint(4, (6, 3))
    each = [den.flops(model, path, 8).item() for path in paths]
    assert den.flops(model, paths, 8).tolist() == each
    frozen = den.freeze(model, backend="grouped")
    assert den.flops(frozen, paths, 8, include_selector=True).tolist() == [
        f + 2 * selector_macs(model, 8) for f in each
    ]
    assert torch.equal(den.cost_ratios(frozen), den.cost_ratios(model))


@pytest.mark.parametrize(
    ("level", "error", "message"),
    [
        ([0, 1], ValueError, r"\(2,\).*B = 3"),
        ([0, 1, 4], ValueError, r"from 0 to 4.*\[0, 3\]"),
        ([0.0, 1.0, 2.0], TypeError, "float32"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "bool"),
    ],
)
def test_bad_levels(level, error, message):
    with pytest.raises(error, match=message):
        den.flops(wrn(), level, 8)


def test_bad_image_size():
    with pytest.raises(ValueError, match="image_size is 0"):
        den.flops(wrn(), [0, 0, 0], 0)
    with pytest.raises(ValueError, match="own"):
        selector_macs(den.create_model("wrn_8_1", {"a": 2}, selector=torch.nn.Identity()), 8)

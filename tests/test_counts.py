"""Sizes printed in the paper, to the last parameter and multiply-add."""

import pytest
import torch
from den_cases import MAKERS, RESIDUAL, TINY_SELECTOR, image_shape, wrn
from torch.utils.flop_counter import FlopCounterMode

import den
import den_kernels as dk
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


def on_meta(name: str, **more) -> den.DEN:
    """A model without the memory of its weights: counting needs their shapes alone."""
    with torch.device("meta"):
        return den.create_model(name, {"a": 10}, **more)


@pytest.mark.parametrize(
    ("name", "blocks", "count", "macs"),
    [
        ("resnet_42", 20, 29_787_840, 1_455_095_808),
        ("resnext_29_8x64d", 9, 22_382_272, 3_390_767_104),
        ("resnext_29_4x64d", 9, 11_192_000, 1_696_268_288),
        ("resnext_29_2x64d", 9, 5_596_864, 849_018_880),
        ("vgg_16", 9, 38_893_248, 417_005_568),
        ("vgg_16d", 7, 33_584_832, 332_070_912),
        ("resnet_50", 16, 23_454_912, 4_087_136_256),
    ],
)
def test_whole_networks(name, blocks, count, macs):
    """Sizes of the paper's tables; of the common VGG-16 and torchvision's ResNet-50 without biases, norms and head."""
    model = on_meta(name)
    size = model.estimator.image_size
    assert model.num_blocks == blocks
    assert den.count_parameters(model) == count
    assert full_macs(model, size) == macs
    full = [model.num_levels - 1] * blocks
    assert den.count_parameters(model, full) == count
    assert den.flops(model, full, size).tolist() == [2 * macs]
    layers = [m for m in model.estimator.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    heads = sum(head.weight.numel() for head in model.estimator.heads.values())
    assert sum(layer.weight.numel() for layer in layers) - heads == count


@pytest.mark.parametrize(
    ("name", "counts", "macs"),
    [
        ("resnet_42", (1_728, 7_448_256, 14_894_784, 29_787_840), (1_769_472, 365_101_056, 728_432_640, 1_455_095_808)),
        ("wrn_32_4", (432, 1_836_720, 3_673_008, 7_345_584), (442_368, 267_042_816, 533_643_264, 1_066_844_160)),
        (
            "resnext_29_8x64d",
            (1_728, 5_596_864, 11_192_000, 22_382_272),
            (1_769_472, 849_018_880, 1_696_268_288, 3_390_767_104),
        ),
        ("resnext_29_4x64d", (1_728, 5_596_864, 11_192_000), (1_769_472, 849_018_880, 1_696_268_288)),
        ("resnext_29_2x64d", (1_728, 2_799_296, 5_596_864), (1_769_472, 425_394_176, 849_018_880)),
        ("vgg_16", (9_723_312, 19_446_624, 38_893_248), (104_251_392, 208_502_784, 417_005_568)),
        ("vgg_16d", (8_397_504, 16_793_280, 33_584_832), (84_344_832, 166_920_192, 332_070_912)),
        ("simple_conv_net_84", (133_296, 147_552), (13_788_416, 27_458_048)),
        ("simple_conv_net_224", (833_712, 847_968), (25_204_736, 49_590_272)),
    ],
)
def test_every_level_of_every_backbone(name, counts, macs):
    """What does not change with the level (stem; SimpleConvNet's hidden layers) and the level's share of the rest."""
    model = on_meta(name)
    size = model.estimator.image_size
    paths = [[level] * model.num_blocks for level in range(model.num_levels)]
    assert tuple(den.count_parameters(model, path) for path in paths) == counts
    assert den.flops(model, paths, size).tolist() == [2 * count for count in macs]
    shares = model.estimator.hierarchy.ratios
    for values in (counts, macs):
        fixed = (values[0] - shares[0] * values[-1]) / (1 - shares[0])
        assert [fixed + share * (values[-1] - fixed) for share in shares] == list(values)
    assert model.estimator.image_size == {"simple_conv_net_84": 84, "simple_conv_net_224": 224}.get(name, 32)


def test_every_level_of_resnet_50():
    """A level of a bottleneck block narrows its 3x3 convolution on both sides: less than its share is left."""
    counts = []
    for ratio in (0, 1 / 4, 1 / 2, 1):
        count, channels = 7 * 7 * 3 * 64, 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            hidden, out = int(ratio * 64 * 2**stage), 4 * 64 * 2**stage
            for index in range(blocks):
                count += channels * hidden + 9 * hidden * hidden + hidden * out
                count += channels * out if index == 0 else 0
                channels = out
        counts.append(count)
    model = on_meta("resnet_50")
    assert [den.count_parameters(model, [level] * 16) for level in range(4)] == counts
    assert counts == [2_778_304, 5_825_472, 10_287_296, 23_454_912]


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("resnet_42", {"parameters": "29.8M", "three": "89.4M", "flops": "2.91G"}),
        ("wrn_32_4", {"parameters": "7.35M", "three": "22.0M", "flops": "2.13G"}),
    ],
)
def test_table_2_as_printed(name, printed):
    """One network and the three of the baseline."""
    model = on_meta(name)
    count, macs = den.count_parameters(model), full_macs(model, 32)
    digits = len(printed["parameters"].split(".")[1]) - 1
    told = {
        "parameters": f"{count / 1e6:.{digits}f}M",
        "three": f"{3 * count / 1e6:.1f}M",
        "flops": f"{2 * macs / 1e9:.2f}G",
    }
    assert told == printed


@pytest.mark.parametrize(("name", "low", "high"), [("84", 18.7, 27.4), ("224", 33.3, 39.1)])
def test_table_3_multiply_adds(name, low, high):
    """Multiply-adds there, not FLOPs. The DENs' printed ones lie between the levels; 27.4M is cut, not rounded."""
    model = on_meta(f"simple_conv_net_{name}")
    least, most = (den.flops(model, [level] * 2, int(name)).item() / 2e6 for level in range(2))
    assert least < low < high <= most
    assert name == "224" or int(most * 10) / 10 == high


def test_table_4_prints_flops_of_another_network():
    """Coarse at half, fine at full: WRN-32-4's 1.07G and 2.13G, where the table has ResNet-42's 1.46G and 2.91G."""
    own, printed = [2 * full_macs(on_meta(name), 32) / 1e9 for name in ("wrn_32_4", "resnet_42")]
    assert (f"{own:.2f}", f"{printed:.2f}") == ("2.13", "2.91")
    half = den.flops(on_meta("resnet_42"), [2] * 20, 32).item() / 1e9
    assert f"{half:.2f}" == "1.46"
    assert f"{2 * den.count_parameters(on_meta('wrn_32_4')) / 1e6:.1f}M" == "14.7M"


def resnet_count(widths: tuple[int, ...], stem: int, blocks: int) -> int:
    """Weights of a stem and `blocks` pairs of 3x3 convolutions for each width, shortcuts without any."""
    total, channels = 27 * stem, stem
    for width in widths:
        for _ in range(blocks):
            total += 9 * channels * width + 9 * width * width
            channels = width
    return total


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_resnet_l_and_wrn_l_r_of_any_length(blocks):
    resnet = on_meta(f"resnet_{8 * blocks + 2}")
    assert resnet.num_blocks == 4 * blocks
    assert den.count_parameters(resnet) == resnet_count((64, 128, 256, 512), 64, blocks)
    for factor in (1, 2, 4):
        wrn_l_r = on_meta(f"wrn_{6 * blocks + 2}_{factor}")
        assert wrn_l_r.num_blocks == 3 * blocks
        assert den.count_parameters(wrn_l_r) == resnet_count((16 * factor, 32 * factor, 64 * factor), 16, blocks)


def test_common_sizes_at_224():
    """What torchvision prints for vgg16 and resnet50 (138,357,544 and 25,557,032), less biases, norms and head."""
    vgg = on_meta("vgg_16d", base_size=224)
    assert vgg.estimator.image_size == 224
    assert den.count_parameters(vgg) == 138_357_544 - (4224 + 2 * 4096) - (4096 * 1000 + 1000)
    assert den.count_parameters(on_meta("vgg_16d", image_size=224)) == 33_584_832  # entered at 32x32
    resnet_50 = on_meta("resnet_50")
    norms = [m for m in resnet_50.estimator.modules() if isinstance(m, dk.DENBatchNorm2d)]
    affine = 2 * sum(norm.num_features for norm in norms)
    assert den.count_parameters(resnet_50) == 25_557_032 - affine - (2048 * 1000 + 1000)


def test_nested_net_on_resnet_42_averages_1_70_gflop():
    """Table 2a: three tasks on a quarter, half and all of the channels."""
    paths = torch.tensor([[1] * 20, [2] * 20, [3] * 20])
    mean = den.flops(on_meta("resnet_42"), paths, 32).double().mean().item()
    assert mean / 1e9 == pytest.approx(1.70, abs=0.005)
    assert 2 * full_macs(on_meta("resnet_42"), 32) / 1e9 == pytest.approx(2.91, abs=0.005)


def test_nested_net_on_resnext():
    """Table 5: 2, 4 and 8 of 8 paths have 5.6M, 11.2M and 22.4M parameters; those of 2 and 4 paths are networks too."""
    model = on_meta("resnext_29_8x64d")
    counts = [den.count_parameters(model, [level] * 9) for level in range(4)]
    assert counts == [1728, 5_596_864, 11_192_000, 22_382_272]
    four = on_meta("resnext_29_4x64d")
    assert [den.count_parameters(four, [level] * 9) for level in range(3)] == [1728, 5_596_864, 11_192_000]


@pytest.mark.parametrize(
    ("name", "size", "factor"), [("resnext_29_8x64d", "9.79M", "2.28x"), ("resnext_29_4x64d", "5.60M", "2.00x")]
)
def test_random_selectors_of_resnext(name, size, factor):
    """Table 5: every level equally often. Printed there: 9.8M, 2.3x and 5.6M, 2.0x."""
    model = on_meta(name)
    paths = [[level] * 9 for level in range(model.num_levels)]
    mean = sum(den.count_parameters(model, path) for path in paths) / len(paths)
    flops = den.flops(model, paths, 32).double().mean().item()
    assert f"{mean / 1e6:.2f}M" == size
    assert f"{2 * full_macs(model, 32) / flops:.2f}x" == factor


def test_fully_connected_layers_of_vgg_are_elastic():
    """Table 5: 19.4M at half the channels, 2.0x, only if the hidden layers are halved with the convolutions."""
    model = on_meta("vgg_16")
    assert den.cost_ratios(model).tolist() == [[0.25, 0.5, 1]] * 9
    assert fixed_macs(model, 32) == 0
    last = model.estimator.blocks[-1]
    layers = [last.linear1, last.linear2]
    assert all(isinstance(layer, dk.DENLinear) for layer in layers)
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(512, 4096), (4096, 4096)]
    assert tuple(last.param_counts) == tuple((512 + 4096) * width for width in (1024, 2048, 4096))
    assert not any(isinstance(layer, dk.DENLinear) for layer in model.estimator.heads.values())


def test_projections_cost_the_same_at_every_level():
    model = on_meta("resnet_50")
    projections = [64 * 256, 256 * 512, 512 * 1024, 1024 * 2048]
    assert den.count_parameters(model, [0] * 16) == 7 * 7 * 3 * 64 + sum(projections)
    macs_BL = block_macs(model, 224)
    sizes = [56, 28, 14, 7]
    for first, weights, size in zip((0, 3, 7, 13), projections, sizes, strict=True):
        assert macs_BL[first, 0] == weights * size * size
        assert (macs_BL[first + 1 : first + 3, 0] == 0).all()


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


@pytest.mark.parametrize("make", MAKERS)
def test_flops_are_those_that_pytorch_counts(make):
    """The FLOP counter on the plain network of the same path, less its head."""
    model = make()
    generator = torch.Generator().manual_seed(0)
    shape = image_shape(make)
    if make in RESIDUAL:
        shape = shape[0], 2 * shape[1], 2 * shape[2] - 3
    for _ in range(5):
        path = torch.randint(model.num_levels, (model.num_blocks,), generator=generator)
        network = den.dense(model, level=path)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *shape))
        assert den.flops(model, path, shape[1:]).item() == counter.get_total_flops() - 2 * network.head.weight.numel()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_flops_are_those_that_the_operators_ran(make, frozen):
    """In a mixed batch, as the operators' own formulas tell from the widths that they were given."""
    model = make()
    x, level = torch.randn(5, *image_shape(make)), torch.randint(model.num_levels, (5, model.num_blocks))
    run = den.freeze(model, backend="grouped") if frozen else model
    with FlopCounterMode(display=False) as counter:
        run(x, level=level)
    heads = 2 * 5 * model.estimator.heads["a"].weight.numel()
    assert den.flops(model, level, x.shape[2:]).sum().item() == counter.get_total_flops() - heads


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

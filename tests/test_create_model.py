"""Models by name and by config, and what is said about arguments of which none can be made."""

import pytest
import torch
from den_cases import TWO_TASKS, conv_net, wrn
from torch import nn

import den
from den.blocks import BottleneckBlock, ConvPairBlock, LinearPairBlock, ResidualBlock


def test_config_rebuilds_the_model():
    model = den.create_model("wrn_8_1", TWO_TASKS, (0, 0.5, 1), 1, "shared", "light", task_norm="per_task", base_size=8)
    again = den.create_model(**model.config)
    assert again.config == model.config
    assert again.load_state_dict(model.state_dict())
    assert den.create_model(**conv_net().config).estimator.tail.map_shape == (32, 1, 1)


def test_a_selector_of_the_callers_own():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 0, 1, 0]).expand(x.shape[0], 3, 4)

    model = wrn(selector=Constant())
    assert (model(torch.randn(2, 3, 8, 8)).level == 2).all()
    assert model.config["selector"] == "custom"
    with pytest.raises(ValueError, match="pass that module"):
        den.create_model(**model.config)


def test_list_models():
    assert den.list_models("wrn_32*") == ["wrn_32_1", "wrn_32_2", "wrn_32_4", "wrn_32_8"]
    assert {"wrn_32_4", "simple_conv_net", "simple_conv_net_84", "simple_conv_net_224"} <= set(den.list_models())
    assert den.list_models("resne*") == [
        *("resnet_10", "resnet_18", "resnet_26", "resnet_34", "resnet_42", "resnet_50", "resnet_101", "resnet_152"),
        *("resnext_29_2x64d", "resnext_29_4x64d", "resnext_29_8x64d", "resnext_29_16x64d"),
    ]
    assert den.list_models("vgg*") == ["vgg_16", "vgg_16d"]
    assert den.list_models("no*") == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "wrn_32"}, ValueError, "'wrn_32'.*Near: .*wrn_32_4"),
        ({"name": "wrn_33_4"}, ValueError, r"6n \+ 2"),
        ({"name": "wrn_32_0"}, ValueError, "factor"),
        ({"name": "wrn_2_1"}, ValueError, r"6n \+ 2"),
        ({"name": "resnet_44"}, ValueError, r"8n \+ 2"),
        ({"name": "resnet_2"}, ValueError, r"8n \+ 2"),
        ({"name": "resnext_28_4x64d"}, ValueError, r"9n \+ 2"),
        ({"name": "resnext_29_4x0d"}, ValueError, "channels a path"),
        ({"name": "resnext_29_2x4d", "ratios": (0, 0.25, 0.5, 1)}, ValueError, "8 channels in 2 groups"),
        ({"name": "vgg_16", "ratios": (0, 1)}, ValueError, "above 0 here"),
        ({"name": "vgg_16d", "image_size": 16, "base_size": 16}, ValueError, "needs at least 32"),
        ({"name": 3}, TypeError, "name is 3"),
        ({"tasks": {}}, ValueError, "tasks is empty"),
        ({"tasks": ["a"]}, TypeError, "tasks is"),
        ({"tasks": {"a": 0}}, ValueError, r"tasks\['a'\] is 0"),
        ({"tasks": {"a": 2.5}}, TypeError, r"tasks\['a'\] is 2.5"),
        ({"tasks": {"a.b": 2}}, ValueError, "without dots"),
        ({"tasks": {"pop": 2}}, ValueError, "'pop'"),
        ({"tasks": {1: 2}}, TypeError, "strings"),
        ({"bn": "none"}, ValueError, "bn is 'none'.*'per_level', 'shared'"),
        ({"task_norm": "none"}, ValueError, "task_norm is 'none'"),
        ({"in_channels": 0}, ValueError, "in_channels is 0"),
        ({"base_size": 0}, ValueError, "base_size is 0"),
        ({"base_size": "big"}, TypeError, "base_size is 'big'"),
        ({"ratios": (0, 0.5)}, ValueError, "last ratio"),
        ({"selector": "large"}, ValueError, "selector is 'large'"),
        ({"selector": {"depth": 3}}, ValueError, "'depth'.*blocks_per_stage"),
        ({"selector": {"widths": (8, 4)}}, ValueError, "descend"),
        ({"selector": {"pool": 0}}, ValueError, "pool is 0"),
        ({"image_size": 84}, TypeError, "image_size; wrn_8_1 has no arguments"),
        ({"name": "simple_conv_net", "size": 84}, TypeError, "size; simple_conv_net takes image_size"),
        ({"name": "simple_conv_net", "ratios": (0, 0.5, 1)}, ValueError, "above 0 here.*residual"),
        ({"name": "simple_conv_net", "image_size": 8}, ValueError, "needs at least 16"),
        ({"name": "simple_conv_net_84", "image_size": 96}, ValueError, "image_size is 96"),
    ],
)
def test_create_model_names_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        den.create_model(**{"name": "wrn_8_1", "tasks": {"a": 2}, **change})


def test_blocks_name_what_is_wrong():
    with pytest.raises(ValueError, match="out_channels is 8, below in_channels 16"):
        ResidualBlock(16, 8, den.Hierarchy((0, 1)))
    with pytest.raises(ValueError, match=r"out_channels is 8, below in_channels 16.*projection=True"):
        BottleneckBlock(16, 8, 8, den.Hierarchy((0, 1)))
    assert BottleneckBlock(16, 8, 8, den.Hierarchy((0, 1)), projection=True).widths == (0, 8)
    with pytest.raises(ValueError, match=r"8 channels in 2 groups the widths \(4, 4, 8\)"):
        BottleneckBlock(8, 8, 8, den.Hierarchy((0.25, 0.5, 1)), groups=2)
    for make in (lambda h: ConvPairBlock(3, 8, 8, h), lambda h: LinearPairBlock(3, (1, 1), 8, 8, h)):
        with pytest.raises(ValueError, match="above 0 here"):
            make(den.Hierarchy((0, 1)))
    assert "widths=(0, 8)" in repr(ResidualBlock(8, 8, den.Hierarchy((0, 1))))

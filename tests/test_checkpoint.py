"""Models on disk."""

import json

import pytest
import torch
from den_cases import TWO_TASKS, conv_net, image_shape, resnext, wrn
from safetensors.torch import load_file, save_file
from torch import nn

import den
from den.checkpoint import load_meta


@pytest.fixture
def folder(tmp_path):
    den.save(wrn(TWO_TASKS), tmp_path / "model", meta={"classes": {"a": ["x", "y"]}})
    return tmp_path / "model"


@pytest.mark.parametrize("make", [wrn, resnext, conv_net])
def test_round_trip(make, tmp_path):
    model = make(TWO_TASKS, task_norm="per_task")
    den.save(model, tmp_path / "deep" / "model", meta={"mean": [0.5]})
    again = den.load(tmp_path / "deep" / "model", backend="grouped")
    assert again.config == model.config
    assert not again.training
    x = torch.randn(2, *image_shape(make))
    for task in TWO_TASKS:
        assert torch.equal(again(x, task).logits, model(x, task).logits)
    assert load_meta(tmp_path / "deep" / "model") == {"mean": [0.5]}


def test_only_two_files_are_left(folder):
    den.save(wrn(TWO_TASKS), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["version"] == 1


def test_a_failed_save_leaves_the_old_files(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("den.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        den.save(conv_net(), folder)
    with pytest.raises(TypeError, match="meta"):
        den.save(wrn(), folder, meta={"x": torch.zeros(1)})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_selector_of_the_callers_own(tmp_path):
    model = wrn(selector=nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.Unflatten(1, (3, 4))))
    den.save(model, tmp_path)
    with pytest.raises(ValueError, match="pass that module"):
        den.load(tmp_path)
    fresh = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.Unflatten(1, (3, 4)))
    again = den.load(tmp_path, selector=fresh, backend="grouped")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x).level_probs, model(x).level_probs)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_model(folder, **changes):
    change_config(folder, model={**json.loads((folder / "config.json").read_text())["model"], **changes})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def rename_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["stem"] = tensors.pop("estimator.stem.conv.weight")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "config.json").write_text('{"format": "den",'), "not valid JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "'format' must be 'den'"),
        (lambda f: change_config(f, format="other"), "'format' must be 'den'"),
        (lambda f: change_config(f, version=2), "version 2; this release of den reads 1 to 1"),
        (lambda f: change_config(f, model=None), "'model'"),
        (lambda f: change_config(f, model={}), "no model that can be built: .*name"),
        (lambda f: change_model(f, name="wrn_9_1"), r"no model that can be built: .*6n \+ 2"),
        (lambda f: change_model(f, surprise=1), "no model that can be built: .*surprise"),
        (truncate, "damaged or no safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04 not tensors"), "damaged or no safetensors"),
        (rename_tensor, "estimator.stem.conv.weight is missing; stem is not in the model"),
        (lambda f: change_model(f, name="wrn_14_1"), r"another model's tensors.*missing.*and \d+ more"),
        (lambda f: change_model(f, name="wrn_8_2"), r"is \(16, 16, 3, 3\) instead of \(32, 16, 3, 3\)"),
    ],
)
def test_load_names_what_is_wrong(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        den.load(folder)


def test_no_folder_and_unwanted_selector(folder, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        den.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="leave it out"):
        den.load(folder, selector=nn.Identity())
    with pytest.raises(TypeError, match="model is a FrozenDEN"):
        den.save(den.freeze(wrn()), tmp_path)

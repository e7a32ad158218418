"""The command line, run for real on tiny data in the published formats."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import den
from den.baselines import METHODS
from den.baselines import train as train_baseline
from den.cli import COMMANDS, INTERRUPTED, USAGE, main
from den.cli.common import DATA_SETS
from den.data import SOURCES
from den.results import read_evaluations
from den.tasks import load_task

ROOT = Path(__file__).parents[1]
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
QUICK = [
    *("--model", "wrn_8_1", "--selector", "light", "--stages", "1", "--batch-size", "8"),
    *("--estimator.first-epochs", "1", "--selector.epochs", "1", "--selector.lr", "1e-3"),
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory) -> Path:
    """A root with CIFAR-10 in its binary format, cut to 50 training and 20 test images."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n")
    rng = np.random.default_rng(0)
    for name, count in [*((f"data_batch_{i}.bin", 10) for i in range(1, 6)), ("test_batch.bin", 20)]:
        records = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(count) % 10
        records.tofile(folder / name)
    return root


@pytest.fixture(scope="session")
def run(cifar10, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", "cifar10", "--root", str(cifar10), "--out", str(folder), *QUICK]) == 0
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with image files of several kinds, one of them deeper."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deeper").mkdir()
    rng = np.random.default_rng(1)
    for name, shape in (("a.png", (32, 32, 3)), ("b.jpg", (40, 64, 3)), ("deeper/c.png", (32, 32))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def output(capsys, *arguments: object) -> str:
    """Standard output of a command that succeeds."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def failure(capsys, *arguments: object) -> str:
    """The one line that a command fails with."""
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert status == USAGE
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("den: ")
    assert all(line.startswith("den: warning: ") for line in lines[:-1])
    return lines[-1]


# Help


def test_every_data_set_is_named_in_the_help():
    assert set(DATA_SETS) == set(SOURCES)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_option_and_its_default(command, capsys):
    text = output(capsys, command, "--help")
    listed = text[text.index("-h, --help") :]
    entries = [part.split() for part in re.split(r"\n[ │]*--(?=[a-z])", listed)[1:]]
    assert len(entries) >= 5
    for entry in entries:
        assert "(default:" in entry, entry
        assert entry.index("(default:") > 2, entry  # words between the option and its default
    assert "--json" in text


def test_overview_lists_every_command(capsys):
    text = output(capsys, "--help")
    for command, (_, _, what) in COMMANDS.items():
        assert command in text
        assert what in text
    assert den.__version__ in output(capsys, "--version")


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys\nfrom den.cli import main\n"
        "for command in ['', 'train', 'eval', 'bench', 'predict']:\n"
        "    assert main([*command.split(), '--help']) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_functions_also_after_their_submodules_are_imported():
    code = "import den\nimport den.freeze, den.flops, den.dense\nassert callable(den.freeze)\n"
    code += "assert all(callable(getattr(den, name)) for name in den.__all__)\nassert set(den.__all__) <= set(dir(den))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Results


def test_train_writes_a_run_that_says_where_its_images_came_from(run, cifar10):
    assert {"config.json", "metrics.jsonl", "summary.json", "checkpoint"} <= {path.name for path in run.iterdir()}
    source = json.loads((run / "config.json").read_text())["source"]["tasks"]["cifar10"]
    assert source["dataset"] == "cifar10"
    assert source["root"] == str(cifar10)
    assert den.load(run / "checkpoint").tasks == {"cifar10": 10}


def test_train_on_two_tasks_prints_json_alone(capsys, cifar10, tmp_path):
    data = ["--data", f"cifar10:{cifar10}", "digits", "--subset", "40"]
    result = json.loads(output(capsys, "train", *data, "--out", tmp_path / "run", "--json", *QUICK))
    assert list(result["tasks"]) == ["cifar10", "digits"]
    assert list(result["tasks"]["digits"]) == ["selector", "shuffled", "random", "full"]
    assert result["tasks"]["digits"]["full"]["cost_mean"] == 1
    assert result == {
        "out": str(tmp_path / "run"),
        "tasks": json.loads((tmp_path / "run" / "summary.json").read_text()),
    }


@pytest.mark.filterwarnings("ignore:.* holds .* images; the published file holds")
def test_two_labels_of_an_image_train_as_two_tasks_on_one_path(capsys, cifar10, tmp_path):
    arguments = ("train", "--data", "cifar10", "--labels", "both", "--root", cifar10, "--out", tmp_path, *QUICK)
    result = json.loads(output(capsys, *arguments, "--subset", "20", "--json"))
    assert list(result["tasks"]) == ["coarse", "fine"]
    found = read_evaluations(tmp_path)
    assert torch.equal(found["coarse"]["selector"].level, found["fine"]["selector"].level)
    source = json.loads((tmp_path / "config.json").read_text())["source"]["tasks"]
    assert {name: options["labels"] for name, options in source.items()} == {"coarse": "coarse", "fine": "fine"}
    assert json.loads(output(capsys, "eval", tmp_path, "--task", "coarse", "--json"))["tasks"].keys() == {"coarse"}


def test_another_family_trains_and_is_read_back(capsys, cifar10, tmp_path):
    model = "resnext_11_2x8d"
    arguments = ("train", "--data", "cifar10", "--root", cifar10, "--out", tmp_path, *QUICK, "--subset", "16")
    output(capsys, *(model if argument == "wrn_8_1" else argument for argument in arguments), "--base-size", "8")
    loaded = den.load(tmp_path / "checkpoint")
    assert loaded.config["name"] == model
    assert json.loads(output(capsys, "eval", tmp_path, "--root", cifar10, "--json"))


def test_eval_agrees_with_the_summary_of_training(capsys, run):
    summary = json.loads((run / "summary.json").read_text())
    result = json.loads(output(capsys, "eval", run / "checkpoint", "--policy", *summary["cifar10"], "--json"))
    for policies in summary["cifar10"].values():
        del policies["own_cost_mean"]  # in the unit of training, which the checkpoint does not hold
    assert result["tasks"] == summary
    del summary["cifar10"]["shuffled"]
    assert json.loads(output(capsys, "eval", run, "--json"))["tasks"] == summary


def test_eval_of_given_paths(capsys, run):
    result = json.loads(output(capsys, "eval", run, "--policy", "3", "0-0-0", "full", "--json"))["tasks"]["cifar10"]
    assert result["3"] == result["full"]
    assert result["0-0-0"]["cost_mean"] == 0
    text = output(capsys, "eval", run, "--policy", "0-3-1")
    assert text.splitlines()[2].split()[:3] == ["cifar10", "0-3-1", "20"]


@pytest.fixture(scope="session")
def budget_run(cifar10, tmp_path_factory) -> Path:
    """A run whose selector is told its budget."""
    folder = tmp_path_factory.mktemp("runs") / "budget"
    arguments = ["train", "--data", "cifar10", "--root", str(cifar10), "--out", str(folder), *QUICK]
    assert main([*arguments, "--budget", "0.5"]) == 0
    return folder


def test_eval_and_predict_at_budgets(capsys, budget_run, pictures):
    own = json.loads(output(capsys, "eval", budget_run, "--json"))["tasks"]["cifar10"]["selector"]
    told = json.loads(output(capsys, "eval", budget_run, "--budget", 0.05, 0.5, 1, "--json"))["tasks"]["cifar10"]
    assert list(told) == ["selector at 0.05", "selector at 0.5", "selector at 1", "random", "full"]
    assert told["selector at 0.5"] == own, "the model's own budget"
    assert told["selector at 0.05"]["cost_mean"] < told["selector at 1"]["cost_mean"], "costs follow the budget"
    frozen = den.freeze(den.load(budget_run / "checkpoint"))
    lines = output(capsys, "predict", budget_run, pictures / "a.png", "--budget", 0.05, "--json").splitlines()
    preprocessing = json.loads((budget_run / "config.json").read_text())["preprocessing"]["cifar10"]
    x = den.tasks.preprocess([pictures / "a.png"], preprocessing)
    expected = frozen(x, budget=0.05).level[0].tolist()
    assert json.loads(lines[0])["path"] == "-".join(map(str, expected)), "path at the budget"


def test_bad_budgets(capsys, run, budget_run, pictures):
    assert "selector takes none; train one with --budget" in failure(capsys, "eval", run, "--budget", "0.5")
    assert "selector takes none" in failure(capsys, "predict", run, pictures, "--budget", "0.5")
    assert "budget is 1.5; it must be above 0" in failure(capsys, "eval", budget_run, "--budget", "1.5")
    assert "policy is full" in failure(capsys, "eval", budget_run, "--policy", "full", "--budget", "0.5")


def test_eval_of_another_folder_with_the_same_classes(capsys, run, tmp_path):
    rng = np.random.default_rng(2)
    for split in ("train", "test"):
        for name in NAMES:
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(tmp_path / split / name / "0.png")
    text = output(capsys, "eval", run, "--data", "folder", "--root", tmp_path, "--policy", "full", "--json")
    assert json.loads(text)["tasks"]["cifar10"]["full"]["images"] == 10


def test_predict_on_files_and_folders(capsys, run, pictures):
    lines = output(capsys, "predict", run, pictures, "--json", "--batch-size", "2").splitlines()
    results = [json.loads(line) for line in lines]
    assert [Path(r["file"]).name for r in results] == ["a.png", "b.jpg", "c.png"]
    model = den.load(run / "checkpoint")
    for result in results:
        levels = [int(level) for level in result["path"].split("-")]
        assert len(levels) == model.num_blocks
        assert result["class"] == NAMES[result["label"]]
        assert 0.1 <= result["probability"] <= 1
        assert 0 <= result["cost"] <= 1
        assert result["flops"] == int(den.flops(model, levels, 32))
    table = output(capsys, "predict", run / "checkpoint", pictures / "a.png", pictures / "deeper" / "c.png")
    assert table.splitlines()[0].split() == ["file", "class", "probability", "path", "cost"]
    assert results[0]["class"] in table
    assert results[2]["path"] in table


def test_bench_of_a_run_and_of_a_backbone(capsys, run):
    result = json.loads(output(capsys, "bench", run, "--batch", 1, 4, "--seconds", 0.01, "--json"))
    assert [(r["batch"], r["mix"]) for r in result["results"]] == [
        (batch, mix) for batch in (1, 4) for mix in ("selector", "uniform", "full")
    ]
    for r in result["results"]:
        assert min(r["dense_ms"], r["den_ms"], r["estimator_ms"]) > 0
        assert r["efficiency"] == pytest.approx(r["dense_ms"] / r["den_ms"] / (r["dense_flops"] / r["den_flops"]))
        assert r["den_flops"] > r["estimator_flops"]
    options = ["--batch", 2, "--mixes", "skip", "1", "--image-size", 16, "--seconds", 0.01]
    text = output(capsys, "bench", "wrn_8_1", *options)
    assert "wrn_8_1 at 16x16, float32, backend " in text
    assert [line.split()[1] for line in text.splitlines()[3:]] == ["skip", "1"]


# Errors

TRAIN_ERRORS = {
    "no data": ([], "--data is missing"),
    "unknown data set": (["--data", "cifar11"], "data set 'cifar11' is not known"),
    "no root": (["--data", "cifar10"], "cifar10 needs the folder that holds it"),
    "missing files": (["--data", "cifar10", "--root", "nowhere"], "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "data set twice": (["--data", "digits", "digits"], "twice"),
    "subset too large": (["--data", "digits", "--subset", "99999"], "subset is 99999"),
    "unknown model": (["--data", "digits", "--model", "wrm_8_1"], "no such backbone"),
    "ratios": (["--data", "digits", "--ratios", "0", "2"], "ratios is (0.0, 2.0)"),
    "config value": (["--data", "digits", "--rho", "-1"], "rho is -1.0; it must be at least 0"),
    "choice": (["--data", "digits", "--estimator.schedule", "linear"], "invalid choice 'linear'"),
    "selector without images": (["--data", "digits", "--selector.split", "val"], "val_fraction above 0"),
    "accelerator": (["--data", "digits", "--accelerator", "abacus"], "abacus"),
    "option": (["--data", "digits", "--learning-rate", "1"], "--learning-rate"),
    "type": (["--data", "digits", "--stages", "few"], "few"),
}


@pytest.mark.parametrize("name", TRAIN_ERRORS)
def test_bad_input_to_train(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = TRAIN_ERRORS[name]
    assert message in failure(capsys, "train", "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_train_asks_for_a_run_folder_and_keeps_one_that_is_there(capsys, run, cifar10):
    data = ["--data", "cifar10", "--root", cifar10, *QUICK]
    assert "--out is missing" in failure(capsys, "train", *data)
    before = (run / "config.json").read_bytes()
    capsys.readouterr()
    assert main([str(a) for a in ("train", *data, "--out", run, "--rho", 0.5)]) == USAGE
    assert "holds a run already" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before


def test_unknown_command(capsys):
    assert "'trian' is no command" in failure(capsys, "trian")
    assert main([]) == USAGE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "mnist"], "task 'mnist' is none of the model's; they are cifar10"),
        (["--policy", "greedy"], "policy is 'greedy'"),
        (["--policy", "0-1"], "2 levels; the model has 3 blocks"),
        (["--policy", "0-1-4"], "level 4; levels run from 0 to 3"),
        (["--split", "val"], "no val images"),
        (["--root", "nowhere"], "https://www.cs.toronto.edu/~kriz/cifar.html"),
        (["--data", "digits"], "digits has the classes 10 (0, 1, 2, 3, ...)"),
        (["--device", "abacus"], "abacus"),
        (["--batch-size", "0"], "batch-size is 0"),
        (["--backend", "fortran"], "invalid choice 'fortran'"),
    ],
)
def test_bad_input_to_eval(options, message, capsys, run):
    assert message in failure(capsys, "eval", run, *options)


def test_bad_checkpoints(capsys, run, pictures, tmp_path):
    assert "is missing" in failure(capsys, "eval", tmp_path / "nowhere")
    assert "config.json is missing" in failure(capsys, "eval", tmp_path)
    cut = tmp_path / "cut"
    shutil.copytree(run / "checkpoint", cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in failure(capsys, "predict", cut, pictures)
    (cut / "config.json").write_text("{")
    assert "is not valid JSON" in failure(capsys, "bench", cut)
    bare = tmp_path / "bare"
    den.save(den.load(run / "checkpoint"), bare)
    assert "does not say how images of 'cifar10' are prepared" in failure(capsys, "predict", bare, pictures)
    assert "does not say where images of 'cifar10' are" in failure(capsys, "eval", bare)


@pytest.mark.filterwarnings("ignore:.*the published file holds")
def test_a_run_without_a_trained_selector(capsys, cifar10, pictures, tmp_path):
    """A competitor's model is a DEN, but its selector is as it was initialised: nothing is said by it."""
    options = {"dataset": "cifar10", "root": str(cifar10)}
    task = load_task(**options)
    config = METHODS["slim"].Config(batch_size=8, epochs=1, out=tmp_path / "slim", progress=False)
    source = {"tasks": {task.name: options}}
    train_baseline("slim", "wrn_8_1", [task], config, source=source)
    for command in (["eval", tmp_path / "slim"], ["predict", tmp_path / "slim", pictures]):
        assert "is a run of slim, which trains no selector" in failure(capsys, *command)
    message = failure(capsys, "bench", tmp_path / "slim", "--mixes", "selector")
    assert "is a run of slim, which trains no selector; give --mixes uniform or full" in message
    own = read_evaluations(tmp_path / "slim")["cifar10"]["fixed"]
    path = "-".join(str(level) for level in own.level[0].tolist())
    result = json.loads(output(capsys, "eval", tmp_path / "slim", "--policy", path, "--json"))["tasks"]["cifar10"]
    assert result[path]["accuracy"] == pytest.approx(own.accuracy)


def test_bad_images(capsys, run, pictures, tmp_path):
    assert "nothere.png is missing" in failure(capsys, "predict", run, tmp_path / "nothere.png")
    assert "holds no images" in failure(capsys, "predict", run, tmp_path)
    assert "notes.txt (12 bytes) is not a readable image" in failure(capsys, "predict", run, pictures / "notes.txt")
    (tmp_path / "cut.png").write_bytes((pictures / "a.png").read_bytes()[:500])
    assert "cut.png (500 bytes) is not a readable image" in failure(capsys, "predict", run, tmp_path)
    assert "no image is given" in failure(capsys, "predict", run)
    assert "task is 'mnist'" in failure(capsys, "predict", run, pictures, "--task", "mnist")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["wrm_8_1"], "no such backbone"),
        (["runs/nowhere"], "runs/nowhere is missing"),
        (["wrn_8_1", "--batch", "0"], "batch is 0"),
        (["wrn_8_1", "--mixes", "sorted"], "mix is 'sorted'"),
        (["wrn_8_1", "--image-size", "0"], "image-size is 0"),
    ],
)
def test_bad_input_to_bench(options, message, capsys):
    assert message in failure(capsys, "bench", *options)


# As a process


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "den", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_exit_status_of_the_process(tmp_path):
    process = start("eval", tmp_path / "nowhere")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (USAGE, "")
    assert err.count("\n") == 1
    assert err.startswith("den: ")


def test_an_interrupted_run_is_resumed_with_the_options_that_it_began_with(capsys, cifar10, tmp_path):
    folder = tmp_path / "run"
    train = ["train", "--data", "cifar10", "--root", cifar10, "--out", folder]
    process = start(*train, *QUICK, "--estimator.first-epochs", 5000, "--rho", 0.3)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, err
    assert err.splitlines()[-1] == "den: interrupted"
    done = json.loads((folder / "checkpoint" / "trainer.json").read_text())["position"]["epoch"]
    assert 1 <= done < 5000

    text = output(capsys, "train", "--out", folder, "--resume", "--estimator.first-epochs", done + 1, "--json")
    assert list(json.loads(text)["tasks"]) == ["cifar10"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [*range(done + 1), 0]
    assert json.loads((folder / "config.json").read_text())["train"]["rho"] == 0.3

"""The GPU run's own logic: a dry run through the interpreter, resuming, and what the tables say of a results file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_validate
from benchmarks.gpu import checks, results, table
from benchmarks.table import SELECTOR, Row, Time
from den_kernels.backends.triton import tile_tables

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("triton")

# What a machine that only has PyTorch, Triton, NumPy and pytest lacks.
ABSENT = (
    "hypothesis", "lightning", "lightning_fabric", "matplotlib", "mlxtend", "onnx", "onnxruntime", "openvino", "PIL",
    "pytest_benchmark", "safetensors", "sklearn", "timm", "torchmetrics", "torchvision", "tqdm", "tyro",
)  # fmt: skip


def validate(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu_validate", "--out", str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )  # fmt: skip


@pytest.mark.slow
def test_a_dry_run_from_end_to_end(tmp_path):
    done = validate(tmp_path, "--dry-run", "--seconds", "1200")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = results.read(tmp_path / "results.json")
    assert content["status"] == dict.fromkeys(gpu_validate.STAGES, "done")
    assert done.stdout.count("DRY RUN in the interpreter") == 1
    stages = content["stages"]
    assert stages["checks"]["cases"]
    assert set(stages["checks"]["cases"].values()) == {"passed"}
    assert "left_out" in stages["checks"]["sanitizer memcheck"]
    assert all(rate > 0 for rate in stages["ceilings"].values())
    (finding,), (peers,) = stages["matrix"].values(), stages["peers"].values()
    assert {"den[triton]", "den[triton]" + SELECTOR} < set(finding["cold"]["times"])
    assert {"den[triton]", "masked dense", "den[grouped]", "static slim 0.5"} < set(peers["cold"]["times"])
    assert not {**finding["wrong"], **peers["wrong"], **peers["left_out"]}
    (row,) = table.rows(content)
    assert all(time.ms > 0 for time in row.times.values())
    (finding,) = stages["compiled"].values()
    assert finding["left_out"] == {"compiled": "no compiler in a dry run"}
    assert finding["wrong"] == {}
    (layer,) = stages["layers"].values()
    assert [launch["kernel"] for launch in layer["launches"]] == ["hidden_kernel", "last_kernel"]
    assert layer["tflops"] > 0 < layer["gbps"]
    (step,) = stages["training"].values()
    assert step["as it runs"]["ms"] > 0
    tiles = tile_tables.read(tmp_path / stages["tuning"]["table"])
    assert len(tiles["entries"]) == stages["tuning"]["entries"] == 2

    again = validate(tmp_path, "--dry-run", "--stages", "matrix", "layers")
    assert again.returncode == 0
    assert results.read(tmp_path / "results.json") == content


def test_what_is_cut_goes_on_and_what_fails_is_told(tmp_path, monkeypatch, capsys):
    seen = []

    def stage(context) -> bool:
        for key in ("a", "b"):
            if key not in context.results.stage("layers"):
                if context.out_of_time():
                    return False
                seen.append(key)
                context.results.put("layers", key, {"wrong": 1.0} if key == "b" else {})
                context.deadline -= 1000
        return True

    from benchmarks.gpu import layers

    monkeypatch.setattr(layers, "run", stage)
    enabled = torch.is_grad_enabled()
    for status, found in (("cut", ["a"]), ("done", ["a", "b"]), ("done", ["a", "b"])):
        assert gpu_validate.run_stage("layers", tmp_path, 100, dry=True) == 0
        assert results.read(tmp_path / "results.json")["status"]["layers"] == status
        assert seen == found
    assert gpu_validate.report(tmp_path) == 1
    assert "WRONG: layers, b: wrong result: 1.0" in capsys.readouterr().out

    def broken(context) -> bool:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu_validate.importlib.import_module("benchmarks.gpu.training"), "run", broken)
    assert gpu_validate.run_stage("training", tmp_path, 100, dry=True) == 1
    assert "illegal memory access" in results.read(tmp_path / "results.json")["status"]["training"]
    torch.set_grad_enabled(enabled)


def test_results_of_another_device_are_not_mixed(tmp_path):
    facts = {"device": "NVIDIA H200", "dry_run": False, "torch": "2.11", "triton": "3.6", "commit": "a", "date": "x"}
    results.Results(tmp_path, facts).put("ceilings", "copy", 4000.0)
    assert not list(tmp_path.glob("*.part"))
    later = results.Results(tmp_path, {**facts, "commit": "b", "date": "y"})
    assert later.stage("ceilings") == {"copy": 4000.0}
    assert later.content["conditions"]["commit"] == "a, b"
    for fact, value in (("device", "NVIDIA L4"), ("dry_run", True), ("torch", "2.12")):
        with pytest.raises(ValueError, match=f"holds results of {fact}"):
            results.Results(tmp_path, {**facts, fact: value})
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is no results.json"):
        results.Results(tmp_path, facts)


def _row(dense: dict[str, float], mix: str = "paper") -> dict:
    ms = {"den[triton]": 1.0, "den[triton]" + SELECTOR: 1.25, **dense}
    times = {name: Time(value, value, value, 3) for name, value in ms.items()}
    row = Row("network, cold L2", "wrn_32_4@32", "den[triton]", "bfloat16", 256, mix, 2.0, times, list(dense))
    return row.asdict()


def _content(**stages) -> dict:
    facts = {
        "device": "NVIDIA H200", "dry_run": False, "torch": "2.11", "triton": "3.6", "date": "2027-01-01",
        "multiprocessors": 132, "driver": "1", "cuda": "12.8", "cudnn": 9,
    }  # fmt: skip
    return {"conditions": facts, "status": {}, "stages": stages}


def test_the_table_is_against_the_fastest_dense_engine():
    content = _content(
        compiled={"k": {"cold": _row({"dense, eager in a graph": 2.5, "torch.compile max-autotune": 2.0})}},
        matrix={"k": {"cold": _row({"dense, eager in a graph": 2.5})}, "l": {"left_out": {}}},
        training={"wrn, batch 256": {"flop_ratio": 2.0, "as it runs": {"ms": 2.0, "dense_ms": 3.0, "speedup": 1.5}}},
    )
    text = table.markdown(content)
    assert "| 256 | paper | 1/2.00 | torch.compile max-autotune | 2.00 |" in text
    assert "| 1.25 | 1.60x | 0.80 |" in text  # the selector included
    assert "| wrn, batch 256 | as it runs | 1/2.00 | 3.00 | 2.00 | 1.50x |" in text
    assert text.startswith("NVIDIA H200 (132 multiprocessors")
    assert "wrn_32_4@32" in table.text(content)


def test_what_was_not_measured_is_not_told(tmp_path, capsys, monkeypatch):
    assert table.markdown(_content()).endswith(table.NOT_YET)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    table.main([])
    assert capsys.readouterr().out == f"{table.NOT_YET}\n"
    assert results.home(_content()) == tmp_path / "nvidia-h200" / "results.json"


def test_committed_results_are_of_their_device():
    for folder, path in results.measured().items():
        content = results.read(path)
        assert folder == tile_tables.slug(content["conditions"]["device"])
        assert not content["conditions"]["dry_run"]


def test_a_failed_case_is_wrong_and_a_skipped_one_is_not(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.cases" name="test_a[1]"/>'
        '<testcase classname="tests.cases" name="test_b"><failure message="off by 2">trace</failure></testcase>'
        '<testcase classname="tests.cases" name="test_c"><skipped message="no GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    outcomes = checks._outcomes(report)
    assert outcomes == {
        "tests/cases.py::test_a[1]": "passed",
        "tests/cases.py::test_b": "failed: off by 2",
        "tests/cases.py::test_c": "skipped: no GPU",
    }
    assert table.wrong(_content(checks={"cases": outcomes})) == ["tests/cases.py::test_b: failed: off by 2"]
    bad = {"sanitizer memcheck": {"status": 9, "tail": "1 error"}, "sanitizer racecheck": {"left_out": "no"}}
    assert table.wrong(_content(checks=bad)) == ["sanitizer memcheck: status 9: 1 error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    assert gpu_validate.main(["--out", str(tmp_path)]) == 1
    assert "--dry-run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_it_needs_no_more_than_a_gpu_machine_has():
    modules = ["benchmarks.gpu_validate", "den_kernels.tune"]
    modules += [f"benchmarks.gpu.{path.stem}" for path in (ROOT / "benchmarks" / "gpu").glob("[a-z]*.py")]
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); import " + ", ".join(modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

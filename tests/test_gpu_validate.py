"""The GPU run's own logic: a dry run through the interpreter, resuming, and what the tables say of a results file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_validate
from benchmarks.gpu import checks, context, processes, results, table
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
    no_gpu = {"cudnn_fused": "cuDNN is for NVIDIA GPUs alone"}
    assert finding["left_out"] == peers["left_out"] == no_gpu
    assert not {**finding["wrong"], **peers["wrong"], **finding["notes"]}
    (row,) = table.rows(content)
    assert all(time.ms > 0 for time in row.times.values())
    (finding,) = stages["compiled"].values()
    assert finding["left_out"] == {**no_gpu, "compiled": "no compiler in a dry run"}
    assert finding["wrong"] == {}
    (layer,) = stages["layers"].values()
    assert [launch["kernel"] for launch in layer["launches"]] == ["hidden_kernel", "last_kernel"]
    assert layer["tflops"] > 0 < layer["gbps"]
    (step,) = stages["training"].values()
    assert step["as it runs"]["ms"] > 0
    tiles = tile_tables.read(tmp_path / stages["tuning"]["table"])
    assert len(tiles["entries"]) == stages["tuning"]["entries"] == 2
    (searched,) = (finding for finding in stages["tuning"].values() if isinstance(finding, dict))
    assert set(searched) == set(tiles["entries"])

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


def cpu_context(folder: Path, dry: bool = True) -> context.Context:
    """Of a run on the CPU that has 100 seconds."""
    cpu = torch.device("cpu")
    return context.Context(cpu, dry, results.Results(folder, results.conditions(cpu, dry)), time.monotonic() + 100)


def test_a_case_that_fails_costs_the_others_nothing(tmp_path):
    def fails() -> dict:
        raise ValueError("out of resource: shared memory")

    def out_of_memory() -> dict:
        raise torch.cuda.OutOfMemoryError

    ran = []
    work = {
        "bad": fails,
        "large": out_of_memory,
        "good": lambda: ran.append("good") or {"error": 0.0},
        "late": lambda: None,
        "last": lambda: ran.append("last") or {},
    }
    told = cpu_context(tmp_path)
    assert not told.each("layers", work, lambda key: 0.0)
    found = {
        "bad": {"failed": "ValueError('out of resource: shared memory')"},
        "large": {"left_out": "out of memory"},
        "good": {"error": 0.0},
    }
    assert results.read(tmp_path / "results.json")["stages"]["layers"] == found
    work["late"] = dict
    again = cpu_context(tmp_path)
    assert again.each("layers", work, lambda key: 0.0)
    assert ran == ["good", "last"]
    assert table.failed(again.results.content) == ["layers, bad: ValueError('out of resource: shared memory')"]
    assert "FAILED: layers, bad: ValueError" in table.text(again.results.content)
    assert gpu_validate.report(tmp_path) == 1
    assert again.each("layers", {"new": dict}, lambda key: 200.0) is False


def test_a_case_that_ends_its_process_is_tried_once_more_behind_the_others(tmp_path):
    ran = []

    def ends() -> dict:
        ran.append("ends")
        raise KeyboardInterrupt

    work = {"ends": ends, "other": lambda: ran.append("other") or {}}
    with pytest.raises(KeyboardInterrupt):
        cpu_context(tmp_path).each("layers", work, lambda key: 0.0)
    assert results.read(tmp_path / "results.json")["stages"]["layers"] == {"ends": context.ENDED}
    with pytest.raises(KeyboardInterrupt):
        cpu_context(tmp_path).each("layers", work, lambda key: 0.0)
    assert cpu_context(tmp_path).each("layers", work, lambda key: 0.0)
    assert ran == ["ends", "other", "ends"]
    assert results.read(tmp_path / "results.json")["stages"]["layers"]["ends"] == context.ENDED_AGAIN


def test_a_lost_gpu_ends_the_process_and_the_next_goes_on(tmp_path, monkeypatch):
    def illegal() -> dict:
        monkeypatch.setattr(context.Context, "synchronize", lost)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    work = {"illegal": illegal, "other": dict}
    with pytest.raises(RuntimeError, match="CUDA error"):
        cpu_context(tmp_path).each("layers", work, lambda key: 0.0)
    monkeypatch.undo()
    following = cpu_context(tmp_path)
    assert set(following.results.stage("layers")) == {"illegal"}
    assert following.each("layers", work, lambda key: 0.0)
    assert "illegal memory access" in following.results.stage("layers")["illegal"]["failed"]


@pytest.mark.parametrize(("statuses", "starts"), [([0], 1), ([None], 1), ([1, 1, 1], 2), ([-11, 0], 2)])
def test_a_stage_that_fails_is_started_once_more(tmp_path, monkeypatch, statuses, starts):
    budgets, left = [], iter(statuses)
    monkeypatch.setattr(gpu_validate, "start_process", lambda *told: budgets.append(told[2]) or next(left))
    gpu_validate.run_process("layers", tmp_path, 100.0, True)
    assert len(budgets) == starts
    assert budgets == sorted(budgets, reverse=True)
    left = iter([1])
    gpu_validate.run_process("layers", tmp_path, gpu_validate.LEAST_S, True)
    assert len(budgets) == starts + 1


# A process that starts another in a session of its own, tells of it, and hangs as that does.
HANGS = """
import subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
open({path!r}, "w").write(str(other.pid))
time.sleep(100)
"""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _assert_ended(path: Path) -> None:
    pid = int(path.read_text())
    for _ in range(100):
        if not _runs(pid):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} runs on")


def test_what_a_hanging_process_started_ends_with_it(tmp_path):
    path = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", HANGS.format(path=str(path))], 3.0)
    _assert_ended(path)
    done = processes.run([sys.executable, "-c", "print(1); exit(3)"], 60.0, text=True, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (3, "1\n")


def test_what_a_hanging_stage_started_ends_with_it(tmp_path, monkeypatch, capsys):
    path, program = tmp_path / "pid", tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{HANGS.format(path=str(path))}")
    program.chmod(0o755)
    monkeypatch.setattr(gpu_validate.sys, "executable", str(program))
    monkeypatch.setattr(gpu_validate, "GRACE_S", 2.0)
    assert gpu_validate.start_process("checks", tmp_path, 1.0, True) is None
    assert "checks: ended" in capsys.readouterr().out
    _assert_ended(path)


def test_a_sanitizer_that_refuses_the_device_is_left_out(tmp_path, monkeypatch):
    """In a GPU's place, a program with compute-sanitizer's words and status."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        "#!/bin/sh\necho '========= Error: Device not supported. Please refer to the docs.' >&2\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    told = cpu_context(tmp_path)
    told.device = torch.device("cuda")
    assert checks._sanitize("memcheck", told) == {"left_out": "compute-sanitizer: device not supported"}
    program.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 1 error'\nexit 9\n")
    assert checks._sanitize("memcheck", told)["status"] == 9


def test_the_sanitizers_cases_exist():
    assert {f"tests/triton_{name}" for name in checks.SMALL} <= set(checks._collect())


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

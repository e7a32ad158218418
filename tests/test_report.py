"""Pictures and tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from den import report
from tests.report_cases import check_written

ROOT = Path(__file__).parents[1]
RATIOS = (0, 0.25, 0.5, 1)
ROWS = [
    {
        "task": "digits",
        "dense_accuracy": 98.06,
        "random_accuracy": 93.1,
        "accuracy": 97.9,
        "cost": 0.52,
        "dense_flops": 4.1e6,
        "flops": 2.2e6,
        "ms": {1: (1.2, 0.6), 64: (0.21, 0.42)},
    },
    {
        "task": "mnist",
        "dense_accuracy": 97.0,
        "random_accuracy": 91.0,
        "accuracy": 96.9,
        "cost": 0.55,
        "dense_flops": 54.1e6,
        "flops": 29.2e6,
        "ms": {1: (2.9, 2.0), 64: (1.31, 0.72)},
    },
]


def point(accuracy: float, flops: float) -> dict[str, float]:
    return {"accuracy": accuracy, "flops_mean": flops}


SUMMARY = {
    "digits": {
        "dense": point(98.1, 4.1e6),
        "full": point(98.0, 4.1e6),
        "random": point(93, 1.9e6),
        "selector": point(97.8, 2.2e6),
        "shuffled": point(97.1, 2.2e6),
        "level 1": point(88, 1.2e6),
        "level 0": point(12, 0.2e6),
    }
}


def test_accuracy_against_flops(tmp_path):
    paths = report.accuracy_against_flops(SUMMARY, tmp_path / "deeper" / "a.png", conditions="wrn_8_1, seed 0")
    assert [path.name for path in paths] == ["a.png", "a.svg"]
    texts = ("digits", "wrn_8_1, seed 0", "level 1", "below the picture: level 0: 12.0%", "million FLOPs an image")
    check_written(paths, *texts, *(label for label, *_ in report.POLICIES.values()))


def test_selector_flops_are_added_and_said(tmp_path):
    paths = report.accuracy_against_flops(SUMMARY, tmp_path / "a", selector_flops={"digits": 1e6})
    check_written(paths, "million FLOPs an image, selector included")


def test_level_usage(tmp_path):
    usage = {task: [[0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1], [1, 0, 0, 0]] for task in ("digits", "mnist")}
    paths = report.level_usage(usage, RATIOS, tmp_path / "u", conditions="selector, test images")
    check_written(paths, "level 0: block left out", "level 1: 25% of channels", "level 3: all channels", "mnist")


def test_latency_bars_say_faster_and_slower(tmp_path):
    check_written(report.latency_bars(ROWS, tmp_path / "l"), "2.00x faster", "2.00x slower", "batch 64", "digits")


def test_sample_paths(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    common = {"path": [0, 3, 1], "cost": 0.42, "label": "ship"}
    samples = [
        {"image": image, "prediction": "ship", "task": "digits", **common},
        {"image": image[..., None].repeat(3, 2) / 255, "prediction": "truck", **common},
    ]
    paths = report.sample_paths(samples, RATIOS, tmp_path / "s", conditions="a long line of conditions, " * 6)
    check_written(paths, "digits: ship", "truck (truth: ship)", "cost 0.42", "level 0: block left out")


def test_the_same_picture_is_the_same_file(tmp_path):
    first, second = (report.latency_bars(ROWS, tmp_path / name) for name in "ab")
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_table_in_text_and_markdown():
    lines = report.table(ROWS).splitlines()
    assert len(lines) == 4
    assert "98.06" in lines[2]
    assert "0.600 (2.00x)" in lines[2]
    assert len({line.index("DEN %") + 5 for line in lines[:1]} | {lines[2].index("97.90") + 5}) == 1  # right-aligned
    rows = report.table(ROWS, markdown=True).splitlines()
    assert {row.count("|") for row in rows} == {len(rows[0].split("|")) - 1}
    assert set(rows[1]) <= set("|-: ")


def test_missing_matplotlib_is_told_with_the_extra():
    code = (
        "import sys\nsys.modules['matplotlib'] = None\nfrom den import report\n"
        "try:\n    report.latency_bars([{'task': 't', 'ms': {1: (1, 1)}}], 'x')\n"
        "except RuntimeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install 'den-kernels[report]'" in done.stdout


@pytest.mark.parametrize("markdown", [False, True])
def test_table_without_rows(markdown):
    assert len(report.table([], markdown=markdown).splitlines()) == 2

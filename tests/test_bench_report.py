"""The benchmarks' tables and plot: figures by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
from torch import nn

from benchmarks import memory, report, table
from benchmarks.table import Row, Time

CONDITIONS = {
    "cpu": "A processor",
    "cores": 2,
    "threads": 2,
    "clock": "wall",
    "torch": "2.13.0",
    "onnxruntime": "1.32.0",
    "openvino": "not installed",
    "cpu_kernels": "avx512",
    "date": "2026-11-25",
}


def row(mix: str = "level2", ratio: float = 2.0, batch: int = 8, **ms: float) -> Row:
    named = {"den": "den[cpu]", "selector": "den[cpu]+selector", "eager": "torch eager", "ov": "OpenVINO"}
    times = {named.get(key, key): Time(value, value * 0.9, value * 1.1, 5) for key, value in ms.items()}
    dense = [name for name in times if name in ("torch eager", "OpenVINO")]
    return Row("network", "wrn_32_4@32", "den[cpu]", "float32", batch, mix, ratio, times, dense, 0.25)


FULL = {"den": 50, "selector": 55, "eager": 120, "ov": 100, "masked dense": 130}


def test_time_is_median_and_quartiles() -> None:
    assert Time.of([0.003, 0.001, 0.002, 0.005, 0.004]) == Time(3, 2, 4, 5)
    assert Time.of([0.25]) == Time(250, 250, 250, 1)


def test_speedup_is_over_the_fastest_dense_engine() -> None:
    found = row(**FULL)
    assert found.dense_engine == "OpenVINO"
    assert found.dense_ms == 100
    assert found.speedup(found.den_ms) == 2
    assert found.efficiency(found.den_ms) == 1
    assert found.headline_ms == 55
    derived = found.asdict()
    assert derived["speedup"] == pytest.approx(100 / 55)
    assert derived["efficiency"] == pytest.approx(50 / 55)
    assert derived["speedup_without_selector"] == 2
    assert derived["selector_included"] is True


def test_without_a_selector_the_headline_is_the_den() -> None:
    found = row(den=40, eager=100)
    assert found.selector_ms is None
    assert found.headline_ms == 40
    assert found.asdict()["selector_included"] is False


def test_no_efficiency_where_nearly_nothing_runs() -> None:
    found = row("skip", ratio=900, den=2, ov=100)
    assert found.speedup(found.den_ms) == 50
    assert found.efficiency(found.den_ms) is None
    assert table.flops_cell(found) == "~0"
    assert table.flops_cell(row(ratio=2, den=1, ov=1)) == "1/2.00"


def test_json_comes_back(tmp_path) -> None:
    rows = [row(**FULL), row("full", 1.0, den=100, ov=98.5)]
    path = tmp_path / "new" / "r.json"
    table.write_json(rows, CONDITIONS, path)
    assert table.read_json(path) == (rows, CONDITIONS)
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]
    assert json.loads(path.read_text())["rows"][0]["times"]["OpenVINO"] == {
        "ms": 100,
        "low_ms": 90,
        "high_ms": pytest.approx(110),
        "runs": 5,
    }


@pytest.mark.parametrize("text", ["[]", "{", '{"conditions": {}, "rows": [{"group": "network"}]}'])
def test_another_file_is_refused(text: str, tmp_path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.json is no table of `make bench`"):
        table.read_json(path)


def test_text_names_conditions_and_every_engine() -> None:
    lines = table.as_text([row(**FULL)], CONDITIONS)
    assert "A processor, 2 of 2 cores, 2026-11-25" in lines[0]
    assert "Others took 25% of the machine during the median row, 25% during the worst." in lines
    head, values = (" ".join(line.split()) for line in lines[-2:])
    assert head.endswith("torch eager ms OpenVINO ms masked dense ms")
    figures = "OpenVINO 100 50.00 2.00x 1.00 55.00 1.82x 0.91 120 100 130"
    assert values == f"wrn_32_4@32 den[cpu] float32 8 level2 1/2.00 {figures}"


def test_markdown_has_both_tables_for_each_form() -> None:
    direct = Row(
        "network",
        "wrn_32_4@32",
        "den[cpu, direct]",
        "float32",
        1,
        "full",
        1.0,
        {"den[cpu, direct]": Time(4, 4, 4, 5), "OpenVINO": Time(5, 5, 5, 5)},
        ["OpenVINO"],
    )
    text = table.as_markdown([row(**FULL), direct], CONDITIONS)
    assert "## wrn_32_4@32, float32, den[cpu]\n" in text
    assert "| 8 | level2 | 1/2.00 | OpenVINO | 100 | 50.00 | 2.00x | 1.00 | 55.00 | 1.82x | 0.91 |" in text
    assert "| batch | levels | den[cpu] | den[cpu]+selector | torch eager | OpenVINO | masked dense |" in text
    assert "## wrn_32_4@32, float32, den[cpu, direct]\n" in text
    assert "| 1 | full | 1/1.00 | OpenVINO | 5.00 | 4.00 | 1.25x | 1.25 |" in text


def test_skip_is_told_as_a_share_of_dense_time() -> None:
    lines = table.skip_shares([row(**FULL), row("skip", 900, den=2, selector=12, ov=100)])
    assert lines == [
        "wrn_32_4@32, float32, den[cpu], batch 8: every block skipped takes 2.0% of dense time, 12.0% with the selector"
    ]


def test_report_writes_table_and_plots(tmp_path, capsys) -> None:
    rows = [
        row("full", 1.0, 1, **FULL),
        row("level1", 4.0, 1, den=30, selector=40, ov=100),
        row("full", 1.0, 64, den=100, selector=105, ov=100),
        row("skip", 900, 64, den=2, selector=12, ov=100),
    ]
    path, out = tmp_path / "r.json", tmp_path / "out"
    table.write_json(rows, CONDITIONS, path)
    report.main([str(path), "--out", str(out)])
    assert "den[cpu]" in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == ["efficiency.md", "wrn_32_4-32.png", "wrn_32_4-32.svg"]
    assert "every block skipped takes 2.0%" in (out / "efficiency.md").read_text()


def test_plot_puts_each_row_at_its_ratio_and_speedup() -> None:
    rows = [
        row("full", 1.0, 1, **FULL),
        row("level1", 4.0, 1, den=25, selector=40, ov=100),
        row("skip", 900, 1, den=2, selector=12, ov=100),
    ]
    figure = report.plot(rows, CONDITIONS)
    (axis,) = figure.axes
    marks = [line for line in axis.lines if line.get_marker() not in ("", "None")]
    points = {(line.get_xdata()[0], round(line.get_ydata()[0], 3), line.get_markerfacecolor()) for line in marks}
    filled = report.COLOURS[1]
    assert points == {(1, 1.818, filled), (1, 2, "white"), (4, 2.5, filled), (4, 4, "white")}
    series = [line.get_xydata().tolist() for line in axis.lines if len(line.get_xdata()) == 2]
    diagonal = next(line for line in series if line[0][0] == line[0][1])
    assert all(x == y for x, y in diagonal)
    caption = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "A processor, 2 of 2 cores" in caption
    assert "Every block skipped, share of dense time, selector included: float32 den[cpu] 12% at batch 1." in caption


def test_held_bytes_count_a_shared_weight_once() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    assert memory.held_bytes(nn.Sequential(first, second)) == 2 * 4 * (6 + 2)
    second.weight = first.weight
    assert memory.held_bytes(nn.Sequential(first, second, nn.BatchNorm1d(5))) == 4 * (6 + 2 + 2) + 4 * 4 * 5 + 8


def test_threads_that_shared_a_core_are_told() -> None:
    rows = [dataclasses.replace(row(**FULL), thread_speedup=speedup) for speedup in (1.9, 1.1, 1.5)]
    told = "2 threads multiplied matrices 1.50x as fast as one beside the median row, 1.10x beside the worst"
    assert any(told in line for line in table.headline(rows, CONDITIONS))
    assert not any("multiplied" in line for line in table.headline([row(**FULL)], CONDITIONS))


def test_a_table_from_before_thread_speedups_can_be_read() -> None:
    values = row(**FULL).asdict()
    del values["thread_speedup"]
    assert table.row_of(values) == row(**FULL)
    del values["times"]
    with pytest.raises(KeyError):
        table.row_of(values)

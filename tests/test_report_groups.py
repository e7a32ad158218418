"""Runs put together: seeds, methods, studies; tables of them, beside the paper's."""

from __future__ import annotations

from pathlib import Path

import pytest

from den import paper
from den.report import sheets
from den.report.groups import studies
from tests.report_cases import write_run

C1 = {"scenario": "c1", "scale": "paper"}
RESNEXT = {"tasks": ("cifar10",), "model": "resnext_29_4x64d", "about": C1}


def cells(sheet: sheets.Sheet, label: str, column: int = 0) -> dict[str, str]:
    """A row of a table by its header, the last of equal names winning; found by the text in a column."""
    (row,) = [row for row in sheet.rows if row[column] == label]
    return dict(zip(sheet.header, row, strict=True))


def test_seeds_are_one_method_and_settings_tell_methods_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"a{seed}", seed=seed, right=28 + seed, train={"rho": 1.0}) for seed in (2, 0, 1)]
    runs.append(write_run(tmp_path / "b", train={"rho": 0.1}))
    runs.append(write_run(tmp_path / "c", train={"rho": 0.1}, levels=3))
    runs.append(write_run(tmp_path / "slim", method="slim", policy="fixed", train={"share": 0.5}))
    runs.append(write_run(tmp_path / "other", tasks=("mnist",)))
    first, other = studies(runs)
    assert (first.tasks, other.tasks) == (("digits",), ("mnist",))
    labels = {group.label: [run.about["seed"] for run in group.runs] for group in first.groups}
    assert labels == {
        "DEN (rho = 1)": [0, 1, 2],
        "DEN (rho = 0.1, ratios 0-0.333333-0.666667-1)": [0],
        "DEN (rho = 0.1, ratios 0-0.5-1)": [0],
        "static slim network (share 0.5)": [0],
    }
    own = first.groups[0].own
    spread = own.spread("digits", "accuracy")
    assert (spread.mean, spread.std, spread.seeds) == (pytest.approx(72.5), pytest.approx(2.5), 3)
    assert own.flops(None, selector=True).mean == 520_000
    assert [entry.label for entry in first.groups[0].entries()][1:] == [
        "DEN (rho = 1), random levels",
        "DEN (rho = 1), full path",
    ]


def test_results_hold_both_conventions_and_the_share_of_the_full_network(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(s), seed=s, right=28 + s, tasks=("a", "b"), train={"rho": 1.0}) for s in (0, 2)]
    (study,) = studies(runs)
    row = cells(sheets.results(study), "DEN (rho = 1)")
    assert row["a"] == row["mean"] == "72.50 ± 3.54"
    assert (row["2 x MACs"], row["MACs"], row["selector, 2 x"]) == ("0.50 ± 0.00", "0.25 ± 0.00", "0.02 ± 0.00")
    assert (row["without"], row["with selector"]) == ("0.500 ± 0.000", "0.520 ± 0.000")
    assert (row["stored"], row["used"], row["seeds"]) == ("1.000 ± 0.000", "0.300 ± 0.000", "2")
    markdown = sheets.results(study).markdown()
    assert "| accuracy, %: a |" in " ".join(markdown.split())


def test_every_printed_row_meets_its_method(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "dense", method="dense", policy="full", flops=1_000_000, **RESNEXT),
        write_run(tmp_path / "den1", train={"rho": 1.0}, **RESNEXT),
        write_run(tmp_path / "den2", train={"rho": 2.0}, **RESNEXT),
        write_run(tmp_path / "blockdrop", method="blockdrop", **RESNEXT),
    ]
    runs[0].summary["cifar10"]["random"] = runs[0].summary["cifar10"]["full"]  # says nothing of a dense network
    (study,) = studies(runs)
    (sheet,) = sheets.beside_paper(study)
    assert sheet.title == "Table 5 of the paper: Network compression on CIFAR-10, ResNeXt-29 (4x64d)"
    beside = [(row[0], row[1], row[4]) for row in sheet.rows]
    assert beside == [
        ("Baseline", "94.37", "dense network"),
        ("NestedNet, L", "93.59", "not run"),
        ("NestedNet, H", "94.11", "not run"),
        ("BlockDrop", "93.07", "BlockDrop"),
        ("DEN (rand sel)", "87.33", "DEN (rho = 1), random levels"),
        ("", "", "DEN (rho = 2), random levels"),
        ("DEN (rho = 1)", "93.38", "DEN (rho = 1)"),
        ("DEN (rho = 0.1)", "94.47", "not run"),
        ("(not in the paper)", "", "DEN (rho = 2)"),
    ]
    row = dict(zip(sheet.header[4:], sheet.rows[6][4:], strict=True))
    assert row["cifar10"] == "75.00"
    assert (row["2 x MACs"], row["MACs"], row["full / ours"]) == ("0.50", "0.25", "2.00x")
    assert [row[0] for row in sheets.results(study).rows if "dense" in row[0]] == ["dense network"]


def test_a_nestednet_stands_beside_a_row_of_each_of_its_levels(tmp_path: Path) -> None:
    run = write_run(tmp_path / "nested", method="nestednet", policy="H", **RESNEXT)
    run.summary["cifar10"]["L"] = {**run.summary["cifar10"]["H"], "accuracy": 50.0}
    (sheet,) = sheets.beside_paper(studies([run])[0])
    assert [(row[0], row[4], row[5]) for row in sheet.rows if row[4] != "not run"] == [
        ("NestedNet, L", "NestedNet, L", "50.00"),
        ("NestedNet, H", "NestedNet", "75.00"),
    ]


def test_small_scale_says_that_it_is_and_a_named_row_is_obeyed(tmp_path: Path) -> None:
    about = {"scenario": "m1", "scale": "small", "row": "DEN (rho = 0.1)"}
    run = write_run(tmp_path / "run", tasks=("digits", "mnist"), model="wrn_14_2", about=about, train={"rho": 0.3})
    (sheet,) = sheets.beside_paper(studies([run])[0])
    assert sheet.title.startswith("Table 2b")
    (row,) = [row for row in sheet.rows if row[0] == "DEN (rho = 0.1)"]
    assert row[7] == "DEN (rho = 0.3)"
    assert sheet.spans[1] == ("ours, small scale", 1)
    assert sheet.notes[0].startswith("Ours is wrn_14_2, not WRN-32-4")
    assert sheet.notes[1].startswith("Ours are other data sets")
    assert sheets.beside_paper(studies([write_run(tmp_path / "none")])[0]) == []


def test_a_run_that_was_to_meet_a_cost_is_named_by_it_and_stands_beside_no_rho(tmp_path: Path) -> None:
    run = write_run(tmp_path / "den", train={"rho": 1.0, "target_cost": 0.5}, **RESNEXT)
    (sheet,) = sheets.beside_paper(studies([run])[0])
    assert cells(sheet, "DEN (rho = 1)")["method"] == "not run"
    assert [row[4] for row in sheet.rows if row[0] == "(not in the paper)"] == ["DEN (cost = 0.5)"]


def test_paired_tests_are_over_the_same_images(tmp_path: Path) -> None:
    den = [write_run(tmp_path / f"d{s}", seed=s, right=38, train={"rho": 1.0}) for s in (0, 1)]
    slim = write_run(tmp_path / "s", seed=9, method="slim", policy="fixed", right=20)
    sheet = sheets.paired_tests(studies([*den, slim])[0])
    row = cells(sheet, "DEN (rho = 1)")
    assert (row["B"], row["A - B, points"], row["seeds"]) == ("static slim network", "+45.00", "2, 1")
    assert float(row["only A right"]) - float(row["only B right"]) == 18
    assert float(row["p (McNemar)"]) < 0.001
    assert sheets.paired_tests(studies(den)[0]) is None
    labels = slim.evaluations["digits"]["fixed"].label
    labels[0] = 3  # other images
    assert sheets.paired_tests(studies([*den, slim])[0]) is None


def test_the_papers_figures() -> None:
    for table in paper.TABLES:
        assert len(table.tasks) <= len(table.columns)
        for row in table.rows:
            assert len(row.accuracy) == len(table.columns), row
            if table.number.startswith("2"):  # the printed average is that of the printed accuracies
                *each, average = map(float, row.accuracy)
                assert sum(each) / 3 == pytest.approx(average, abs=0.006), row
    assert sum(len(table.rows) for table in paper.TABLES if table.number == "5") == 48
    assert [sheet.title[:8] for sheet in sheets.printed("4")] == ["Table 4a", "Table 4b"]
    assert sheets.printed("3")[0].rows[4] == ("DENs (rho = 0.1)", "62.62", "19.4M", "0.14M")
    with pytest.raises(ValueError, match="table is '7'; it must be 2, 3, 4, 5 or one of 2a, 2b"):
        sheets.printed("7")

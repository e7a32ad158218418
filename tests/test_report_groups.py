"""Runs put together: seeds, methods, studies; tables of them, beside the paper's."""

from __future__ import annotations

from pathlib import Path

import pytest

from den import paper
from den.report import sheets
from den.report.groups import studies
from den.results import read_run, save_results
from tests.report_cases import evaluation, write_run

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
    assert [row[4] for row in sheet.rows if row[0] == "(not in the paper)"] == ["DEN (cost = 0.5 of parameters)"]


def test_paired_tests_are_over_the_same_images(tmp_path: Path) -> None:
    den = [write_run(tmp_path / f"d{s}", seed=s, right=38, train={"rho": 1.0}) for s in (0, 1)]
    slim = write_run(tmp_path / "s", seed=9, method="slim", policy="fixed", right=20)
    sheet = sheets.paired_tests(studies([*den, slim])[0])
    row = cells(sheet, "DEN (rho = 1)")
    assert (row["B"], row["A - B, points"], row["seeds"]) == ("static slim network", "+45.00", "2, 1")
    assert row["FLOPs, B / A"] == "0.96"
    assert float(row["only A right"]) - float(row["only B right"]) == 18
    assert float(row["p (McNemar)"]) < 0.001
    assert sheets.paired_tests(studies(den)[0]) is None
    labels = slim.evaluations["digits"]["fixed"].label
    labels[0] = 3  # other images
    assert sheets.paired_tests(studies([*den, slim])[0]) is None


def test_pairs_are_those_of_equal_flops_or_the_nearest(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "d1", train={"rho": 1.0}, flops=300_000),  # 320,000 with its selector
        write_run(tmp_path / "d2", train={"rho": 0.1}, flops=600_000),
        *(
            write_run(tmp_path / f"s{k}", method="slim", policy="fixed", flops=1000 * k, train={"share": k / 1000})
            for k in (310, 330, 630)
        ),
        write_run(tmp_path / "dense", method="dense", policy="full", flops=1_000_000),
        *(
            write_run(tmp_path / f"b{k}", method="blockdrop", flops=1000 * k, train={"share": k / 1000})
            for k in (700, 900)
        ),
    ]
    sheet = sheets.paired_tests(studies(runs)[0])
    assert sheet is not None
    assert [(row[0], row[1], row[3]) for row in sheet.rows] == [
        ("DEN (rho = 1)", "static slim network (share 0.31)", "0.97"),
        ("DEN (rho = 1)", "static slim network (share 0.33)", "1.03"),
        ("DEN (rho = 1)", "dense network", "3.12"),
        ("DEN (rho = 1)", "BlockDrop (share 0.7)", "2.25"),
        ("DEN (rho = 0.1)", "static slim network (share 0.63)", "1.02"),
        ("DEN (rho = 0.1)", "dense network", "1.61"),
        ("DEN (rho = 0.1)", "BlockDrop (share 0.7)", "1.16"),
    ]
    assert "within 10%" in " ".join(sheet.notes)


def test_shuffled_levels_have_a_row_and_a_paired_test(tmp_path: Path) -> None:
    run = write_run(tmp_path / "den", right=38, train={"rho": 1.0})
    evaluations = {"digits": {**run.evaluations["digits"], "shuffled": evaluation(28)}}
    save_results(run.path, evaluations)
    (study,) = studies([read_run(run.path)])
    label = "DEN (rho = 1), levels shuffled over images"
    assert cells(sheets.results(study), label)["digits"] == "70.00"
    tests = sheets.paired_tests(study)
    assert tests is not None
    row = cells(tests, "DEN (rho = 1)")
    assert (row["B"], row["A - B, points"]) == (label, "+25.00")
    assert "fitting its paths to the images" in " ".join(tests.notes)


@pytest.mark.parametrize("size", [84, 224])
def test_table_3_has_the_rows_of_the_studys_image_size(size: int, tmp_path: Path) -> None:
    tasks = tuple(f"task_{i}" for i in range(10))
    name = "DENs (rho = 1)" if size == 84 else "DEN (rho = 1)"
    common = {"tasks": tasks, "model": f"simple_conv_net_{size}", "train": {"rho": 1.0}}
    top = {"preprocessing": {task: {"image_size": [size, size]} for task in tasks}}
    runs = [write_run(tmp_path / "den", about={"scenario": "m2", "scale": "paper", "row": name}, top=top, **common)]
    (sheet,) = sheets.beside_paper(studies(runs)[0])
    assert not any("Ours is" in note for note in sheet.notes)
    names = {84: ["Baseline", "Cross-stitch", "Routing", "DENs (rho = 1)", "DENs (rho = 0.1)"]}
    assert [row[0] for row in sheet.rows] == names.get(size, ["DEN (rho = 1)", "DEN (rho = 0.1)"])
    assert cells(sheet, name)["method"] == "DEN (rho = 1)"
    about = {"scenario": "m2", "scale": "small"}
    top = {"preprocessing": {task: {"image_size": [32, 32]} for task in tasks}}
    runs = [write_run(tmp_path / "small", **{**common, "model": "simple_conv_net"}, about=about, top=top)]
    (sheet,) = sheets.beside_paper(studies(runs)[0])  # of another size: beside the nearest
    assert [row[0] for row in sheet.rows] == names[84]
    assert cells(sheet, "DENs (rho = 1)")["method"] == "DEN (rho = 1)"
    assert sheet.notes[0] == "Ours are other data sets than the paper's."


def test_a_table_of_one_task_has_that_tasks_cost(tmp_path: Path) -> None:
    about = {"scenario": "m3", "scale": "paper"}
    common = {"tasks": ("coarse", "fine"), "model": "wrn_32_4"}
    runs = [
        write_run(tmp_path / "nested", method="nestednet", policy="nested", about={**about, "row": "NestedNet"},
                  flops={"coarse": 250_000, "fine": 1_000_000}, **common),
        write_run(tmp_path / "apart", method="independent", policy="fixed", about={**about, "row": "Baseline"},
                  flops=1_000_000, **common),
    ]  # fmt: skip
    coarse, fine = sheets.beside_paper(studies(runs)[0])
    assert [sheet.title.split()[1] for sheet in (coarse, fine)] == ["4a", "4b"]
    found = [
        [cells(sheet, "NestedNet")[key] for key in ("2 x MACs", "MACs", "full / ours")] for sheet in (coarse, fine)
    ]
    assert found == [["0.25", "0.12", "4.00x"], ["1.00", "0.50", "1.00x"]]
    assert cells(sheets.results(studies(runs)[0]), "NestedNet")["2 x MACs"] == "0.62"  # both tasks: their mean


def test_budgets_are_results_of_one_den(tmp_path: Path) -> None:
    told = {"model_options": {"selector": {"budget": 0.5}}, "budgets": {0.2: 200_000, 0.5: 400_000, 0.8: 800_000}}
    run = write_run(tmp_path / "den", train={"rho": 1.0, "cost_unit": "flops"}, **RESNEXT, **told)
    (study,) = studies([run])
    assert [(entry.label, entry.policy) for entry in study.entries if entry.own] == [
        ("DEN (budget 0.5 of FLOPs)", "selector"),
        ("DEN (budget 0.2 of FLOPs)", "budget 0.2"),
        ("DEN (budget 0.8 of FLOPs)", "budget 0.8"),
    ]
    assert cells(sheets.results(study), "DEN (budget 0.2 of FLOPs)")["2 x MACs"] == "0.20"
    (sheet,) = sheets.beside_paper(study)
    assert cells(sheet, "DEN (rho = 1)")["method"] == "not run"  # no rho was kept to
    assert len([row for row in sheet.rows if row[0] == "(not in the paper)"]) == 3


def test_costs_are_told_in_the_unit_of_training_too(tmp_path: Path) -> None:
    flops = {"rho": 1.0, "cost_unit": "flops"}
    runs = [
        write_run(tmp_path / "flops", train={**flops, "target_cost": 0.4}, own_cost=0.41, **RESNEXT),
        write_run(tmp_path / "rho", train=flops, own_cost=0.3, **RESNEXT),
        write_run(tmp_path / "old", train={"rho": 1.0, "cost_unit": "latency"}, **RESNEXT),  # written by older code
        write_run(tmp_path / "parameters", train={"rho": 1.0}, **RESNEXT),
    ]
    (study,) = studies(runs)
    sheet = sheets.results(study)
    assert ("cost, share of", 2) in sheet.spans
    parameters = cells(sheet, "DEN (rho = 1)")["parameters"]
    assert {row[0]: row[sheet.header.index("unit of training")] for row in sheet.rows if "," not in row[0]} == {
        "DEN (cost = 0.4 of FLOPs)": "0.410 FLOPs",
        "DEN (rho = 1 on FLOPs)": "0.300 FLOPs",
        "DEN (rho = 1 on measured time)": "-",
        "DEN (rho = 1)": f"{parameters} parameters",
    }
    (beside,) = sheets.beside_paper(study)  # equation 5 is of parameters: others stand beside no rho
    assert cells(beside, "DEN (rho = 1)")["method"] == "DEN (rho = 1)"
    assert "unit of training" not in sheets.results(studies(runs[3:])[0]).header


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

"""`den report` on real runs, start to finish; and its page, opened in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import den
from den.cli import USAGE, main
from den.config import EstimatorConfig, SelectorConfig, TrainConfig
from den.report.build import _commit, build
from den.results import read_run
from den.tasks import load_task
from den.trainer import Trainer
from tests.report_cases import training_log, write_run

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip
PROBE = """<script>window.onload = () => {
  const wide = [...document.body.children].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length;
  const images = [...document.images];
  images.forEach(i => i.closest("details") && (i.closest("details").open = true));
  const shown = images.filter(i => i.complete && i.naturalWidth > 300).length;
  const asked = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;
  const page = document.documentElement.scrollWidth;
  document.body.dataset.probe = [innerWidth, page, wide, images.length, shown, asked].join(" ");
}</script>"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two seeds of a DEN and a static network, trained for an epoch or two on digits."""
    folder = tmp_path_factory.mktemp("runs")
    source = {"tasks": {"digits": {"dataset": "digits", "subset": 256, "seed": 0}}}
    digits = load_task(**source["tasks"]["digits"])
    for name, seed in (("den-0", 0), ("den-1", 1), ("slim-0", 0)):
        slim = name.startswith("slim")
        torch.manual_seed(seed)
        ratios = (1,) if slim else (0, 0.25, 0.5, 1)
        network = den.create_model("wrn_8_1", {"digits": 10}, ratios, selector="light", base_size=8)
        about = {"scenario": "m1", "scale": "small", "method": "slim" if slim else "den", "seed": seed}
        about = {**about, "policy": "full" if slim else "selector", "row": None}
        config = TrainConfig(
            rho=1.0, stages=1, seed=seed, batch_size=64, out=folder / name, progress=False,
            estimator=EstimatorConfig(first_epochs=2), selector=SelectorConfig(lr=3e-3, epochs=0 if slim else 2),
        )  # fmt: skip
        Trainer(network, [digits], config, source=source, about=about).fit()
    return [folder / name for name in ("den-0", "den-1", "slim-0")]


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    arguments = ["report", *runs, "--out", out, "--latency", "--seconds", 0.05, "--paper-table", 3, "--json"]
    assert main([str(a) for a in arguments]) == 0
    return out


class Pieces(HTMLParser):
    """Tags, in order, and what refers to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.anchors: list[str] = []
        self.targets: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.sources += [found[key] for key in ("src", "srcset", "data", "action") if key in found]
        self.anchors += [found["href"]] if "href" in found else []
        self.targets += [found["id"]] if "id" in found else []
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_is_whole_and_asks_for_nothing(report: Path) -> None:
    text = (report / "report.html").read_text()
    pieces = Pieces()
    pieces.feed(text)
    assert pieces.open == []
    assert pieces.sources
    assert all(source.startswith("data:image/png;base64,") for source in pieces.sources)
    assert all(anchor.startswith("#") and anchor[1:] in pieces.targets for anchor in pieces.anchors)
    assert not {"script", "link", "iframe", "object"} & set(pieces.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    for words in (
        "DEN (rho = 1)", "static slim network", "2 seeds", "Paired tests", "Table 2b of the paper", "small scale",
        "Figure 3 of the paper", "Figure 6 of the paper", "Figure 7 of the paper", "Accuracy against measured time",
        "Table 3 of the paper", "Speed of training", "Runs and conditions",
    ):  # fmt: skip
        assert words in text, words
    assert "Left out" not in text


@pytest.mark.slow
def test_figures_and_numbers_are_written_beside_it(report: Path, runs: list[Path]) -> None:
    names = {path.name for path in (report / "figures").iterdir()}
    stems = {Path(name).stem for name in names}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    single = ("level_usage", "selected_models", "similar_models", "images_by_model", "sample_paths", "training_1")
    for part in (*single, "against_flops", "against_latency_1", "against_latency_64", "training_speed"):
        assert any(part in stem for stem in stems), part
    data = json.loads((report / "report.json").read_text())
    method = data["studies"][0]["methods"][0]
    expected = [read_run(run).summary["digits"]["selector"]["accuracy"] for run in runs[:2]]
    assert method["tasks"]["digits"]["accuracy"]["mean"] == pytest.approx(sum(expected) / 2)
    assert method["milliseconds"]["digits"]["1"] > 0
    assert data["missing"] == []
    assert "### Results on the test images" in (report / "tables.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_at_every_width(report: Path, width: int, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text((report / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    profile = tmp_path / "profile"
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    match = re.search(r'data-probe="([\d. ]+)"', done.stdout)
    assert match, done.stderr[-500:]
    inner, page_width, wide, images, shown, asked = map(int, match.group(1).split())
    assert page_width <= inner <= max(width, 500), "the page itself scrolls sideways"
    assert wide == 0
    assert images == shown > 8
    assert asked == 0


def test_a_report_tells_what_it_was_made_by(tmp_path: Path, monkeypatch) -> None:
    def no_images(run, name):
        raise ValueError("no images here")

    monkeypatch.chdir(tmp_path)
    logged = {"top": {"started": "2026-01-02T03:04:05", "threads": 2}}
    runs = [write_run(Path("runs/den"), train={"rho": 1.0}, metrics=training_log(), **logged)]
    runs.append(write_run(Path("runs/den2"), train={"rho": 0.1}, metrics=training_log()))
    build(runs, "out", task_of=no_images, command=["den", "report", "runs/my den", "--out", "out"])
    data = json.loads(Path("out/report.json").read_text())
    assert data["command"] == "den report 'runs/my den' --out out"
    assert data["den"] == den.__version__
    assert data["date"] == date.today().isoformat()
    assert data["commit"] is None or re.fullmatch(r"[0-9a-f]{12}(-dirty)?", data["commit"])
    today = date.today().isoformat()  # of a run that logged no start: its config.json's
    assert data["runs"] == [
        {"path": "runs/den", "started": "2026-01-02", "minutes": 0.2, "threads": 2},
        {"path": "runs/den2", "started": today, "minutes": 0.2, "threads": None},
    ]
    text = Path("out/tables.md").read_text()
    assert text.startswith(f"Made by `den report 'runs/my den' --out out` with den {den.__version__}")
    assert str(tmp_path) not in text + json.dumps(data)
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| runs/den")]
    assert [row[8:11] for row in rows] == [["2026-01-02", "0.2", "2"], [today, "0.2", "-"]]
    assert "den report 'runs/my den' --out out" in html.unescape(Path("out/report.html").read_text())


def test_no_commit_is_told_outside_of_a_checkout(tmp_path: Path) -> None:
    assert _commit(tmp_path) is None
    (tmp_path / ".git").mkdir()  # broken
    assert _commit(tmp_path) is None


def test_what_cannot_be_reported_is_told_in_one_line(tmp_path: Path, capsys) -> None:
    unfinished, empty = tmp_path / "unfinished", tmp_path / "empty"
    for folder in (unfinished, empty):
        folder.mkdir()
    (unfinished / "config.json").write_text("{}")
    out = ["--out", str(tmp_path / "out")]
    cases = [
        ([str(tmp_path / "nowhere"), *out], "nowhere is missing; give a run folder"),
        ([str(unfinished), *out], "is a run without summary.json yet; finish it with den train --resume"),
        ([str(empty), *out], "empty holds no finished run"),
        ([str(empty)], "--out is missing"),
        ([*out], "no run is given"),
        ([str(empty), *out, "--seconds", "0"], "seconds is 0.0; it must be above 0"),
    ]
    for arguments, message in cases:
        assert main(["report", *arguments]) == USAGE
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

"""report.py on the study of a report's table: reported figures, ours and the differences."""

import csv
import signal
from pathlib import Path

import pytest
from helpers import ROOT, cells_of, check_layout, figure_of, read_page

import report
import sweep
from reporting.page import ReportItem
from reporting.report_table import printed, report_table_item
from reporting.sources import read_study
from reporting.tables import Column, Table
from studies.results import COLUMNS

FILE = str(ROOT / "tests" / "r9" / "tables.toml")
SCORES = {"row=base,seed=1": 0.70, "row=base,seed=2": 0.74, "row=staged,seed=1": 0.69, "row=both,seed=1": 0.75}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of table 1 with two seeds: the first is done, of the second only the baseline; one trial failed."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "r9-table-1"
    folder.mkdir()
    _, plan = sweep.read_command(["--tables", FILE, "--table", "1", "--seeds", "1,2", "--out", str(folder)])
    assert plan is not None and plan.table is not None
    plan.table.save(folder)
    rows = [
        {
            "trial": name, "status": "ok", "cause": "", "command": plan.trials[name].command, "score": score,
            "sst_accuracy": score - 0.2, "sts_pearson": "" if "both" in name else 0.8, "minutes": 12.5,
        }
        for name, score in SCORES.items()
    ]  # fmt: skip
    failed = {"trial": "row=again,seed=1", "status": "failed", "cause": "error: a loss is not finite"}
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["trial", "status", "row", "recipe", *COLUMNS], restval="")
        writer.writeheader()
        writer.writerows([*rows, failed])
    return folder


def item_of(folder: Path) -> ReportItem:
    problems: list[str] = []
    found = read_study(folder / "results.csv", folder.name, problems)
    assert found is not None and found.table is not None and problems == []
    return report_table_item(found, found.table)


def test_the_table_has_the_reports_order_and_columns(study: Path) -> None:
    header, *lines = cells_of(item_of(study))
    assert header == ["row", "", "sst accuracy", "sts pearson", "score", "training time (min)", "note"]
    assert lines[:4] == [
        ["Baseline", "reported", "0.500", "0.860", "0.715", "90.5", ""],
        ["Baseline", "ours (2 seeds)", "0.520", "0.800", "0.720", "12.5", ""],
        ["Baseline", "deviation", "0.028", "0.000", "0.028", "0.0", ""],
        ["Baseline", "difference", "0.020", "-0.060", "0.005", "-78.0", ""],
    ]
    assert [line[:2] for line in lines[4:]] == [
        ["STS first | then both", "reported"], ["STS first | then both", "ours (1 seed)"],
        ["STS first | then both", "difference"], ["STS first, more dropout", "reported"],
        ["Ensemble", "reported"], ["Ensemble", "ours (1 seed)"], ["Ensemble", "difference"],
        ["Baseline, test", "reported"], ["With lost data", "reported"],
    ]  # fmt: skip
    assert lines[10][2:6] == ["", "", "0.030", ""]  # the report has no other figure of the ensemble
    assert [line[-1] for line in lines if line[-1]] == [
        "Our heads train.; 1 of 2 trials have not run yet",
        "1 of 2 trials have not run yet; failed: error: a loss is not finite",
        "1 of 2 trials have not run yet",
        "the labels of test are not public",
        "The report does not say which data.",
    ]


def test_a_note_of_several_rows_is_printed_once() -> None:
    table = Table([Column("row"), Column("x"), Column("note")], [["A", 1, "why"], ["B", 2, ""], ["C", 3, "why"]])
    assert printed("Title", table).strip().endswith("\nA and 1 more: why")


def test_the_figure_has_reported_beside_ours(study: Path) -> None:
    figure = figure_of(item_of(study))
    panels = figure.axes
    assert [axes.get_xlabel() for axes in panels] == [
        "sst accuracy", "sts pearson", "score", "training time (min)",
    ]  # fmt: skip
    assert [label.get_text() for label in panels[2].get_yticklabels()] == [
        "Baseline", "STS first | then both", "Ensemble",
    ]  # fmt: skip
    points = [[round(float(x), 4) for x in line.get_xdata()] for line in panels[2].lines]
    assert points == [[0.715], [0.7, 0.74], [0.72], [0.7], [0.69], [0.69], [0.72], [0.75], [0.75]]
    check_layout(figure)


def test_the_script_prints_and_writes_it(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(study), "--out", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    assert "R9 Table 1: A task first, dev and test\nrow " in printed
    assert "With lost data: The report does not say which data.\n" in printed
    page = read_page(tmp_path / "report")
    assert "R9 Table 1: A task first" in page.text and "Not read" not in page.text
    rows = list(csv.DictReader((tmp_path / "report" / "r9-table-1-table.csv").open()))
    assert float(rows[3]["score"]) == pytest.approx(0.005) and (tmp_path / "report" / "r9-table-1-table.png").exists()
    (study / "table.json").write_text('{"rows": 3}')
    report.main([str(study), "--out", str(tmp_path / "report")])
    assert "table.json: cannot be read (it lacks report)" in capsys.readouterr().out


def test_a_table_is_trained_and_reported(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For real, from the stage to the ensemble, on a tiny model."""
    monkeypatch.chdir(ROOT)
    before, folder = signal.getsignal(signal.SIGTERM), tmp_path / "study"
    sweep.main(["--tables", FILE, "--table", "1", "--out", str(folder), "--seeds", "3", *tiny_flags, "--jobs", "2"])
    signal.signal(signal.SIGTERM, before)
    assert "5 ok: " in capsys.readouterr().out and not list(folder.glob("trials/*/*.pt"))
    names = ["row=again,seed=3", "recipe=stage,seed=3", "row=base,seed=3", "row=both,seed=3", "row=staged,seed=3"]
    assert sorted(path.name for path in folder.glob("trials/*")) == sorted(names)
    votes = (folder / "trials" / "row=both,seed=3" / "log.txt").read_text()
    assert "row=base,seed=3/best.pt (2 votes)" in votes
    item = item_of(folder)
    ours = [line[1] for line in cells_of(item) if line[1].startswith("ours")]
    assert ours == ["ours (1 seed)"] * 4

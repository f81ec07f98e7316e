"""--dry_run of a report's table: its steps are those of the runs, and its hours follow from finished ones."""

import csv
from pathlib import Path

import pytest
from helpers import ROOT, configure, make_trainer, metrics

import sweep
from studies.estimates import estimate
from studies.results import COLUMNS

TABLE = ["--tables", str(ROOT / "tests" / "r9" / "tables.toml"), "--table", "1", "--seeds", "1,2", "--dry_run"]


def lines_of(printed: str) -> dict[str, list[str]]:
    """The cells of each line of a printed table by the first one."""
    return {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("row=", "recipe="))}


def test_a_dry_run_shows_runs_steps_memory_and_hours(
    tiny_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(ROOT)
    caplog.set_level("INFO", "minbert")
    words = [*TABLE, *tiny_flags, "--out", str(tmp_path / "study")]
    sweep.main(words)
    printed = capsys.readouterr().out
    assert caplog.text.count("start weights: ") <= 1  # by this process, which builds a model for each kind of trial
    found = lines_of(printed)
    assert {name: cells[:3] for name, cells in found.items()} == {  # 20 examples a task: three batches, two epochs
        "row=base": ["2", "2", "12"], "recipe=stage": ["2", "2", "6"], "row=staged": ["2", "2", "12"],
        "row=again": ["2", "2", "12"], "row=both": ["2", "2"],
    }  # fmt: skip
    assert all(float(cells[3]) > 0.05 for cells in found.values() if len(cells) > 3)
    assert "With lost data: cannot be run: The report does not say which data." in printed
    assert "a rough guess. Once a trial" in printed and "10 trials, 0 refused" in printed
    assert not (tmp_path / "study").exists()

    (tmp_path / "study").mkdir()
    with (tmp_path / "study" / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["trial", "status", "row", "recipe", *COLUMNS], restval="")
        writer.writeheader()
        writer.writerow({"trial": "row=base,seed=2", "status": "ok", "minutes": 120})
    sweep.main(words)
    printed = capsys.readouterr().out
    found = lines_of(printed)
    assert found["row=base"][1] == "1" and found["row=base"][4] == found["row=staged"][4] == "2.00"
    hours = {name: float(cells[4]) for name, cells in found.items() if len(cells) > 4}
    assert 0.5 < hours["recipe=stage"] < 2  # one of the two tasks
    left = hours["row=base"] + 2 * sum(hours[name] for name in ("recipe=stage", "row=staged", "row=again"))
    assert f"{left:.2f} hours for what is to do" in printed and "hours by the 1 finished trials" in printed


def test_the_estimate_is_that_of_the_run(tiny_flags: list[str], tmp_path: Path) -> None:
    """Eight steps of eight examples; dev has twelve of each task, and its pass takes a third of training's."""
    flags = [*tiny_flags, "--train_sst", "--train_sts", "--routine", "round-robin", "--steps_per_epoch", "4"]
    flags += ["--fine_tune_mode", "full-model"]
    whole = estimate(configure(*flags), 0)
    trainer = make_trainer(flags, tmp_path / "run")
    trainer.fit()
    assert whole.steps == metrics(tmp_path / "run")[-1]["step"] == 8
    assert estimate(configure(*flags), 5).memory == whole.memory + 5
    rare = estimate(configure(*flags, "--eval_every", "2"), 0).operations
    assert rare / whole.operations == pytest.approx((3 * 64 + 24) / (3 * 64 + 48), rel=0.05)
    assert estimate(configure(*flags, "--sst_smart", "1", "--sts_smart", "1"), 0).operations > 2 * whole.operations
    assert estimate(configure(*flags, "--sst_rdrop", "1"), 0).operations > 1.1 * whole.operations
    frozen = estimate(configure(*flags, "--fine_tune_mode", "last-layer"), 0).operations
    assert frozen / whole.operations == pytest.approx((64 + 48) / (3 * 64 + 48), rel=0.05)


def test_missing_data_is_told_and_the_rest_estimated(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    sweep.main([*TABLE, *tiny_flags, "--sst_train", "nowhere.csv", "--out", "never"])
    printed = capsys.readouterr().out
    assert "row=base: cannot be estimated: --sst_train nowhere.csv" in printed
    assert len(lines_of(printed)["recipe=stage"]) == 5 and not Path("never").exists()
    sweep.main([*TABLE, *tiny_flags, "--data_dir", "nowhere", "--out", "never"])
    assert "\nhours cannot be estimated\n" in capsys.readouterr().out

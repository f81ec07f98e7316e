"""Run directories: where they are found, what is read, and what is said of those that are damaged."""

import contextlib
import csv
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import figure_of, read_page, refusal

import ensemble
import multitask_classifier
import report
from reporting.runs import curves_item
from reporting.sources import collect_sources, read_run, unique_names
from studies.results import figures as row_of
from tasks import TASKS

PREDICTIONS = {"sst-confusion", "para-confusion", "sts-scatter", "sts-residuals"}


def print_of(capsys: Any, *words: object) -> str:
    """Return what report.py prints."""
    capsys.readouterr()
    report.main([str(word) for word in words])
    return str(capsys.readouterr().out)


def stems(out: Path, pattern: str = "*.png") -> set[str]:
    return {path.stem for path in out.glob(pattern)}


def test_a_run_is_a_trial_with_the_figures_of_its_row(finished_runs: Path) -> None:
    for name in ("yin", "sst"):
        problems: list[str] = []
        trial, row = read_run(finished_runs / name, name, problems).trial, row_of(finished_runs / name)
        assert trial is not None and problems == []
        assert (trial.score, trial.memory, trial.device) == (row["score"], row["peak_memory_bytes"], row["device"])
        assert trial.seconds == pytest.approx(sum(row.get(f"{task}_seconds_per_epoch", 0) for task in TASKS), abs=2e-3)
        metrics = {task.name: row.get(f"{task.name}_{task.metric}") for task in TASKS.values()}
        assert trial.by_task == {task: value for task, value in metrics.items() if value is not None}
        assert len(trial.commit.rstrip("+")) == 40 and "--epochs" in trial.command


def test_sources_are_named_by_what_distinguishes_them(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/seed1", "b/seed1", "b/seed2", "study/results.csv")]
    assert list(unique_names(paths).values()) == ["a/seed1", "b/seed1", "seed2", "study"]
    tables = [tmp_path / name for name in ("x/methods.csv", "x/costs.csv", "x/costs/results.csv", "y/lr=1.csv")]
    assert list(unique_names(tables).values()) == ["methods", "costs.csv", "costs", "lr=1"]
    assert unique_names([Path("/")]) == {Path("/"): "/"}


def test_a_run_is_found_once_and_links_do_not_lead_in_circles(finished_runs: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(finished_runs, tmp_path / "runs")
    (copied / "again").symlink_to(copied)
    (copied / "best").symlink_to(copied / "yin")
    found = collect_sources([copied, copied / "yin", copied / "best"])
    assert sorted(run.path.resolve().name for run in found.runs) == ["cross", "sst", "yin"] and found.problems == []


def test_a_folder_of_runs(finished_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    printed = print_of(capsys, finished_runs, "--out", out)
    page = read_page(out)
    wanted = {f"{run}-{kind}" for run in ("yin", "cross") for kind in {"curves", *PREDICTIONS}}
    of_all = {"scores", "runs-scores", "runs-resources", *(f"runs-{task}-curves" for task in ("sst", "para", "sts"))}
    assert stems(out) == {*wanted, "sst-sst-confusion", *of_all}
    assert {"runs", "scores", "sts-errors", "para-rates", "yin-curves"} <= stems(out, "*.csv")
    assert all(title in page.text for title in ("Runs", "Learning curves", "Not shown, and why"))
    assert "Not read" not in page.text
    rows = {row["run"]: row["configuration"] for row in csv.DictReader((out / "runs.csv").open())}
    assert len(set(rows.values())) == 3 and all(f"{run}: {label}" in page.text for run, label in rows.items())
    assert f"sst: {rows['sst']}: no learning curves, which need two epochs" in printed


def damage(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    """Return a function that rewrites a run's file."""
    return lambda run: (run / name).write_text(change((run / name).read_text())) and None


def remove(name: str) -> Callable[[Path], None]:
    """Return a function that removes a run's file."""
    return lambda run: (run / name).unlink()


def replaced(pattern: str, text: str) -> Callable[[str], str]:
    return lambda content: re.sub(pattern, text, content, count=1)


def other_first_label(text: str) -> str:
    """Return predictions of a binary task with another label of the first example."""
    header, first, *others = text.splitlines(keepends=True)
    label = int(first.split(" , ")[1])
    return "".join([header, first.replace(f" , {label} ", f" , {1 - label} "), *others])


# What is damaged: how, a part of the line that says so, and the figures that are missing.
DAMAGES: dict[str, tuple[Callable[[Path], None], str, set[str]]] = {
    "truncated metrics": (
        damage("metrics.jsonl", lambda text: text[:-40]),
        "metrics.jsonl: line 2 is damaged; this line and all after it are left out",
        {"curves"},
    ),
    "nested metrics": (damage("metrics.jsonl", lambda _: "[" * 100_000), "line 1 is damaged", {"curves"}),
    "metrics without tasks": (
        damage("metrics.jsonl", replaced(r'"train": \{', '"train": null, "was": {')), "line 1 is damaged", {"curves"}),
    "a word as loss": (
        damage("metrics.jsonl", replaced(r'"loss": [\d.]+', '"loss": "low"')), "line 1 is damaged", {"curves"}),
    "binary metrics": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe") and None, "cannot be read (", {"curves"}),
    "no seconds": (
        damage("timing.jsonl", replaced(r'"train_seconds": \{"sst": [\d.]+', '"train_seconds": {"sst": null')),
        "timing.jsonl: line 1 is damaged",
        set(),
    ),
    "a device without name": (
        damage("timing.jsonl", replaced(r'"device": ".*?"', '"device": {}')), "timing.jsonl: line 1 is damaged", set()),
    "unfinished": (
        remove("scores.json"), ": is not finished (no scores.json); it is left out of comparisons", PREDICTIONS),
    "a huge score": (
        damage("scores.json", lambda _: '{"dev": {"score": 1' + 400 * "0" + "}}"), "scores.json: is damaged (",
        PREDICTIONS,
    ),
    "broken scores": (damage("scores.json", lambda text: text[:50]), "scores.json: is damaged (", PREDICTIONS),
    "foreign scores": (
        damage("scores.json", lambda _: '{"dev": {"sst": 3, "score": 0.5}}'), "scores.json: is damaged (", PREDICTIONS),
    "a list as epoch": (
        damage("scores.json", replaced(r'"epoch": \d+', '"epoch": []')), "scores.json: is damaged (", PREDICTIONS),
    "broken options": (  # so that nothing says where the dev files are
        damage("config.json", replaced('"seed"', '"sead"')), "config.json: cannot be read (", PREDICTIONS),
    "unknown task": (
        damage("config.json", replaced('"sst": {', '"headlines": {')),
        "config.json: cannot be read (this version does not know the task headlines)",
        PREDICTIONS,
    ),
    "broken predictions": (
        damage("predictions/sst-dev-output.csv", lambda text: text[:100]),
        "sst-dev-output.csv: is damaged",
        {"sst-confusion"},
    ),
    "missing predictions": (
        remove("predictions/sts-dev-output.csv"),
        ": no predictions of STS similarity, because sts-dev-output.csv is missing",
        {"sts-scatter", "sts-residuals"},
    ),
    "fewer predictions": (
        damage("predictions/sts-dev-output.csv", lambda text: "\n".join(text.splitlines()[:-1])),
        "is not the dev file of STS similarity that it predicted; name that with --data_dir",
        {"sts-scatter", "sts-residuals"},
    ),
    "predictions of another run": (
        damage("predictions/para-dev-output.csv", other_first_label), "has accuracy", {"para-confusion"}),
    "broken checkpoint": (
        lambda run: (run / "best.pt").write_bytes(b"PK half a file") and None,
        "best.pt: not a readable checkpoint",
        set(),
    ),
}  # fmt: skip
WITHOUT_SCORES = {"a huge score", "unfinished", "broken scores", "foreign scores", "a list as epoch"}


def file_name(damaged: str) -> str:
    return damaged.replace(" ", "-")


@pytest.fixture(scope="module")
def damaged(finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The report on a copy of a run for each damage and on a whole run, and the printed lines."""
    folder, out = tmp_path_factory.mktemp("damaged"), tmp_path_factory.mktemp("out")
    for what, (apply, _, _) in DAMAGES.items():
        apply(shutil.copytree(finished_runs / "yin", folder / file_name(what)))
    shutil.copytree(finished_runs / "cross", folder / "cross")
    printed = io.StringIO()
    with contextlib.chdir(out), contextlib.redirect_stdout(printed):
        report.main([str(folder), "--out", str(out)])
    return out, printed.getvalue().splitlines()


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_run_is_reported_as_far_as_possible(damaged: tuple[Path, list[str]], what: str) -> None:
    out, lines = damaged
    _, message, missing = DAMAGES[what]
    name = file_name(what)
    assert sum(message in line and name in line for line in lines) == 1, lines
    figures = {stem.removeprefix(f"{name}-") for stem in stems(out, f"{name}-*.png")}
    assert figures == {"curves", *PREDICTIONS} - missing


def test_the_rest_is_reported(damaged: tuple[Path, list[str]]) -> None:
    out, lines = damaged
    assert {stem.removeprefix("cross-") for stem in stems(out, "cross-*.png")} == {"curves", *PREDICTIONS}
    page = read_page(out)
    assert all(line in page.text for line in lines[:-2])
    finished = {"cross", *map(file_name, DAMAGES.keys() - WITHOUT_SCORES)}
    assert {row["run"] for row in csv.DictReader((out / "runs.csv").open())} == finished


def test_further_pre_training_has_only_losses(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    multitask_classifier.main([*tiny_flags, "--mlm", "--no_tensorboard", "--run_dir", str(tmp_path / "run")])
    printed = print_of(capsys, tmp_path / "run", "--out", tmp_path / "out")
    assert "run: was only pre-trained and has no scores; it is left out of comparisons" in printed
    assert stems(tmp_path / "out") == {"run-curves"}
    (axes,) = figure_of(curves_item(read_run(tmp_path / "run", "run", []))).axes
    assert len([line for line in axes.lines if line.get_linestyle() == "--"]) == 3


def test_folders_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "exported" / "model.safetensors").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    for name, wanted in (
        ("exported", "exported: contains neither a run directory nor a study's results.csv"),
        ("begun", "begun: is not finished"),
    ):
        message = refusal(report.main, [str(tmp_path / name), "--out", str(tmp_path / "out")])
        assert message.startswith("nothing to report: ") and wanted in message
    assert not (tmp_path / "out").exists()


def test_labels_come_from_where_the_flags_say(
    finished_runs: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, run, out = shutil.copytree(small_data, tmp_path / "moved"), tmp_path / "yin", tmp_path / "out"
    shutil.copytree(finished_runs / "yin", run)
    config = run / "config.json"
    config.write_text(config.read_text().replace(str(small_data), "/nowhere"))
    printed = print_of(capsys, run, "--out", out)
    line = "no figures of predictions of SST sentiment, which need the labels: only the run's config.json names the dev"
    assert printed.count(line) == 1 and stems(out) == {"yin-curves"}
    print_of(capsys, run, "--out", tmp_path / "second", "--data_dir", moved)
    assert "yin-sst-confusion" in stems(tmp_path / "second")
    (moved / "ids-sst-dev.csv").rename(moved / "other.csv")
    print_of(capsys, run, "--out", tmp_path / "third", "--data_dir", moved, "--sst_dev", moved / "other.csv")
    assert "yin-sst-confusion" in stems(tmp_path / "third")


def test_the_table_of_benchmark_is_a_study(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*tiny_flags, "--train_sst", "--no_tensorboard", "--no_test_predictions", "--epochs", "1"]
    for seed in (1, 2):
        more = ["--seed", seed, "--benchmark", tmp_path / "costs.csv", "--run_dir", tmp_path / f"seed{seed}"]
        multitask_classifier.main([str(word) for word in [*flags, *more]])
    print_of(capsys, tmp_path / "costs.csv", "--out", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "costs-seeds.csv").open()))
    assert [row["seeds"] for row in rows] == ["2"] and float(rows[0]["peak memory (GB)"]) > 0


def test_an_ensemble_is_reported_by_its_predictions(
    finished_runs: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [finished_runs / name / "best.pt" for name in ("yin", "cross")]
    more = ["--data_dir", small_data, "--threads", 1, "--run_dir", tmp_path / "ensemble", "--cache", tmp_path / "cache"]
    ensemble.main([str(word) for word in (*members, *more)])
    print_of(capsys, tmp_path / "ensemble", "--out", tmp_path / "out", "--data_dir", small_data)
    assert stems(tmp_path / "out") == {f"ensemble-{kind}" for kind in PREDICTIONS}


def test_ids_keep_characters_that_end_lines_elsewhere(
    tiny_flags: list[str], small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the kept rows, in predictions, in an ensemble's and in report.py; only a line feed ends a line."""
    data, odd = shutil.copytree(small_data, tmp_path / "data"), ["\u2028", "\u2029", "\f", "\v", "\x85", "\x1c", "\x1e"]
    for name in ("ids-sst-dev.csv", "ids-sst-test-student.csv"):
        header, *rows = (data / name).read_bytes().decode().rstrip("\n").split("\n")
        rows = [re.sub(r"[0-9a-f]{25}", f"id{odd[n % 7]}{n}", row) for n, row in enumerate(rows)]
        (data / name).write_bytes("\n".join([header, *rows]).encode())
    wanted = [f"id{odd[n % 7]}{n}" for n in range(12)]
    for seed in ("1", "2"):  # the second reads the rows that the first kept
        flags = [*tiny_flags, "--train_sst", "--epochs", "1", "--no_tensorboard", "--data_dir", str(data)]
        multitask_classifier.main([*flags, "--seed", seed, "--run_dir", str(tmp_path / "runs" / seed)])
    members = [str(tmp_path / "runs" / seed / "best.pt") for seed in ("1", "2")]
    ensemble.main([*members, "--data_dir", str(data), "--threads", "1", "--run_dir", str(tmp_path / "runs" / "both")])
    for run in ("1", "2", "both"):
        for split, ids in (("dev", wanted), ("test", wanted[:6])):
            text = (tmp_path / "runs" / run / "predictions" / f"sst-{split}-output.csv").read_bytes().decode()
            assert [row.split(" , ")[0] for row in text.split("\n")[1:-1]] == ids
    print_of(capsys, tmp_path / "runs", "--out", tmp_path / "out", "--data_dir", data)
    assert stems(tmp_path / "out", "*sst-confusion.png") == {f"{run}-sst-confusion" for run in ("1", "2", "both")}

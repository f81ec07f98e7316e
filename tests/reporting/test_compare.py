"""report.py --compare: where two checkpoints disagree."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import figure_of, read_page, refusal
from scipy.stats import binomtest, linregress, pearsonr

import multitask_classifier
import report
from datasets import BadRows, Examples, read_examples
from reporting.compare import (
    SHOWN_EXAMPLES,
    PairedPredictions,
    decisions_item,
    disagreements_item,
    figure_item,
    pair_predictions,
    scores_item,
    similarities_item,
)
from reporting.page import ReportItem
from tasks import PARA, SST, STS, TASKS, Task

rng = np.random.default_rng
TRAINED = {name: task for name, task in TASKS.items() if task.by_default}


def pair(task: Task, labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> PairedPredictions:
    """Pair predictions of examples with these labels and numbered texts."""
    ids = [f"id{i}" for i in range(len(labels))]
    texts = tuple([f"{column} {i}" for i in range(len(labels))] for column in task.text_columns)
    return pair_predictions(Examples(task, "dev", Path("dev.csv"), ids, texts, labels), a, b)


def rows_of(item: ReportItem | str) -> list[list[Any]]:
    assert isinstance(item, ReportItem) and item.table is not None
    return [list(row) for row in item.table.rows]


def by_column(item: ReportItem) -> dict[str, Any]:
    """Return the first row of an item's table by column."""
    assert item.table is not None
    return dict(zip([column.name for column in item.table.columns], item.table.rows[0], strict=True))


def classes(*predicted: int) -> np.ndarray:
    """Return probabilities [N, 5] with .6 for these classes and .1 for the others."""
    return 0.5 * np.eye(5)[list(predicted)] + 0.1


def test_rates_of_disagreement_by_hand() -> None:
    both = pair(SST, np.array([0, 1, 2, 3, 4, 0]), classes(0, 1, 2, 4, 0, 1), classes(0, 2, 4, 3, 1, 1))
    assert by_column(decisions_item([both])) == {
        "task": "SST sentiment",
        "they differ": pytest.approx(4 / 6),
        "of these off by one class": pytest.approx(3 / 4),  # 1-2, 4-3, 0-1; not 2-4
        "both right": pytest.approx(1 / 6),
        "only A right": pytest.approx(2 / 6),
        "only B right": pytest.approx(1 / 6),
        "both wrong": pytest.approx(2 / 6),
        "of B's errors at most one class from A": pytest.approx(3 / 4),
    }
    (axes,) = figure_of(figure_item(both, "note")).axes
    assert axes.get_ylabel() == "decided by A"
    assert np.allclose(axes.images[0].get_array()[1], [0, 0.5, 0.5, 0, 0])  # where A says 1, B says 1 and 2


def test_without_disagreement_there_are_no_shares_of_it() -> None:
    same = pair(SST, np.array([0, 1]), classes(0, 1), classes(0, 1))
    row = by_column(decisions_item([same]))
    assert row["they differ"] == 0 and row["of these off by one class"] is None
    assert row["of B's errors at most one class from A"] is None
    assert isinstance(disagreements_item(same), str)


def test_the_largest_disagreements_come_first() -> None:
    """They are ordered by the classes between the two decisions, then by the distance of the probabilities."""
    labels = np.array([0, 1, 2, 3])
    a, b = classes(0, 1, 2, 3), classes(4, 2, 3, 3)
    b[2] = [0, 0, 0, 1, 0]  # surer than example 1
    assert rows_of(disagreements_item(pair(SST, labels, a, b))) == [
        ["sentence 0", 0, 0, 4], ["sentence 2", 2, 2, 3], ["sentence 1", 1, 1, 2]]  # fmt: skip
    binary = pair(PARA, labels % 2, np.array([0.4, 0.9, 0.6, 0.2]), np.array([0.6, 0.1, 0.9, 0.3]))
    assert rows_of(disagreements_item(binary)) == [
        ["sentence1 1", "sentence2 1", 1, 1, 0], ["sentence1 0", "sentence2 0", 0, 0, 1]]  # fmt: skip


def test_similarities_are_compared_on_the_labels_scale() -> None:
    """A model with the Pearson loss has another scale than one with squared errors. That is no disagreement."""
    labels = (rng(0).random(100) * 5).astype(np.float32)
    a = labels + rng(1).normal(size=100)
    same = pair(STS, labels, a, 0.01 * a - 3)
    assert by_column(similarities_item([same]))["mean difference"] == pytest.approx(0, abs=1e-9)
    b = labels + rng(2).normal(size=100)
    both = pair(STS, labels, a, b)
    fitted_a, fitted_b = (fit.slope * x + fit.intercept for x in (a, b) for fit in [linregress(x, labels)])
    distance = np.abs(fitted_a - fitted_b)
    row = by_column(similarities_item([both]))
    assert row["mean difference"] == pytest.approx(distance.mean())
    assert row["more than 0.5 apart"] == (distance > 0.5).mean()
    assert row["r of A and B"] == pytest.approx(pearsonr(a, b).statistic)
    wanted = [f"sentence1 {i}" for i in np.argsort(-distance)[:SHOWN_EXAMPLES]]
    assert [row[0] for row in rows_of(disagreements_item(both))] == wanted


def test_scores_and_their_tests() -> None:
    labels = rng(0).integers(0, 5, 60)
    a, b = classes(*labels), classes(*np.where(np.arange(60) < 20, (labels + 1) % 5, labels))
    row = by_column(scores_item([pair(SST, labels, a, b)]))
    assert (row["A"], row["B"], row["B - A"]) == pytest.approx((1, 2 / 3, -1 / 3))
    assert row["p"] == pytest.approx(binomtest(20, 20).pvalue) and row["test"] == "McNemar, exact"
    assert -0.46 < row["95% from"] < row["B - A"] < row["to"] < -0.21
    similar = rng(0).random(60).astype(np.float32)
    row = by_column(scores_item([pair(STS, similar, similar + rng(1).random(60), similar * 2)]))
    assert row["test"] == "paired bootstrap" and row["p"] < 0.01 and row["B"] == pytest.approx(1)
    row = by_column(scores_item([pair(STS, similar, -similar, similar)]))
    assert (row["A"], row["B - A"]) == pytest.approx((-1, 2))  # which a fit to the labels would hide


def compare(a: Path, b: Path, *words: object) -> None:
    report.main([str(word) for word in ("--compare", a / "best.pt", b / "best.pt", "--threads", 1, *words)])


def test_the_script(finished_runs: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    compare(finished_runs / "yin", finished_runs / "cross", "--data_dir", small_data, "--out", out)
    assert capsys.readouterr().out.splitlines()[-2:] == [str(out / "comparison.html"), str(out / "comparison.md")]
    page = read_page(out, "comparison")
    assert {path.stem for path in out.glob("*.png")} == {f"comparison-{name}" for name in TRAINED}
    saved = [json.loads((finished_runs / name / "scores.json").read_text())["dev"] for name in ("yin", "cross")]
    rows = list(csv.DictReader((out / "comparison-scores.csv").open()))
    for row, (name, task) in zip(rows, TRAINED.items(), strict=True):
        wanted = [scores[name][task.metric] for scores in saved]
        assert [float(row["A"]), float(row["B"])] == pytest.approx(wanted, abs=1e-6) and row["task"] == task.title
    assert len(list(csv.DictReader((out / "comparison-decisions.csv").open()))) == 2
    dev = read_examples(small_data / "sts-dev.csv", STS, "dev", BadRows(0, print))
    shown = list(csv.DictReader((out / "comparison-sts-worst.csv").open()))
    assert {row["sentence1"] for row in shown} == set(dev.texts[0]) and all(text in page.text for text in dev.texts[1])


def test_only_shared_tasks_are_compared(
    finished_runs: Path, small_data: Path, tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(finished_runs / "yin", finished_runs / "sst", "--data_dir", small_data, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "STS similarity: left out, because only one of the two was trained on it" in printed
    assert [row["task"] for row in csv.DictReader((tmp_path / "comparison-scores.csv").open())] == ["SST sentiment"]
    flags = ["--train_sts", "--epochs", "1", "--no_tensorboard", "--no_test_predictions"]
    multitask_classifier.main([*tiny_flags, *flags, "--run_dir", str(tmp_path / "sts")])
    assert "have no task in common" in refusal(
        compare, tmp_path / "sts", finished_runs / "sst", "--data_dir", small_data
    )


def test_mistakes_are_one_line(finished_runs: Path, tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_text("nothing")
    for a, b, wanted in (
        (tmp_path, finished_runs / "yin", "best.pt: not a readable checkpoint"),
        (finished_runs / "yin", tmp_path / "no", "best.pt: no such checkpoint"),
        (finished_runs / "yin", finished_runs / "yin", "there is no dev file of SST"),
    ):
        assert wanted in refusal(compare, a, b, "--data_dir", tmp_path, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()

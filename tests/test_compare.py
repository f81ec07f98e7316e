"""report.py --compare: where two checkpoints disagree, against numbers made from their own predictions."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, linregress, pearsonr
from test_report import page_of

import multitask_classifier
import report
from datasets import BadRows, Examples, read_examples
from evaluation.metrics import confusion
from reporting.compare import WORST, classes_piece, figure_piece, gaps_piece, pair_of, scores_piece, worst_piece
from reporting.page import Piece
from tasks import PARA, SST, STS, TASKS, Task
from utils.errors import UserError

rng = np.random.default_rng
TRAINED = {name: task for name, task in TASKS.items() if task.by_default}


def examples(task: Task, labels: np.ndarray) -> Examples:
    """Examples of a task with these labels; their texts are numbered."""
    ids = [f"id{i}" for i in range(len(labels))]
    texts = tuple([f"{column} {i}" for i in range(len(labels))] for column in task.text_columns)
    return Examples(task, "dev", Path("dev.csv"), ids, texts, labels)


def named(piece: Piece, row: int = 0) -> dict[str, Any]:
    """A row of a piece's table by column."""
    assert piece.table is not None
    return dict(zip([column.name for column in piece.table.columns], piece.table.rows[row], strict=True))


def classes(*decided: int) -> np.ndarray:
    """Probabilities [N, 5] that decide so, .6 against .1."""
    return 0.5 * np.eye(5)[list(decided)] + 0.1


def test_rates_of_disagreement_by_hand() -> None:
    labels = np.array([0, 1, 2, 3, 4, 0])
    pair = pair_of(examples(SST, labels), classes(0, 1, 2, 4, 0, 1), classes(0, 2, 4, 3, 1, 1))
    assert named(classes_piece([pair])) == {
        "task": "SST sentiment",
        "they differ": pytest.approx(4 / 6),
        "of these off by one class": pytest.approx(3 / 4),  # 1-2, 4-3, 0-1; not 2-4
        "both right": pytest.approx(1 / 6),
        "only A right": pytest.approx(2 / 6),
        "only B right": pytest.approx(1 / 6),
        "both wrong": pytest.approx(2 / 6),
        "of B's errors at most one class from A": pytest.approx(3 / 4),
    }
    counts = confusion(SST, pair.b, pair.a)
    assert counts[1].tolist() == [0, 1, 1, 0, 0]  # A says 1 twice: B 2 and 1
    figure = figure_piece(pair, "note").figure
    assert figure is not None and figure.axes[0].get_ylabel() == "decided by A"
    assert np.allclose(figure.axes[0].images[0].get_array()[1], [0, 0.5, 0.5, 0, 0])


def test_without_disagreement_there_are_no_shares_of_it() -> None:
    pair = pair_of(examples(SST, np.array([0, 1])), classes(0, 1), classes(0, 1))
    row = named(classes_piece([pair]))
    assert row["they differ"] == 0 and row["of these off by one class"] is None
    assert row["of B's errors at most one class from A"] is None
    assert isinstance(worst_piece(pair), str)


def test_the_worst_examples_come_first() -> None:
    """By classes between the two decisions, then by the distance of the probabilities."""
    labels = np.array([0, 1, 2, 3])
    a, b = classes(0, 1, 2, 3), classes(4, 2, 3, 3)
    b[2] = [0, 0, 0, 1, 0]  # surer than example 1
    piece = worst_piece(pair_of(examples(SST, labels), a, b))
    assert isinstance(piece, Piece) and piece.table is not None
    assert [list(row) for row in piece.table.rows] == [
        ["sentence 0", 0, 0, 4], ["sentence 2", 2, 2, 3], ["sentence 1", 1, 1, 2]]  # fmt: skip
    binary = worst_piece(
        pair_of(examples(PARA, labels % 2), np.array([0.4, 0.9, 0.6, 0.2]), np.array([0.6, 0.1, 0.9, 0.3]))
    )
    assert isinstance(binary, Piece) and binary.table is not None
    assert [list(row) for row in binary.table.rows] == [
        ["sentence1 1", "sentence2 1", 1, 1, 0], ["sentence1 0", "sentence2 0", 0, 0, 1]]  # fmt: skip


def test_similarities_are_compared_on_the_labels_scale() -> None:
    """A model with the Pearson loss has another scale than one with squared errors: that is no disagreement."""
    labels = (rng(0).random(100) * 5).astype(np.float32)
    a = labels + rng(1).normal(size=100)
    same = pair_of(examples(STS, labels), a, 0.01 * a - 3)
    assert named(gaps_piece([same]))["mean difference"] == pytest.approx(0, abs=1e-9)
    b = labels + rng(2).normal(size=100)
    pair = pair_of(examples(STS, labels), a, b)
    fits = [linregress(own, labels) for own in (a, b)]
    gap = np.abs(np.subtract(*(fit.slope * own + fit.intercept for fit, own in zip(fits, (a, b), strict=True))))
    row = named(gaps_piece([pair]))
    assert row["mean difference"] == pytest.approx(gap.mean()) and row["more than 0.5 apart"] == (gap > 0.5).mean()
    assert row["r of A and B"] == pytest.approx(pearsonr(a, b).statistic)
    piece = worst_piece(pair)
    assert isinstance(piece, Piece) and piece.table is not None and len(piece.table.rows) == WORST
    assert [row[0] for row in piece.table.rows] == [f"sentence1 {i}" for i in np.argsort(-gap)[:WORST]]


def test_scores_and_their_tests() -> None:
    labels = rng(0).integers(0, 5, 60)
    a, b = classes(*labels), classes(*np.where(np.arange(60) < 20, (labels + 1) % 5, labels))
    row = named(scores_piece([pair_of(examples(SST, labels), a, b)]))
    assert (row["A"], row["B"], row["B - A"]) == pytest.approx((1, 2 / 3, -1 / 3))
    assert row["p"] == pytest.approx(binomtest(20, 20).pvalue) and row["test"] == "McNemar, exact"
    assert -0.46 < row["95% from"] < row["B - A"] < row["to"] < -0.21
    similar = rng(0).random(60).astype(np.float32)
    own = named(scores_piece([pair_of(examples(STS, similar), similar + rng(1).random(60), similar * 2)]))
    assert own["test"] == "paired bootstrap" and own["p"] < 0.01 and own["B"] == pytest.approx(1)
    against = named(scores_piece([pair_of(examples(STS, similar), -similar, similar)]))
    assert (against["A"], against["B - A"]) == pytest.approx((-1, 2))  # what a best line would hide


# ---------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """A folder with finished runs `yin`, `cross` (both of all tasks) and `sst`, `sts` (one task)."""
    folder = tmp_path_factory.mktemp("members")
    flags = [*tiny_flags, "--no_tensorboard", "--no_test_predictions", "--epochs", "1"]
    kinds = {"yin": [], "cross": ["--arch", "v2", "--seed", "5"], "sst": ["--train_sst"], "sts": ["--train_sts"]}
    for name, more in kinds.items():
        multitask_classifier.main([*flags, *more, "--run_dir", str(folder / name)])
    return folder


def compare(members: Path, a: str, b: str, *words: object) -> None:
    """report.py --compare of two of the members."""
    paths = (members / name / "best.pt" for name in (a, b))
    report.main([str(word) for word in ("--compare", *paths, "--threads", 1, *words)])


def test_the_script(members: Path, small_data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    compare(members, "yin", "cross", "--data_dir", small_data, "--out", out)
    assert capsys.readouterr().out.splitlines()[-2:] == [str(out / "comparison.html"), str(out / "comparison.md")]
    page = page_of(out, "comparison")
    assert {path.stem for path in out.glob("*.png")} == {f"comparison-{name}" for name in TRAINED}
    saved = {name: json.loads((members / name / "scores.json").read_text())["dev"] for name in ("yin", "cross")}
    rows = list(csv.DictReader((out / "comparison-scores.csv").open()))
    for row, (name, task) in zip(rows, TRAINED.items(), strict=True):
        wanted = [saved[member][name][task.metric] for member in ("yin", "cross")]
        assert [float(row["A"]), float(row["B"])] == pytest.approx(wanted, abs=1e-6) and row["task"] == task.title
    assert len(list(csv.DictReader((out / "comparison-decisions.csv").open()))) == 2
    dev = read_examples(small_data / "sts-dev.csv", STS, "dev", BadRows(0, print))
    worst = list(csv.DictReader((out / "comparison-sts-worst.csv").open()))
    assert {row["sentence1"] for row in worst} == set(dev.texts[0]) and all(text in page.text for text in dev.texts[1])


def test_only_shared_tasks_are_compared(members: Path, small_data: Path, tmp_path: Path, capsys: Any) -> None:
    compare(members, "yin", "sst", "--data_dir", small_data, "--out", tmp_path)
    said = capsys.readouterr().out
    assert "STS similarity: left out, since only one of the two was trained on it" in said
    assert [row["task"] for row in csv.DictReader((tmp_path / "comparison-scores.csv").open())] == ["SST sentiment"]
    with pytest.raises(UserError, match="have no task in common"):
        compare(members, "sts", "sst", "--data_dir", small_data, "--out", tmp_path)


def test_mistakes_are_one_line(members: Path, small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("nothing")
    for words, wanted in (
        (("--compare", tmp_path / "x.pt", members / "yin" / "best.pt"), "x.pt: not a readable checkpoint"),
        (("--compare", members / "yin" / "best.pt", tmp_path / "no.pt"), "no.pt: no such checkpoint"),
        (("--compare", *[members / "yin" / "best.pt"] * 2, "--data_dir", tmp_path), "there is no dev file of SST"),
    ):
        with pytest.raises(UserError, match=wanted) as error:
            report.main([*map(str, words), "--out", str(tmp_path / "out")])
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

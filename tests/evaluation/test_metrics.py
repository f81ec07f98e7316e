"""Scores against scikit-learn and scipy, and prediction files to the byte."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score

from datasets import Examples
from evaluation.metrics import correlation, decide, overall, primary, probabilities, score_task
from evaluation.prediction_files import score_and_write, write_predictions
from tasks import DEFAULT_TASKS, PARA, SST, STS

rng = np.random.default_rng


def test_scores_of_labels_equal_scikit_learn() -> None:
    values = softmax(rng(0).normal(size=(200, 5)), axis=1)
    labels = rng(1).integers(0, 4, 200)  # the fifth class is never right
    decided = values.argmax(axis=1)
    accuracy = accuracy_score(labels, decided)
    assert score_task(SST, values, labels) == {
        "accuracy": accuracy,
        "f1": f1_score(labels, decided, average="macro"),
    }
    values, labels = rng(0).random(200), rng(1).integers(0, 2, 200)
    decided = (values > 0.5).astype(int)
    accuracy = accuracy_score(labels, decided)
    assert score_task(PARA, values, labels) == {"accuracy": accuracy, "f1": f1_score(labels, decided)}
    nameless = replace(SST, name="cfimdb", label_names=(), label_range=(0, 1))
    assert score_task(nameless, np.array([[0.2, 0.8], [0.7, 0.3]]), np.array([1, 1]))["accuracy"] == 0.5
    with pytest.raises(AssertionError, match="sst"):
        score_task(SST, np.eye(5), None)


def test_scores_of_similarities_equal_scipy() -> None:
    labels = np.round(rng(0).random(200) * 5, 1).astype(np.float32)  # with ties
    values = (labels + rng(1).normal(size=200)).astype(np.float32)
    scores = score_task(STS, values, labels)
    assert list(scores) == ["pearson", "spearman"]
    assert scores["pearson"] == pytest.approx(pearsonr(values.astype(float), labels.astype(float)).statistic, abs=1e-12)
    assert scores["spearman"] == pytest.approx(spearmanr(values, labels).statistic, abs=1e-12)
    a, b = rng(0).normal(size=500), rng(1).normal(size=500)
    assert correlation(a + 1e6, b) == pytest.approx(pearsonr(a, b).statistic, abs=1e-8)  # beside a large mean


def test_scores_of_nothing_are_zero_and_silent(recwarn: pytest.WarningsRecorder) -> None:
    assert score_task(PARA, np.zeros(4), np.zeros(4, np.int64)) == {"accuracy": 1.0, "f1": 0.0}
    constant = score_task(STS, np.full(7, 0.1, np.float32), rng(0).random(7))
    assert constant == {"pearson": pytest.approx(0.0, abs=1e-9), "spearman": 0.0}
    assert correlation(np.zeros(5), np.arange(5.0)) == 0.0
    assert len(recwarn) == 0


def test_probabilities_and_decisions() -> None:
    logits = rng(0).normal(size=(9, 5)).astype(np.float32) * 5
    assert np.abs(probabilities(SST, logits) - softmax(logits, axis=1)).max() < 1e-6
    assert np.abs(probabilities(PARA, logits[:, 0]) - expit(logits[:, 0])).max() < 1e-6
    assert np.array_equal(probabilities(STS, logits[:, 0]), logits[:, 0])
    assert probabilities(SST, logits).dtype == np.float32
    assert decide(PARA, np.array([0.49999, 0.5, 0.50001])).tolist() == [0, 1, 1]
    assert decide(SST, np.array([[0.1, 0.4, 0.4, 0.1, 0.0]])).tolist() == [1]
    assert decide(STS, np.array([-0.3, 7.5])).tolist() == [-0.3, 7.5]  # similarities are never clipped or rounded


def test_overall_by_hand() -> None:
    by_task = {
        "sst": {"accuracy": 0.5, "f1": 0.1},
        "para": {"accuracy": 0.8, "f1": 0.2},
        "sts": {"pearson": 0.4, "spearman": 0.3},
    }
    scores = overall(DEFAULT_TASKS, by_task)
    assert scores["score"] == pytest.approx((0.5 + 0.8 + 0.7) / 3, abs=1e-15)  # (1 + 0.4) / 2 = 0.7
    assert scores["score_raw_r"] == pytest.approx((0.5 + 0.8 + 0.4) / 3, abs=1e-15)
    assert {name: scores[name] for name in DEFAULT_TASKS} == by_task and len(scores) == 5
    assert [primary(DEFAULT_TASKS[name], by_task[name]) for name in DEFAULT_TASKS] == [0.5, 0.8, 0.4]
    assert overall(DEFAULT_TASKS, {"sts": by_task["sts"]})["score"] == pytest.approx(0.7)
    # R0 prints .551, .881 and r .853 of Steady Hand on test, and .786 over all tasks.
    printed = {"sst": {"accuracy": 0.551}, "para": {"accuracy": 0.881}, "sts": {"pearson": 0.853}}
    assert round(overall(DEFAULT_TASKS, printed)["score"], 3) == 0.786


def test_prediction_files_to_the_byte(tmp_path: Path) -> None:
    write_predictions(tmp_path / "deep" / "sst.csv", SST, ["a1", "b2"], np.eye(5)[[3, 0]])
    write_predictions(tmp_path / "para.csv", PARA, ["a1", "b2", "c3"], np.array([0.5, 0.49, 0.51]))
    write_predictions(tmp_path / "sts.csv", STS, ["a1", "b2"], np.array([4.25, -0.5], np.float32))
    assert (tmp_path / "deep" / "sst.csv").read_bytes() == b"id \t Predicted_Sentiment \na1 , 3 \nb2 , 0 \n"
    assert (tmp_path / "para.csv").read_bytes() == b"id \t Predicted_Is_Paraphrase \na1 , 1 \nb2 , 0 \nc3 , 1 \n"
    assert (tmp_path / "sts.csv").read_bytes() == b"id \t Predicted_Similiary \na1 , 4.25 \nb2 , -0.5 \n"
    values = rng(0).normal(size=50)
    write_predictions(tmp_path / "sts.csv", STS, [str(i) for i in range(50)], values)
    rows = (tmp_path / "sts.csv").read_text().splitlines()[1:]
    assert [float(row.split(" , ")[1]) for row in rows] == values.tolist()  # no digit is lost
    with pytest.raises(ValueError, match="zip"):
        write_predictions(tmp_path / "x.csv", PARA, ["a"], np.array([0.1, 0.2]))


def test_both_splits_are_written_and_dev_is_scored(tmp_path: Path) -> None:
    def examples(split: str, labels: np.ndarray | None) -> dict[str, Examples]:
        return {"para": Examples(PARA, split, tmp_path, ["i", "j"], (["a", "b"], ["c", "d"]), labels)}

    values = {("dev", "para"): np.array([0.9, 0.8]), ("test", "para"): np.array([0.1, 0.7])}
    splits = {"dev": examples("dev", np.array([1, 0])), "test": examples("test", None)}
    scores = score_and_write({"para": PARA}, values, splits, tmp_path)
    assert scores == {"para": {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}, "score": 0.5, "score_raw_r": 0.5}
    folder = tmp_path / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == ["para-dev-output.csv", "para-test-output.csv"]
    assert (folder / "para-dev-output.csv").read_text().splitlines()[1:] == ["i , 1 ", "j , 1 "]
    assert (folder / "para-test-output.csv").read_text().splitlines()[1:] == ["i , 0 ", "j , 1 "]

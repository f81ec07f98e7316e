"""A task is a row of the table: one more row trains, is evaluated and predicts without another word."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import FILMS, metrics, write_films

import multitask_classifier
from tasks import TASKS


@pytest.mark.parametrize("kind", ["classes", "binary", "similarity"])
def test_a_further_task_is_one_row(
    tiny_flags: list[str], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], kind: Any,
) -> None:  # fmt: skip
    losses = {"classes": ("ce", "bce"), "binary": ("bce",), "similarity": ("mse", "pearson")}[kind]
    monkeypatch.setitem(TASKS, "films", replace(FILMS, kind=kind, losses=losses))
    data, run = shutil.copytree(small_data, tmp_path / "data"), tmp_path / "run"
    write_films(data, "films")
    flags = [*tiny_flags, "--data_dir", str(data), "--run_dir", str(run), "--train_sst", "--train_movies"]
    multitask_classifier.main([*flags, "--num_movies_trains", "2"])
    line = metrics(run)[-1]
    assert list(line["train"]) == ["sst", "films"] and line["train"]["films"]["steps"] == 4
    scores = json.loads((run / "scores.json").read_text())["dev"]
    assert set(scores) == {"sst", "films", "score", "score_raw_r"}
    assert set(scores["films"]) == ({"pearson", "spearman"} if kind == "similarity" else {"accuracy", "f1"})
    header, *rows = (run / "predictions" / "films-test-output.csv").read_text().splitlines()
    assert header == "id \t Predicted_Sentiment "
    assert [row.split(" , ")[0] for row in rows] == [f"film{i}" for i in range(4)]
    multitask_classifier.main(["--evaluate", str(run / "best.pt"), "--data_dir", str(data)])
    assert json.loads((run / "best-evaluation" / "scores.json").read_text())["dev"] == scores
    capsys.readouterr()
    (tmp_path / "sentences.txt").write_text("The film is dull .\n", encoding="utf-8")
    words = ["--predict", str(tmp_path / "sentences.txt"), "--task", "movies"]
    multitask_classifier.main(["--evaluate", str(run / "best.pt"), *words])
    assert capsys.readouterr().out.rstrip("\n").endswith("The film is dull .")

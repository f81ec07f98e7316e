"""CFIMDB, the fourth row of the task table: it trains only when it is asked for, and then as any other task."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SAMPLE, cut
from test_config import configure
from test_multitask_bert import TINY, make_texts
from test_training import make_trainer, metrics, write_films

import ensemble
import multitask_classifier
from config import ModelOptions
from datasets import BadRows, read_examples
from models.multitask_bert import MultitaskBERT
from tasks import CFIMDB, DEFAULT_TASKS, SST, TASKS
from text.packing import pack_padded


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Small data of all four tasks."""
    folder = cut(tmp_path / "data", 20)
    write_films(folder, "ids-cfimdb")
    return folder


def scores(run: Path) -> dict[str, Any]:
    return json.loads((run / "scores.json").read_text())["dev"]


def test_it_trains_only_when_it_is_asked_for() -> None:
    assert list(TASKS) == ["sst", "para", "sts", "cfimdb"] and list(DEFAULT_TASKS) == ["sst", "para", "sts"]
    assert list(configure().tasks) == list(configure("--cfimdb_lr_multiplier", 2).tasks) == list(DEFAULT_TASKS)
    assert list(configure("--train_cfimdb").tasks) == ["cfimdb"]
    own = configure("--train_sst", "--train_cfimdb").tasks
    assert list(own) == ["sst", "cfimdb"]
    for name in ("lr_multiplier", "weight_decay", "loss"):
        assert getattr(own["cfimdb"], name) == getattr(own["sst"], name)


def test_a_run_by_default_knows_nothing_of_it(tiny_flags: list[str], tmp_path: Path) -> None:
    """Its files are not even looked for."""
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    assert list(trainer.train_data) == list(trainer.dev_data) == list(trainer.model.heads) == list(DEFAULT_TASKS)


@pytest.mark.parametrize(
    ("backbones", "name"), [("shared", "shared"), ("sentiment-similarity", "sentiment"), ("per-task", "cfimdb")]
)
def test_sentiments_backbone_and_head_serve_it(backbones: str, name: str) -> None:
    model = MultitaskBERT(ModelOptions(backbones=backbones).resolved(), TINY, TASKS).eval()
    assert model.backbone_of["cfimdb"] == name
    assert (model.backbone("cfimdb") is model.backbone("sst")) == (backbones != "per-task")
    assert model("cfimdb", pack_padded(*make_texts(0, 4))).shape == (4, 2)
    own, sst = (model.heads[task].state_dict() for task in ("cfimdb", "sst"))
    assert own.keys() == sst.keys()
    assert [key for key in own if own[key].shape != sst[key].shape] == list(own)[-2:]  # two classes, not five


def test_files_of_the_course_are_read(tmp_path: Path) -> None:
    """The test file's header begins with a 0 and has no label column; labels are whole numbers."""
    (tmp_path / "train.csv").write_text('\tid\tsentence\tsentiment\n0\ta\t dull . \t0\n1\tb\t"a ""fine"" one"\t1\n')
    (tmp_path / "test.csv").write_text("0\t\tid\tsentence\n1\t0.0\tc\t long ago .\n")
    bad_rows = BadRows(0, print)
    train = read_examples(tmp_path / "train.csv", CFIMDB, "train", bad_rows)
    assert train.labels is not None and train.labels.tolist() == [0, 1] and train.texts == (["dull .", 'a "fine" one'],)
    test = read_examples(tmp_path / "test.csv", CFIMDB, "test", bad_rows)
    assert (test.ids, test.texts, test.labels) == (["c"], (["long ago ."],), None) and bad_rows.count == 0


def test_the_score_counts_it_only_where_it_is_trained(tiny_flags: list[str], data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*tiny_flags, "--data_dir", str(data), "--no_tensorboard", "--routine", "annealed", "--epochs", "1"]
    multitask_classifier.main([*flags, *(f"--train_{name}" for name in TASKS), "--run_dir", str(run)])
    dev = scores(run)
    assert set(dev) == {*TASKS, "score", "score_raw_r"}
    wanted = [
        dev["sst"]["accuracy"],
        dev["para"]["accuracy"],
        (1 + dev["sts"]["pearson"]) / 2,
        dev["cfimdb"]["accuracy"],
    ]
    assert dev["score"] == pytest.approx(np.mean(wanted))
    assert {path.name for path in (run / "predictions").glob("cfimdb-*")} == {
        "cfimdb-dev-output.csv",
        "cfimdb-test-output.csv",
    }
    multitask_classifier.main([*flags, "--run_dir", str(tmp_path / "three")])
    assert set(scores(tmp_path / "three")) == {*DEFAULT_TASKS, "score", "score_raw_r"}


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("arch", ["yin-yang", "v2", "r4"])
def test_each_task_trains_alone(tiny_flags: list[str], data: Path, tmp_path: Path, name: str, arch: str) -> None:
    flags = ["--data_dir", data, f"--train_{name}", "--arch", arch, "--fine_tune_mode", "full-model", "--epochs", 1]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    before = {key: own.clone() for key, own in trainer.model.named_parameters()}
    found = trainer.fit()
    assert set(found) == {name, "score", "score_raw_r"} and list(metrics(tmp_path / "run")[0]["train"]) == [name]
    assert list(trainer.model.heads) == [name] and len(trainer.model.backbones) == 1
    moved = {key for key, own in trainer.model.named_parameters() if not torch.equal(own, before[key])}
    reached = {id(p) for p in trainer.model.task_parameters(name)}
    assert {key for key in before if key.startswith("heads.")} <= moved
    assert {key.split(".")[0] for key in moved} >= {"backbones"}
    assert {id(p) for p in trainer.model.parameters()} == reached


def test_an_ensemble_scores_it_among_the_members_that_know_it(
    tiny_flags: list[str], data: Path, tmp_path: Path
) -> None:
    flags = [*tiny_flags, "--data_dir", str(data), "--no_tensorboard", "--epochs", "1"]
    members = {
        "both": ["--train_sst", "--train_cfimdb"],
        "one": ["--train_cfimdb", "--seed", "3"],
        "sst": ["--train_sst"],
    }
    for name, more in members.items():
        multitask_classifier.main([*flags, *more, "--run_dir", str(tmp_path / name)])
    names = [str(tmp_path / name / "best.pt") for name in members]
    place = ["--run_dir", str(tmp_path / "e"), "--cache", str(tmp_path / "cache"), "--threads", "1"]
    ensemble.main([*names, "--data_dir", str(data), *place])
    found = json.loads((tmp_path / "e" / "scores.json").read_text())
    assert set(found["dev"]) == {"sst", "cfimdb", "score", "score_raw_r"}
    assert set(found["members"][names[2]]) == {"sst", "score", "score_raw_r"}
    rows = (tmp_path / "e" / "predictions" / "cfimdb-test-output.csv").read_text().splitlines()
    assert rows[0] == "id \t Predicted_Sentiment " and len(rows) == 5


def test_long_reviews_are_cut_and_counted(tiny_flags: list[str], data: Path, tmp_path: Path, capsys: Any) -> None:
    path = data / CFIMDB.files["train"]
    long = " ".join(["dull"] * 300)
    path.write_text(path.read_text() + f"10\tlong1\t{long}\t0\n11\tlong2\t{long} film\t1\n", encoding="utf-8")
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--data_dir", data, "--train_cfimdb")
    assert "truncated 2 sequences to 64 tokens (--max_length)" in capsys.readouterr().out
    assert trainer.train_data["cfimdb"].lengths.max() == 64 and len(trainer.train_data["cfimdb"]) == 12


def test_a_missing_file_is_named(tiny_flags: list[str], tmp_path: Path) -> None:
    from test_scripts import refusal

    message = refusal(lambda: make_trainer(tiny_flags, tmp_path / "run", "--data_dir", SAMPLE, "--train_cfimdb"))
    assert "ids-cfimdb-train.csv" in message and "--cfimdb_train" in message


def test_it_still_serves_as_further_data_of_sst(tiny_flags: list[str], data: Path, tmp_path: Path) -> None:
    """As in R1: its labels become the ends of SST's scale."""
    extra = ["--sst_extra", data / CFIMDB.files["train"]]
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--data_dir", data, "--train_sst", *extra)
    labels = trainer.train_data["sst"].labels(np.arange(20, 30))
    assert labels.tolist() == [0, 4] * 5 and SST.num_outputs == 5

"""A fourth row of the task table, CFIMDB: it trains only when it is named, and then like any other task."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import cut, make_trainer, metrics, output, read_json, refusal, write_films

import ensemble
import multitask_classifier
from config import BertConfig, ModelOptions
from datasets import BadRows, read_examples
from models.multitask_bert import MultitaskBERT
from tasks import CFIMDB, DEFAULT_TASKS, SST, TASKS, task_by_alias
from text.packing import pack


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Small data of all four tasks."""
    folder = cut(tmp_path / "data", 20)
    write_films(folder, "ids-cfimdb")
    return folder


def test_tasks_by_name_and_alias() -> None:
    assert list(TASKS) == ["sst", "para", "sts", "cfimdb"] and list(DEFAULT_TASKS) == ["sst", "para", "sts"]
    assert task_by_alias(TASKS) == {"sst": "sst", "para": "para", "quora": "para", "sts": "sts", "cfimdb": "cfimdb"}
    for name in ("lr_multiplier", "weight_decay", "backbone"):
        assert getattr(CFIMDB, name) == getattr(SST, name)


@pytest.mark.parametrize(
    ("backbones", "name"), [("shared", "shared"), ("sentiment-similarity", "sentiment"), ("per-task", "cfimdb")]
)
def test_it_has_the_backbone_and_head_of_sentiments(backbones: str, name: str) -> None:
    shape = BertConfig(50, 12, 2, 2, 16)
    model = MultitaskBERT(ModelOptions(backbones=backbones).resolved(), shape, TASKS).eval()
    assert model.backbone_of["cfimdb"] == name
    assert (model.backbone("cfimdb") is model.backbone("sst")) == (backbones != "per-task")
    lengths = np.array([3, 5, 4, 3])
    assert model("cfimdb", pack(np.arange(1, 16), lengths, lengths)).shape == (4, 2)
    cfimdb, sst = (model.heads[task].state_dict() for task in ("cfimdb", "sst"))
    assert cfimdb.keys() == sst.keys()
    assert [key for key in cfimdb if cfimdb[key].shape != sst[key].shape] == list(cfimdb)[-2:]  # two classes, not five


def test_files_of_the_course_are_read(tmp_path: Path) -> None:
    """The header of the test file begins with a 0 and has no label column; labels are whole numbers."""
    (tmp_path / "train.csv").write_text('\tid\tsentence\tsentiment\n0\ta\t dull . \t0\n1\tb\t"a ""fine"" one"\t1\n')
    (tmp_path / "test.csv").write_text("0\t\tid\tsentence\n1\t0.0\tc\t long ago .\n")
    bad_rows = BadRows(0, print)
    train = read_examples(tmp_path / "train.csv", CFIMDB, "train", bad_rows)
    assert train.labels is not None and train.labels.tolist() == [0, 1] and train.texts == (["dull .", 'a "fine" one'],)
    test = read_examples(tmp_path / "test.csv", CFIMDB, "test", bad_rows)
    assert (test.ids, test.texts, test.labels) == (["c"], (["long ago ."],), None) and bad_rows.count == 0


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("arch", ["yin-yang", "v2", "r4"])
def test_each_task_trains_alone(tiny_flags: list[str], data: Path, tmp_path: Path, name: str, arch: str) -> None:
    flags = ["--data_dir", data, f"--train_{name}", "--arch", arch, "--fine_tune_mode", "full-model", "--epochs", 1]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    before = {key: parameter.clone() for key, parameter in trainer.model.named_parameters()}
    found = trainer.fit()
    assert set(found) == {name, "score", "score_raw_r"} and list(metrics(tmp_path / "run")[0]["train"]) == [name]
    assert list(trainer.model.heads) == [name] and len(trainer.model.backbones) == 1
    moved = {key for key, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[key])}
    assert {key for key in before if key.startswith("heads.")} <= moved
    assert {key.split(".")[0] for key in moved} >= {"backbones"}


def test_the_score_counts_it_only_if_it_is_trained(
    tiny_flags: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*tiny_flags, "--data_dir", data, "--no_tensorboard", "--epochs", 1]
    runs = {
        "all": ["--routine", "annealed", *(f"--train_{name}" for name in TASKS)],
        "three": [],
        "one": ["--train_cfimdb", "--seed", 3],
    }
    dev = {}
    for name, more in runs.items():
        output(capsys, multitask_classifier.main, *flags, *more, "--run_dir", tmp_path / name)
        dev[name] = read_json(tmp_path / name / "scores.json")["dev"]
    assert set(dev["three"]) == {*DEFAULT_TASKS, "score", "score_raw_r"}
    assert set(dev["all"]) == {*TASKS, "score", "score_raw_r"}
    accuracies = [dev["all"][name]["accuracy"] for name in ("sst", "para", "cfimdb")]
    assert dev["all"]["score"] == pytest.approx(np.mean([*accuracies, (1 + dev["all"]["sts"]["pearson"]) / 2]))

    names = [tmp_path / name / "best.pt" for name in runs]
    where = ["--run_dir", tmp_path / "e", "--cache", tmp_path / "cache", "--threads", 1]
    output(capsys, ensemble.main, *names, "--data_dir", data, *where)
    found = read_json(tmp_path / "e" / "scores.json")
    assert set(found["dev"]) == {*TASKS, "score", "score_raw_r"}
    assert set(found["members"][str(names[1])]) == {*DEFAULT_TASKS, "score", "score_raw_r"}
    rows = (tmp_path / "e" / "predictions" / "cfimdb-test-output.csv").read_text().splitlines()
    assert rows[0] == "id \t Predicted_Sentiment " and len(rows) == 5


def test_a_missing_file_is_named(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    message = refusal(make_trainer, tiny_flags, tmp_path / "run", "--data_dir", small_data, "--train_cfimdb")
    assert "ids-cfimdb-train.csv" in message and "--cfimdb_train" in message

"""The scripts as people run them: what a run leaves behind, ensembles, predictions, and one line for each mistake."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import cut, fill, make_bert, make_trainer, small_disk

import ensemble
import multitask_classifier
from models.checkpoint import load, load_model, save
from tasks import DEFAULT_TASKS
from training.logger import Logger
from utils.errors import UserError
from utils.files import write_atomically, write_text

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """A folder with finished runs `yin` (all tasks, TensorBoard), `cross` (another arch) and `sst` (one task)."""
    folder = tmp_path_factory.mktemp("runs")
    yin = [*tiny_flags, "--run_dir", folder / "yin", "--filepath", folder / "named" / "g6-yin-yang.pt"]
    multitask_classifier.main([str(word) for word in [*yin, "--routine", "interleave", "--epochs", 4]])
    for name, more in {"cross": ["--arch", "v2", "--seed", "5"], "sst": ["--train_sst"]}.items():
        multitask_classifier.main([*tiny_flags, *more, "--no_tensorboard", "--run_dir", str(folder / name)])
    return folder


@pytest.fixture
def train(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """multitask_classifier.main with the flags of a tiny run and more; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: _output(capsys, multitask_classifier.main, [*tiny_flags, *words])


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """multitask_classifier.main with the given flags alone."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: _output(capsys, multitask_classifier.main, words)


@pytest.fixture
def combine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, small_data: Path) -> Run:
    """ensemble.main on the small data."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: _output(capsys, ensemble.main, [*words, "--data_dir", small_data, "--threads", 1])


def _output(capsys: Any, main: Callable[[list[str]], None], words: Any) -> str:
    capsys.readouterr()
    main([str(word) for word in words])
    return str(capsys.readouterr().out)


def refusal(run: Run, *words: object) -> str:
    """The one line of the UserError that a script ends in."""
    with pytest.raises(UserError) as error:
        run(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def shell(
    name: str, *words: object, stdin: str | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A script as a process of its own."""
    return subprocess.run(
        [sys.executable, ROOT / name, *map(str, words)], capture_output=True, text=True, input=stdin, timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=cwd,
    )  # fmt: skip


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def ids(path: Path) -> list[str]:
    """The ids of a data file, read without our own reader."""
    header, *rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [row[header.index("id")] for row in rows]


# --------------------------------------------------------------------------------------------- what a run leaves behind


def test_files_of_a_run(runs: Path) -> None:
    assert sorted(os.listdir(runs / "yin")) == [
        ".lock", "best.pt", "config.json", "metrics.jsonl", "predictions", "scores.json", "tensorboard", "timing.jsonl",
    ]  # fmt: skip
    assert sorted(os.listdir(runs / "sst")) == [
        ".lock", "best.pt", "config.json", "metrics.jsonl", "predictions", "scores.json", "timing.jsonl",
    ]  # fmt: skip
    for name, epochs in (("yin", 4), ("sst", 2)):
        for file in ("metrics.jsonl", "timing.jsonl"):
            lines = [json.loads(line) for line in (runs / name / file).read_text().splitlines()]
            assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    assert read_json(runs / "yin" / "config.json")["train"]["routine"] == "interleave"
    assert (runs / "named" / "g6-yin-yang.pt").read_bytes() == (runs / "yin" / "best.pt").read_bytes()
    assert os.listdir(runs / "named") == ["g6-yin-yang.pt"]


def test_timing_holds_what_metrics_must_not(runs: Path) -> None:
    timing = json.loads((runs / "yin" / "timing.jsonl").read_text().splitlines()[0])
    assert set(timing) == {
        "epoch", "seconds", "train_seconds", "tokens", "examples_per_second", "peak_memory_bytes", "device",
    }  # fmt: skip
    assert set(timing["train_seconds"]) == set(DEFAULT_TASKS) and timing["peak_memory_bytes"] > 1e7
    assert timing["examples_per_second"] > 1 and timing["seconds"] > 0
    assert re.fullmatch(r"cpu \(.+, \d+ threads\)", timing["device"])
    metrics = [json.loads(line) for line in (runs / "yin" / "metrics.jsonl").read_text().splitlines()]
    assert set(metrics[0]) == {"epoch", "step", "trains", "trainable_parameters", "train", "dev"}
    # iterative unfreezing: the heads alone, then one layer and the pooler, then the other layer
    counts = [line["trainable_parameters"] for line in metrics]
    layer = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 2 * 32
    assert np.diff(counts).tolist() == [2 * (layer + 32 * 32 + 32), 0, 2 * layer]  # in two backbones


def test_scores_have_the_documented_structure(runs: Path) -> None:
    scores = read_json(runs / "yin" / "scores.json")
    assert set(scores) == {"dev", "epoch", "checkpoint"} and scores["checkpoint"] == "best.pt"
    dev = scores["dev"]
    assert {name: set(own) if isinstance(own, dict) else type(own) for name, own in dev.items()} == {
        "sst": {"accuracy", "f1"}, "para": {"accuracy", "f1"}, "sts": {"pearson", "spearman"},
        "score": float, "score_raw_r": float,
    }  # fmt: skip
    accuracy = [dev["sst"]["accuracy"], dev["para"]["accuracy"]]
    r = dev["sts"]["pearson"]
    assert dev["score"] == pytest.approx((sum(accuracy) + (1 + r) / 2) / 3)
    assert dev["score_raw_r"] == pytest.approx((sum(accuracy) + r) / 3)
    lines = [json.loads(line) for line in (runs / "yin" / "metrics.jsonl").read_text().splitlines()]
    assert dev == lines[scores["epoch"] - 1]["dev"]  # the checkpoint that was read back scores as it did
    assert dev["score"] == max(line["dev"]["score"] for line in lines)


def test_predictions_hold_every_id_in_order(runs: Path, small_data: Path) -> None:
    folder = runs / "yin" / "predictions"
    names = {f"{task}-{split}-output.csv" for task in DEFAULT_TASKS for split in ("dev", "test")}
    assert set(os.listdir(folder)) == names
    for task in DEFAULT_TASKS.values():
        for split in ("dev", "test"):
            header, *rows = (folder / f"{task.name}-{split}-output.csv").read_text().splitlines()
            assert header == f"id \t {task.prediction_column} "
            found = [re.fullmatch(r"(\w+) , (-?[\d.e-]+) ", row) for row in rows]
            assert [match and match[1] for match in found] == ids(small_data / task.files[split])
            values = [float(match[2]) for match in found if match]
            assert len(values) == (12 if split == "dev" else 6)
            if task.kind != "similarity":
                assert set(values) <= set(range(task.num_outputs if task.kind == "classes" else 2))


def test_predictions_give_the_scores(runs: Path, small_data: Path) -> None:
    """From the two files alone, as the course's server would score them."""
    dev = read_json(runs / "yin" / "scores.json")["dev"]
    for task in DEFAULT_TASKS.values():
        header, *rows = (line.split("\t") for line in (small_data / task.files["dev"]).read_text().splitlines())
        truth = [float(row[header.index(task.label_column)]) for row in rows]
        path = runs / "yin" / "predictions" / f"{task.name}-dev-output.csv"
        found = [float(row.split(" , ")[1]) for row in path.read_text().splitlines()[1:]]
        if task.kind == "similarity":
            assert np.corrcoef(truth, found)[0, 1] == pytest.approx(dev["sts"]["pearson"], abs=1e-6)
        else:
            assert np.mean(np.equal(truth, found)) == dev[task.name]["accuracy"]


def test_tensorboard_events(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "yin" / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = set(tags["scalars"])
    for task in DEFAULT_TASKS:
        metrics = ("pearson", "spearman") if task == "sts" else ("accuracy", "f1")
        assert {f"{task}/loss", f"{task}/lr", f"{task}/gradient_norm"} <= scalars
        assert {f"{task}/{split}_{metric}" for split in ("dev", "train") for metric in metrics} <= scalars
    assert {"score/dev", "speed/examples_per_second", "memory/peak_gigabytes"} <= scalars
    assert {"hparam/score", "hparam/sst", "hparam/para", "hparam/sts"} <= scalars
    assert set(tags["images"]) == {"sst/confusion", "para/confusion", "sts/residuals"}
    assert len(events.Images("sst/confusion")) == 4
    assert events.Images("sts/residuals")[0].encoded_image_string.startswith(b"\x89PNG")
    assert "config/text_summary" in tags["tensors"]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"routine": "interleave"' in text
    assert "_hparams_/session_start_info" in events.summary_metadata
    lines = [json.loads(line) for line in (runs / "yin" / "metrics.jsonl").read_text().splitlines()]
    points = [(point.step, point.value) for point in events.Scalars("score/dev")]
    assert points == [(line["step"], pytest.approx(line["dev"]["score"])) for line in lines]
    hidden = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    names = (b"train.lr", b"model.arch", b"sst.lr_multiplier", b"lora.lora_mode", b"pal.pal", b"data.max_length")
    assert all(name in hidden for name in names)


@pytest.mark.parametrize("routine", ["sequential", "interleave"])
def test_every_task_has_curves(train: Run, tmp_path: Path, routine: str) -> None:
    """However the tasks follow each other, and however few steps each has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("--run_dir", "run", "--routine", routine, "--train_sst", "--train_quora", "--epochs", 4)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for task in ("sst", "para"):
        assert {f"{task}/loss", f"{task}/lr", f"{task}/gradient_norm"} <= set(events.Tags()["scalars"])


def test_what_is_printed(train: Run, tmp_path: Path) -> None:
    out = train("--run_dir", "run", "--no_tensorboard", "--use_gpu")
    for words in (
        "Epoch 1/2: the heads train",
        "Epoch 2/2",
        "SST sentiment",
        "dev score",
        "best checkpoint run/best.pt",
    ):
        assert words in out
    assert torch.cuda.is_available() or "--use_gpu: there is no cuda or mps device here" in out
    score = read_json(tmp_path / "run" / "scores.json")["dev"]["score"]
    assert f"{score:.4f}" in out.splitlines()[-3]
    assert all(len(line) <= 120 for line in out.splitlines() if "/" not in line)


def test_a_run_without_a_folder_gets_a_name(train: Run, tmp_path: Path) -> None:
    train("--train_sst", "--epochs", 1, "--no_tensorboard", "--arch", "v2")
    train("--train_sst", "--epochs", 1, "--no_tensorboard", "--name", "mine")
    assert [re.sub(r"\d+", "0", name) for name in sorted(os.listdir("runs"))] == ["mine", "v0-0-0"]


def test_a_missing_test_file_is_told_and_no_obstacle(train: Run, small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(small_data, "data")
    (tmp_path / "data" / "sts-test-student.csv").unlink()
    out = train("--data_dir", "data", "--run_dir", "run", "--no_tensorboard", "--epochs", 1)
    assert "STS similarity: there is no test file sts-test-student.csv" in out
    assert "sts-dev-output.csv" in os.listdir("run/predictions")
    assert "sts-test-output.csv" not in os.listdir("run/predictions")


def test_the_test_files_can_be_left_alone(train: Run, script: Run, small_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train("--train_sst", "--epochs", 1, "--no_tensorboard", "--no_test_predictions", "--run_dir", run)
    flags = ["--data_dir", small_data, "--no_test_predictions", "--run_dir", tmp_path / "again"]
    script("--evaluate", run / "best.pt", *flags)
    for folder in (run, tmp_path / "again"):
        assert os.listdir(folder / "predictions") == ["sst-dev-output.csv"]


@pytest.mark.parametrize("name", ["multitask_classifier.py", "ensemble.py", "sweep.py", "report.py"])
def test_help_waits_for_no_large_package(name: str) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / name, "--help"], capture_output=True, text=True)
    imported = set(re.findall(r"\| +(\w+)", done.stderr))
    assert done.returncode == 0 and "argparse" in imported
    assert not imported & {"torch", "scipy", "sklearn", "nltk", "matplotlib", "tokenizers", "tensorboard", "optuna"}


def test_dry_run_prints_the_plan_and_creates_nothing(train: Run, tmp_path: Path) -> None:
    out = train("--dry_run", "--num_sts_trains", 5, "--fine_tune_mode", "iterative", "--epochs", 7, "--run_dir", "run")
    assert os.listdir(tmp_path) == []
    rows = {line.split("  ")[0]: line.split() for line in reversed(out.splitlines())}  # a chart has titles too
    assert rows["STS similarity"][2:5] == ["20", "5", "15"] and rows["SST sentiment"][2:5] == ["20", "1", "3"]
    assert rows["SST sentiment"][6:] == ["4.00e-03", "0.009", "ce"] and rows["STS similarity"][-1] == "pearson"
    assert "7 epochs of 21 steps" in out and "from epoch 1 the heads train; from epoch 2" in out
    assert {
        "backbone sentiment",
        "backbone similarity",
        "pair layer",
        "head sst",
        "head para",
        "head sts",
        "all",
    } <= set(rows)
    assert "estimated memory" in out


def test_parameters_in_the_plan_are_those_of_the_checkpoint(train: Run, runs: Path) -> None:
    out = train("--dry_run", "--epochs", 5)
    weights = torch.load(runs / "yin" / "best.pt", weights_only=True)["weights"]
    total = sum(tensor.numel() for name, tensor in weights.items() if "running_" not in name)
    row = next(line for line in out.splitlines() if line.startswith("all "))
    assert row.split() == ["all", f"{total:,}", f"{total:,}", "100.0%"]


def test_a_run_is_the_same_as_a_process_of_its_own(tiny_flags: list[str], tmp_path: Path, train: Run) -> None:
    """Exit code 0, nothing but the table on standard output, and the same figures as in this process."""
    done = shell("multitask_classifier.py", *tiny_flags, "--run_dir", tmp_path / "a", "--no_tensorboard")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    train("--run_dir", "b", "--no_tensorboard")
    for name in ("metrics.jsonl", "predictions/sts-test-output.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# ----------------------------------------------------------------------------------------------------------- --evaluate


def test_evaluate_reproduces_the_scores(script: Run, runs: Path, small_data: Path, tmp_path: Path) -> None:
    out = script("--evaluate", runs / "yin" / "best.pt", "--data_dir", small_data, "--run_dir", "again", "--threads", 1)
    wanted = read_json(runs / "yin" / "scores.json")["dev"]
    assert read_json(tmp_path / "again" / "scores.json") == {
        "dev": wanted, "checkpoint": str(runs / "yin" / "best.pt"),
    }  # fmt: skip
    assert f"{wanted['score']:.4f}" in out
    for path in (runs / "yin" / "predictions").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "predictions" / path.name).read_bytes()
    assert sorted(os.listdir("again")) == ["predictions", "scores.json"]


def test_evaluate_writes_beside_the_checkpoint(script: Run, runs: Path, small_data: Path, tmp_path: Path) -> None:
    shutil.copyfile(runs / "sst" / "best.pt", "model.pt")
    script("--evaluate", "model.pt", "--data_dir", small_data)
    assert set(read_json(tmp_path / "model-evaluation" / "scores.json")["dev"]) == {"sst", "score", "score_raw_r"}
    assert sorted(os.listdir(tmp_path)) == ["model-evaluation", "model.pt"]


def test_scores_of_a_training_run_are_not_replaced(
    script: Run, combine: Run, runs: Path, small_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "sst", "run")
    before = (tmp_path / "run" / "scores.json").read_bytes()
    for line in (
        refusal(script, "--evaluate", "run/best.pt", "--data_dir", small_data, "--run_dir", "run"),
        refusal(combine, "run/best.pt", "--run_dir", "run"),
    ):
        assert "--run_dir run: holds a training run" in line
    assert (tmp_path / "run" / "scores.json").read_bytes() == before


def test_predictions_that_are_not_ours_stay(
    script: Run, train: Run, runs: Path, small_data: Path, tmp_path: Path
) -> None:
    write_text(tmp_path / "project" / "predictions" / "mine.txt", "precious")
    flags = ["--data_dir", small_data, "--run_dir", "project"]
    script("--evaluate", runs / "cross" / "best.pt", *flags)
    script("--evaluate", runs / "sst" / "best.pt", *flags)
    train("--train_sts", "--epochs", 1, "--run_dir", "project", "--no_tensorboard")
    assert (tmp_path / "project" / "predictions" / "mine.txt").read_text() == "precious"
    names = {path.name for path in (tmp_path / "project" / "predictions").iterdir()}
    assert names == {"mine.txt", "sts-dev-output.csv", "sts-test-output.csv"}  # those of the last run alone


def test_files_in_place_of_folders_are_known_at_once(
    script: Run, combine: Run, runs: Path, small_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    best = runs / "sst" / "best.pt"
    evaluate = ["--evaluate", best, "--data_dir", small_data]
    assert refusal(script, *evaluate, "--run_dir", "file").startswith("--run_dir file: cannot be written")
    assert refusal(combine, best, "--run_dir", "file").startswith("--run_dir file: cannot be written")
    assert refusal(combine, best, "--cache", "file").startswith("--cache file: cannot be written")
    assert refusal(script, "--evaluate", best, "--export", "file").startswith("--export file: cannot be written")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions").write_text("x")
    assert "out/predictions" in refusal(script, *evaluate, "--run_dir", "out")


def test_evaluate_takes_other_files(script: Run, runs: Path, small_data: Path, tmp_path: Path) -> None:
    """Only what a checkpoint was trained on has to be there."""
    lines = (small_data / "ids-sst-dev.csv").read_text().splitlines(keepends=True)
    (tmp_path / "mine.csv").write_text("".join(lines[:4]))
    script("--evaluate", runs / "sst" / "best.pt", "--data_dir", "nowhere", "--sst_dev", "mine.csv", "--run_dir", "out")
    rows = (tmp_path / "out" / "predictions" / "sst-dev-output.csv").read_text().splitlines()
    assert [row.split(" , ")[0] for row in rows[1:]] == ids(small_data / "ids-sst-dev.csv")[:3]


# ------------------------------------------------------------------------------------------------------------ --predict


def test_predict_sentences(script: Run, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("The film is superb .\n\n  A dreadful plot . \n", encoding="utf-8")
    out = script("--evaluate", runs / "yin" / "best.pt", "--predict", "lines.txt", "--task", "sst").splitlines()
    assert len(out) == 2
    for line, text in zip(out, ["The film is superb .", "A dreadful plot ."], strict=True):
        label, name, probability, shown = line.split("\t")
        assert name == DEFAULT_TASKS["sst"].label_names[int(label)] and 0.2 <= float(probability) <= 1 and shown == text
    assert sorted(os.listdir(tmp_path)) == ["lines.txt"]


@pytest.mark.parametrize("member", ["yin", "cross"])
def test_predictions_are_those_of_the_prediction_files(
    script: Run, runs: Path, small_data: Path, tmp_path: Path, member: str
) -> None:
    for task in DEFAULT_TASKS.values():
        header, *rows = (line.split("\t") for line in (small_data / task.files["dev"]).read_text().splitlines())
        columns = [header.index(name) for name in task.text_columns]
        (tmp_path / "x.txt").write_text("".join("\t".join(row[i] for i in columns) + "\n" for row in rows))
        out = script("--evaluate", runs / member / "best.pt", "--predict", "x.txt", "--task", task.name)
        found = [line.split("\t")[0] for line in out.splitlines()]
        file = runs / member / "predictions" / f"{task.name}-dev-output.csv"
        wanted = [row.split(" , ")[1].strip() for row in file.read_text().splitlines()[1:]]
        if task.kind == "similarity":
            wanted = [f"{float(value):.3f}" for value in wanted]
        assert found == wanted


PAIRS = "How do cats live alone?\tWhy do cats live alone?\nA goat .\tA server is painting .\n"


def test_predict_pairs_from_standard_input(runs: Path) -> None:
    words = ["--evaluate", runs / "yin" / "best.pt", "--predict", "-", "--task", "quora", "--threads", 1]
    done = shell("multitask_classifier.py", *words, stdin=PAIRS)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[-2:] for row in rows] == [line.split("\t") for line in PAIRS.splitlines()]
    assert all(row[1] == ("different", "paraphrase")[int(row[0])] and float(row[2]) >= 0.5 for row in rows)


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_predict_similarities(script: Run, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, PAIRS.encode())
    out = script("--evaluate", runs / "yin" / "best.pt", "--predict", "-", "--task", "sts")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[1:] for row in rows] == [line.split("\t") for line in PAIRS.splitlines()]
    assert all(re.fullmatch(r"-?\d+\.\d{3}", row[0]) for row in rows)


def test_a_file_and_standard_input_are_split_alike(
    script: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the mark that some editors begin a file with nor any end of line is a part of a text."""
    content = "\ufeffA goat .\rA caf\u00e9 .\r\nA server .\n".encode()
    (tmp_path / "x.txt").write_bytes(content)
    standard_input(monkeypatch, content)
    words = ["--evaluate", runs / "yin" / "best.pt", "--task", "sst", "--predict"]
    out = [script(*words, name) for name in ("x.txt", "-")]
    assert [line.split("\t")[-1] for line in out[0].splitlines()] == ["A goat .", "A caf\u00e9 .", "A server ."]
    assert out[1] == out[0]


@pytest.mark.parametrize(
    ("task", "text", "words"),
    [
        ("sst", "one\ttwo\n", ("line 1", "1 text ")),
        ("sts", "a\tb\nno tab here\n", ("line 2", "2 texts", "tab")),
        ("sts", "a\t\n", ("line 1", "2 texts")),
        ("sts", "\n\na\tb\n\none\n", ("line 5", "2 texts")),
        ("sst", "\n  \n", ("holds no sentence",)),
        ("sst", None, ("cannot be read",)),
        ("sst", b"\xff\xfe\xff", ("cannot be read", "UTF-8")),
    ],
)
def test_predict_names_what_it_cannot_read(
    script: Run, runs: Path, tmp_path: Path, task: str, text: str | bytes | None, words: tuple[str, ...]
) -> None:
    if text is not None:
        (tmp_path / "x.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(script, "--evaluate", runs / "yin" / "best.pt", "--predict", "x.txt", "--task", task)
    assert "--predict x.txt" in message and all(word in message for word in words)


def test_predict_needs_a_task_that_was_trained(script: Run, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\tb\n", encoding="utf-8")
    message = refusal(script, "--evaluate", runs / "sst" / "best.pt", "--predict", "x.txt", "--task", "quora")
    assert "--task quora" in message and "not trained on it" in message and "sst" in message


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--optim", "Adagrad"], ["--optim", "Adagrad"]),
        (["--learning_rate", "3"], ["--learning_rate"]),
        (["--overwrite", "--resume", "--run_dir", "x"], ["--overwrite", "--resume"]),
        (["--evaluate", "no-such.pt"], ["no-such.pt"]),
        (["--evaluate", "."], [".: is a folder"]),
        (["@no-such.args"], ["@no-such.args"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], wanted: list[str]) -> None:
    done = shell("multitask_classifier.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and "error: " in done.stderr
    assert all(word in done.stderr for word in wanted)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("run", ["script", "combine"])
def test_without_its_data_nothing_is_made(request: pytest.FixtureRequest, runs: Path, tmp_path: Path, run: str) -> None:
    best = runs / "yin" / "best.pt"
    words = ["--evaluate", best] if run == "script" else [best, "--cache", "cache"]
    flags = ["--data_dir", "nowhere", "--sst_dev", "no.csv", "--run_dir", "out"]
    assert "--sst_dev no.csv" in refusal(request.getfixturevalue(run), *words, *flags)
    assert os.listdir(tmp_path) == []


def data_with(small_data: Path, tmp_path: Path, name: str, content: bytes | Callable[[bytes], bytes] | None) -> Path:
    """A copy of the small data in which one file is replaced, changed or (None) gone."""
    folder = tmp_path / "data"
    shutil.copytree(small_data, folder)
    path = folder / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    return folder


def relabel(content: bytes) -> bytes:
    """Every label of an SST file one hundred too high."""
    head, *rows = content.decode().splitlines()
    return "\n".join([head, *(re.sub(r"\t(\d+)$", r"\t10\1", row) for row in rows)]).encode()


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("ids-sst-train.csv", relabel, ["ids-sst-train.csv", "outside 0 to 4", "20"]),
        ("quora-train.csv", b"", ["quora-train.csv", "empty", "datasets.py"]),
        ("sts-dev.csv", b"\tid\tsentence\tsentiment\n0\ta\tb\t1\n", ["sts-dev.csv", "wrong columns", "sentence1"]),
        ("ids-sst-dev.csv", b"id,sentence,sentiment\na,b,1\n", ["ids-sst-dev.csv", "wrong columns", "tabs"]),
        ("sts-train.csv", bytes(range(256)) * 20, ["sts-train.csv", "binary"]),
        ("sts-train.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0" * 99, ["sts-train.csv", "binary"]),
        ("quora-dev.csv", b"\tid\tsentence1\tsentence2\tis_duplicate\n", ["quora-dev.csv", "no rows"]),
        ("quora-dev.csv", None, ["quora-dev.csv", "--para_dev", "--data_dir"]),
        ("ids-sst-train.csv", None, ["ids-sst-train.csv", "--sst_train", "datasets.py --out data", "data/sample"]),
    ],
    ids=["labels", "empty", "columns", "commas", "binary", "png", "no rows", "no dev file", "no train file"],
)
def test_bad_data_is_refused_before_anything_is_made(
    train: Run, small_data: Path, tmp_path: Path, name: str, content: Any, wanted: list[str]
) -> None:
    folder = data_with(small_data, tmp_path, name, content)
    message = refusal(train, "--data_dir", folder, "--run_dir", "run")
    assert all(word in message for word in wanted)
    assert os.listdir(tmp_path) == ["data"]


def test_unreadable_rows_are_skipped_up_to_a_limit(train: Run, small_data: Path, tmp_path: Path) -> None:
    def spoil(content: bytes) -> bytes:
        rows = content.splitlines()
        return b"\n".join([*rows[:3], b"no fields", *rows[3:5], rows[5][:-1] + b"9", *rows[6:]])

    folder = data_with(small_data, tmp_path, "ids-sst-train.csv", spoil)
    flags = ["--data_dir", folder, "--run_dir", "run", "--no_tensorboard", "--epochs", 1]
    message = refusal(train, *flags, "--max_bad_rows", 1)
    assert "--max_bad_rows 1" in message and "ids-sst-train.csv:4" in message and "ids-sst-train.csv:7" in message
    out = train(*flags, "--max_bad_rows", 2)
    assert "ids-sst-train.csv:4: " in out and "skipped 2 unreadable rows in all (--max_bad_rows 2)" in out


def test_bad_data_as_a_process(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    folder = data_with(small_data, tmp_path, "quora-train.csv", b"")
    done = shell("multitask_classifier.py", *tiny_flags, "--data_dir", folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {folder}/quora-train.csv: the file is empty")
    assert done.stderr.count("\n") == 1


def spoiled_bert(source: Path, folder: Path, how: str) -> Path:
    """A copy of a model folder with one thing wrong."""
    import safetensors.torch

    shutil.copytree(source, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    config = read_json(folder / "config.json")
    if how == "a missing tensor":
        del weights["encoder.layer.1.output.dense.weight"]
    elif how == "a tensor too many":
        weights["encoder.layer.2.output.dense.weight"] = torch.zeros(3)
    elif how == "another shape":
        weights["pooler.dense.bias"] = torch.zeros(7)
    elif how == "another architecture":
        config["model_type"] = "roberta"
    elif how == "another activation":
        config["hidden_act"] = "relu"
    elif how == "uneven heads":
        config["num_attention_heads"] = 5
    elif how == "no config.json":
        (folder / "config.json").unlink()
    elif how == "no vocabulary":
        (folder / "vocab.txt").unlink()
    elif how == "a larger vocabulary":
        with (folder / "vocab.txt").open("a") as file:
            file.write("surplus\n")
    if how != "no config.json":
        (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "truncated weights":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-1000])
    return folder


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("a missing tensor", ["model.safetensors", "1 missing: encoder.layer.1.output.dense.weight"]),
        ("a tensor too many", ["model.safetensors", "1 left over: encoder.layer.2.output.dense.weight"]),
        ("another shape", ["model.safetensors", "pooler.dense.bias is [7], not [32]"]),
        ("another architecture", ["config.json", "roberta", "BERT"]),
        ("another activation", ["config.json", "relu", "gelu"]),
        ("uneven heads", ["spoiled", "config.json", "num_attention_heads", "5"]),
        ("no config.json", ["--pretrained", "config.json"]),
        ("no vocabulary", ["--pretrained", "vocab.txt"]),
        ("a larger vocabulary", ["--pretrained", "only"]),
        ("no weights", ["--pretrained", "model.safetensors"]),
        ("truncated weights", ["model.safetensors", "cannot be read"]),
    ],
)
def test_bad_start_weights_are_refused(
    train: Run, tiny_bert: Path, tmp_path: Path, how: str, wanted: list[str]
) -> None:
    folder = spoiled_bert(tiny_bert, tmp_path / "spoiled", how)
    message = refusal(train, "--pretrained", folder, "--run_dir", "run")
    assert all(word in message for word in wanted)
    assert os.listdir(tmp_path) == ["spoiled"]


def test_weights_of_another_shape_than_their_configuration(train: Run, tiny_bert: Path, tmp_path: Path) -> None:
    """The folder of one BERT with the weights of another: the first few tensors are listed, in one line."""
    folder = spoiled_bert(tiny_bert, tmp_path / "mixed", "nothing")
    other = make_bert(tmp_path / "other", num_hidden_layers=3, hidden_size=16)
    shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
    message = refusal(train, "--pretrained", folder)
    assert "left over" in message and "of the wrong shape" in message and "more" in message and len(message) < 3000


def test_what_is_no_model_folder_is_refused(train: Run, runs: Path) -> None:
    for name in (runs / "yin" / "best.pt", "some/where/else", "./nowhere", "/no/where", "~/nowhere/at/all"):
        message = refusal(train, "--pretrained", name)
        assert f"--pretrained {name}" in message and "folder" in message


def test_max_length_beyond_the_positions_of_the_model(train: Run) -> None:
    message = refusal(train, "--max_length", 65)
    assert "--max_length 65" in message and "64" in message


def test_truncation_is_told(train: Run) -> None:
    out = train("--max_length", 8, "--dry_run")
    assert re.search(r"truncated [\d,]+ sequences to 8 tokens \(--max_length\)", out)


def test_a_checkpoint_of_another_arch_in_the_run_directory(train: Run, tiny_flags: list[str], tmp_path: Path) -> None:
    """--resume with other flags, or with the resume.pt of another run."""
    make_trainer(tiny_flags, tmp_path / "run").fit()  # trained, but killed before its last scores were written
    make_trainer(tiny_flags, tmp_path / "cross", "--arch", "v2").fit()
    flags = ["--run_dir", "run", "--resume"]
    message = refusal(train, *flags, "--arch", "v2")
    assert "--resume" in message and "--arch yin-yang instead of v2" in message
    shutil.copyfile("cross/resume.pt", "run/resume.pt")
    message = refusal(train, *flags)
    assert "run/resume.pt" in message and "another arch" in message


def test_a_checkpoint_with_a_missing_weight(script: Run, runs: Path, small_data: Path) -> None:
    content = torch.load(runs / "yin" / "best.pt", weights_only=True)
    del content["weights"]["pair_layer.dense.weight"]
    save(Path("odd.pt"), content)
    message = refusal(script, "--evaluate", "odd.pt", "--data_dir", small_data)
    assert "odd.pt" in message and "1 missing: pair_layer.dense.weight" in message


# ------------------------------------------------------------------------------------------- run directories in the way


def test_a_finished_run_is_not_overwritten_by_accident(train: Run, tmp_path: Path) -> None:
    flags = ["--run_dir", "run", "--no_tensorboard", "--epochs", 1, "--train_sst"]
    train(*flags)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = (tmp_path / "run" / "best.pt").read_bytes()
    message = refusal(train, *flags)
    assert "--run_dir run" in message and "finished run" in message and "--overwrite" in message
    assert "--overwrite" in refusal(train, *flags, "--resume")
    assert (tmp_path / "run" / "best.pt").read_bytes() == before
    train(*flags, "--overwrite", "--seed", 5)
    assert (tmp_path / "run" / "best.pt").read_bytes() != before
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_an_unfinished_run_is_not_overwritten_by_accident(train: Run, tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--no_tensorboard", "--epochs", 1, "--train_sst"]
    train(*flags, "--run_dir", "whole")
    make_trainer(tiny_flags, tmp_path / "run", *flags).fit()  # killed before its last scores were written
    assert "--resume goes on with it" in refusal(train, *flags, "--run_dir", "run")
    train(*flags, "--run_dir", "run", "--resume")  # all epochs are done: what was missing is made
    assert (tmp_path / "run" / "scores.json").read_bytes() == (tmp_path / "whole" / "scores.json").read_bytes()
    assert not (tmp_path / "run" / "resume.pt").exists()


def test_there_must_be_something_to_resume(train: Run, tmp_path: Path) -> None:
    assert "resume.pt" in refusal(train, "--run_dir", "nothing", "--resume")
    assert not (tmp_path / "nothing").exists()


def test_a_resumed_run_is_known_before_its_data_is_read(script: Run, tiny_flags: list[str], tmp_path: Path) -> None:
    make_trainer(tiny_flags, tmp_path / "run").fit()
    message = refusal(script, "--run_dir", "run", "--resume")  # without the run's own flags
    assert "began with --data_dir" in message and "--pretrained" in message and "--lr 0.001 instead of" in message
    assert "--run_dir nowhere: there is no resume.pt" in refusal(script, "--run_dir", "nowhere", "--resume")


def test_odd_adapters_are_known_before_the_data_are_read(script: Run) -> None:
    message = refusal(script, "--lora_dict", '{"mode": "attn-only", "r": 0}', "--data_dir", "nowhere")
    assert message.startswith("--lora_dict: ")


def test_what_is_no_model_of_a_run_is_named(
    script: Run, combine: Run, tiny_flags: list[str], small_data: Path, tmp_path: Path
) -> None:
    make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1).fit()
    for path, words in (("run/resume.pt", "a state for --resume"), ("run", "a folder")):
        for message in (
            refusal(script, "--evaluate", path, "--data_dir", small_data),
            refusal(script, *tiny_flags, "--init_from", path, "--run_dir", "other"),
            *([refusal(combine, path)] if path != "run" else []),
        ):
            assert f"{path}: is {words}" in message and "best.pt" in message


def test_base_weights_may_have_moved(
    script: Run, tiny_flags: list[str], tiny_bert: Path, small_data: Path, tmp_path: Path
) -> None:
    """A checkpoint with adapters has none; those that --pretrained names have to be the very same."""
    shutil.copytree(tiny_bert, tmp_path / "models" / "bert")
    flags = ["--train_sst", "--lora_mode", "attn-only", "--epochs", 1, "--pretrained", tmp_path / "models" / "bert"]
    make_trainer(tiny_flags, tmp_path / "run", *flags).fit()
    make_trainer(tiny_flags, tmp_path / "whole", "--train_sst", "--epochs", 1).fit()
    evaluate = ["--evaluate", "run/best.pt", "--data_dir", small_data, "--run_dir", "out"]
    script(*evaluate)
    before = read_json(tmp_path / "out" / "scores.json")
    (tmp_path / "models").rename(tmp_path / "moved")
    message = refusal(script, *evaluate)
    assert "run/best.pt: its adapters need the base weights" in message and "--pretrained" in message
    script(*evaluate, "--pretrained", "moved/bert")
    assert read_json(tmp_path / "out" / "scores.json") == before
    script("--evaluate", "run/best.pt", "--export", "exported", "--pretrained", "moved/bert")
    other = make_bert(tmp_path / "other", seed=1)
    assert "other base weights" in refusal(script, *evaluate, "--pretrained", other)
    whole = ["--evaluate", "whole/best.pt", "--data_dir", small_data, "--run_dir", "out"]
    assert "has no adapters" in refusal(script, *whole, "--pretrained", "moved/bert")


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_file_in_place_of_the_run_directory(train: Run, tmp_path: Path, more: list[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert "--run_dir file" in refusal(train, "--run_dir", "file", *more)
    assert (tmp_path / "file").read_text() == "x"


def test_a_filepath_that_cannot_be_written_is_known_before_training(train: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "run" / "config.json", "{}")
    write_text(tmp_path / "run" / "best.pt", "a former run's")
    message = refusal(train, "--filepath", "folder", "--run_dir", "run", "--no_tensorboard", "--overwrite")
    assert "folder" in message
    assert (tmp_path / "run" / "best.pt").read_text() == "a former run's"  # and an epoch is hours on the real data


@pytest.mark.parametrize("flag", ["--filepath", "--benchmark"])
def test_a_device_is_not_replaced_by_a_file(train: Run, tmp_path: Path, flag: str) -> None:
    """Root may rename a file to /dev/null, after which nothing on the machine has one; a pipe stands for it here."""
    os.mkfifo(tmp_path / "device")
    assert f"{flag} device: is a folder or a device" in refusal(train, flag, "device", "--run_dir", "run")
    with pytest.raises(UserError, match="device: cannot be written .*it is a folder or a device"):
        write_text(tmp_path / "device", "x")
    assert (tmp_path / "device").is_fifo() and os.listdir(tmp_path) == ["device"]


def test_a_filepath_given_to_a_resumed_run_is_written(train: Run, tiny_flags: list[str], tmp_path: Path) -> None:
    """Also where no better score comes."""
    flags = ["--no_tensorboard", "--epochs", 1, "--train_sst", "--run_dir", tmp_path / "run"]
    make_trainer(tiny_flags, tmp_path / "run", *flags).fit()
    train(*flags, "--resume", "--filepath", tmp_path / "copies" / "best.pt")
    assert (tmp_path / "copies" / "best.pt").read_bytes() == (tmp_path / "run" / "best.pt").read_bytes()


# ------------------------------------------------------------------------------------------------------------- no space


def test_no_space_is_known_before_training(train: Run, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        message = refusal(train, "--run_dir", disk / "run")
        assert f"--run_dir {disk}/run" in message and "no space" in message and "MB" in message
        assert [path.name for path in disk.rglob("*") if path.is_file()] == [".lock"]


def test_no_space_simulated_by_disk_usage(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For machines where nothing can be mounted."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    message = refusal(train, "--run_dir", "run")
    assert "--run_dir run" in message and "no space" in message


def test_a_full_disk_while_exporting_and_evaluating(script: Run, runs: Path, small_data: Path, tmp_path: Path) -> None:
    best = runs / "sst" / "best.pt"
    with small_disk(tmp_path / "small", 1 << 16) as disk:  # less than the weights take
        message = refusal(script, "--evaluate", best, "--export", disk / "out")
        assert "model.safetensors: cannot be written (no space left on the disk" in message
        assert not list(disk.rglob("*.safetensors*"))
        fill(disk)
        message = refusal(script, "--evaluate", best, "--data_dir", small_data, "--run_dir", disk / "scores")
        assert f"--run_dir {disk}/scores: cannot be written" in message and "No space left" in message


def test_a_full_disk_while_saving_leaves_the_old_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        path = disk / "best.pt"
        save(path, {"weights": torch.ones(1000)})
        before = path.read_bytes()
        fill(disk)
        for write in (
            lambda: save(path, {"weights": torch.zeros(100_000)}),
            lambda: write_atomically(path, lambda temporary: temporary.write_bytes(b"x" * 100_000)),
        ):
            with pytest.raises(UserError, match=r"best\.pt: cannot be written \(no space left on the disk"):
                write()
            assert path.read_bytes() == before and sorted(os.listdir(disk)) == ["best.pt", "filler"]


@pytest.mark.parametrize("moment", ["evaluate", "update_best", "save_state"])
@pytest.mark.parametrize("tensorboard", ["--tensorboard", "--no_tensorboard"])
def test_a_disk_that_fills_up_while_training_ends_in_one_line(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensorboard: str, moment: str
) -> None:
    """Something else takes the space: checkpoints, jsonl files and TensorBoard's events all meet it."""
    from training.trainer import Trainer

    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        original = getattr(Trainer, moment)

        def filling(*arguments: Any) -> Any:
            out = original(*arguments)
            fill(disk)
            return out

        monkeypatch.setattr(Trainer, moment, filling)
        message = refusal(train, "--run_dir", disk / "run", tensorboard)
        assert str(disk) in message and "no space" in message


def test_metrics_on_a_full_disk_end_in_one_line(tmp_path: Path) -> None:
    from training.run_directory import RunDirectory

    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        fill(disk)
        with pytest.raises(UserError, match="metrics.jsonl.*no space"):
            RunDirectory(disk).append_json("metrics.jsonl", {"epoch": 1, "filling": "x" * 10_000})


def test_the_space_that_is_asked_for_is_enough(train: Run, tmp_path: Path) -> None:
    """A disk that passes the check at the start takes the run to its end, the temporary files of saving included."""
    out = ""
    for size in range(4_000_000, 12_000_000, 400_000):
        with small_disk(tmp_path / f"disk{size}", size) as disk:
            try:
                out = train("--run_dir", disk / "run", "--no_tensorboard", "--fine_tune_mode", "full-model")
            except UserError as error:
                assert "the checkpoints need about" in str(error), f"{size:,} bytes: {error}"
    assert "best checkpoint" in out


# ---------------------------------------------------------------------------------------------------------- other sizes


def test_a_dev_set_smaller_than_its_classes(train: Run, tmp_path: Path) -> None:
    """One dev row: no correlation, one class, and still a run with scores and figures."""
    cut(tmp_path / "data", train=3, dev=1, test=1)
    train("--data_dir", "data", "--run_dir", "run", "--epochs", 1)
    dev = read_json(tmp_path / "run" / "scores.json")["dev"]
    assert dev["sts"] == {"pearson": 0.0, "spearman": 0.0} and dev["sst"]["accuracy"] in (0.0, 1.0)


@pytest.mark.parametrize("arch", ["duality", "baseline", "r1-baseline", "v1", "cosine", "r4"])
def test_every_other_arch_trains_from_the_command_line(train: Run, tmp_path: Path, arch: str) -> None:
    train("--arch", arch, "--run_dir", "run", "--no_tensorboard", "--epochs", 1, "--max_train_examples", 6)
    assert read_json(tmp_path / "run" / "config.json")["model"]["arch"] == arch
    assert set(read_json(tmp_path / "run" / "scores.json")["dev"]) == {*DEFAULT_TASKS, "score", "score_raw_r"}


def test_a_reader_that_goes_away_is_no_error(tiny_flags: list[str]) -> None:
    """As in `multitask_classifier.py --dry_run | head -1`."""
    words = [sys.executable, str(ROOT / "multitask_classifier.py"), *tiny_flags, "--dry_run"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 1


def test_a_reader_that_goes_away_leaves_a_run_to_go_on_with(tiny_flags: list[str], tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "multitask_classifier.py"), *tiny_flags, "--run_dir", str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("From epoch 1"):
                break
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1 and "cannot be written" not in errors and "Traceback" not in errors
    metrics = tmp_path / "run" / "metrics.jsonl"
    epochs = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    assert load(tmp_path / "run" / "resume.pt")["progress"]["epoch"] == epochs  # whichever line it was that nobody read


# ------------------------------------------------------------------------------------------- starting from a checkpoint


def weights_at_start(tiny_flags: list[str], run: Path, *more: object) -> dict[str, torch.Tensor]:
    return make_trainer(tiny_flags, run, *more).model.state_dict()


def test_a_trained_model_can_be_the_start_of_another(runs: Path, tiny_flags: list[str], tmp_path: Path) -> None:
    """The weights are handed over to the bit, into another fine-tune mode; optimizers are fresh."""
    wanted = torch.load(runs / "yin" / "best.pt", weights_only=True)["weights"]
    flags = ["--init_from", runs / "yin" / "best.pt", "--fine_tune_mode", "last-layer"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    found = trainer.model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any(optimizer.state for optimizer in trainer.optimizers.by_name.values())
    trainer.fit()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], wanted[name]) for name in wanted if name.startswith("backbones."))
    assert any(not torch.equal(after[name], wanted[name]) for name in wanted if name.startswith("heads."))


def test_a_model_of_one_task_can_be_the_start_of_one_of_another(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--backbones", "shared", "--epochs", 1]
    make_trainer(tiny_flags, tmp_path / "stage", *flags, "--train_para").fit()
    trained = torch.load(tmp_path / "stage" / "best.pt", weights_only=True)["weights"]
    start = ["--init_from", tmp_path / "stage" / "best.pt"]
    found = weights_at_start(tiny_flags, tmp_path / "a", *flags, "--train_sts", *start)
    shared = [name for name in found if name.startswith(("backbones.shared.", "pair_layer.")) and name in trained]
    assert len(shared) > 30 and all(torch.equal(found[name], trained[name]) for name in shared)


@pytest.mark.parametrize(
    ("flags", "stage", "new"),
    [
        ("--backbones shared --pair_layer none", "--train_sst", "para, sts, whose heads are new"),
        ("--backbones shared", "--train_sst", "para, sts, whose heads and pair layer are new"),
        ("", "--train_sst", "para, sts, whose heads and pair layer are new, and backbone similarity"),
        ("", "--train_para", "sst, sts, whose heads are new, and backbone sentiment"),
        ("", "--train_sts --sts_weight 0 --sts_embedding_loss ranking", "sst, para, whose heads are new, and backbone"),
        (
            "--arch r4",
            "--train_sts --fine_tune_mode full-model",
            "sst, para, whose heads are new, and backbone sst and para",
        ),
    ],
)
def test_a_stage_on_one_task_before_all_of_them(
    tiny_flags: list[str], tmp_path: Path, capsys: Any, flags: str, stage: str, new: str
) -> None:
    """What the stage trained is taken; what the other tasks alone use is as in a run without a stage."""
    make_trainer(tiny_flags, tmp_path / "stage", *flags.split(), *stage.split(), "--epochs", 1).fit()
    trained = torch.load(tmp_path / "stage" / "best.pt", weights_only=True)["weights"]
    capsys.readouterr()
    found = weights_at_start(tiny_flags, tmp_path / "a", *flags.split(), "--init_from", tmp_path / "stage" / "best.pt")
    assert f"knows nothing of {new}" in capsys.readouterr().out
    plain = weights_at_start(tiny_flags, tmp_path / "b", *flags.split())
    assert trained.keys() <= found.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, trained[name] if name in trained else plain[name]), name


def test_adapters_are_merged_into_the_start(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--arch", "v2", "--train_sst", "--fine_tune_mode", "full-model", "--lr", 1e-2]
    first = make_trainer(tiny_flags, tmp_path / "lora", *flags, "--lora_mode", "all-lin", "--lora_rank", 3)
    first.fit()
    saved = torch.load(tmp_path / "lora" / "best.pt", weights_only=True)["weights"]
    assert all(own.any() for name, own in saved.items() if name.endswith("lora_B"))
    again = make_trainer(tiny_flags, tmp_path / "next", *flags, "--init_from", tmp_path / "lora" / "best.pt")
    model, _, _ = load_model(tmp_path / "lora" / "best.pt")
    batch = first.loader.train["sst"].batch(np.arange(9))
    torch.testing.assert_close(again.model.eval()("sst", batch), model.eval()("sst", batch), rtol=0, atol=1e-6)


def test_pals_may_be_new_but_not_left_over(tiny_flags: list[str], tmp_path: Path) -> None:
    """Fresh ones change nothing; to drop trained ones would."""
    pal = ["--pal", "low-rank", "--pal_low_rank_size", 6]
    for name, more in (("plain", []), ("pal", pal)):
        make_trainer(tiny_flags, tmp_path / name, *more, "--epochs", 1).fit()
    start = ["--init_from", tmp_path / "plain" / "best.pt"]
    found = weights_at_start(tiny_flags, tmp_path / "a", *pal, *start)
    trained = torch.load(tmp_path / "plain" / "best.pt", weights_only=True)["weights"]
    assert all(torch.equal(found[name], own) for name, own in trained.items())
    new = {name for name in found if name not in trained}
    assert {name.split(".")[0] for name in new} == {"pals"}
    assert not any(found[name].any() for name in new if ".decoders." in name)
    with pytest.raises(UserError, match=r"--init_from .*left over: pals\.sst\."):
        make_trainer(tiny_flags, tmp_path / "b", "--init_from", tmp_path / "pal" / "best.pt")


def test_another_arch_is_no_start(train: Run, runs: Path) -> None:
    message = refusal(train, "--init_from", runs / "cross" / "best.pt", "--run_dir", "run")
    assert "--init_from" in message and "another arch" in message
    message = refusal(train, "--init_from", runs / "yin" / "best.pt", "--lora_mode", "attn")
    assert "--init_from" in message and "--lora_mode" in message


def test_points_of_the_curves_have_the_steps_of_the_run(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    points: list[tuple[int, str]] = []
    original = Logger._curves

    def noting(logger: Logger, number: int, task: str, *rest: Any) -> None:
        points.append((number, task))
        original(logger, number, task, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Logger, "_curves", noting)
        trainer.fit()
    assert points == [(0, "sst"), (3, "para"), (6, "sts"), (9, "sst"), (12, "para"), (15, "sts")]

"""multitask_classifier.py as people run it: what a run leaves behind, --evaluate, --predict, one line for a mistake."""

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
from helpers import ROOT, make_bert, make_trainer, metrics, read_json, refusal, shell

import ensemble
import multitask_classifier
from models.checkpoint import load, save
from tasks import DEFAULT_TASKS, Task
from utils.files import write_text

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
def train(tiny_flags: list[str], script: Run) -> Run:
    """The script with the flags of a tiny run without TensorBoard and more; returns what it prints."""
    return lambda *words: script(*tiny_flags, "--no_tensorboard", *words)


def table(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    """Return these columns of a data file, read without our own reader."""
    header, *rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [[row[header.index(name)] for name in columns] for row in rows]


def predicted(run: Path, task: Task, split: str = "dev") -> tuple[list[str], list[float]]:
    """Return the ids and the values in a prediction file."""
    header, *rows = (run / "predictions" / f"{task.name}-{split}-output.csv").read_text().splitlines()
    assert header == f"id \t {task.prediction_column} "
    found = [re.fullmatch(r"(\w+) , (-?[\d.e-]+) ", row) for row in rows]
    return [match[1] for match in found if match], [float(match[2]) for match in found if match]


def test_files_of_a_run(runs: Path) -> None:
    files = [".lock", "best.pt", "config.json", "inputs.json", "metrics.jsonl", "predictions", "scores.json"]
    files.append("timing.jsonl")
    assert sorted(os.listdir(runs / "sst")) == files
    events = [path.name for path in (runs / "yin").glob("events.out.tfevents.*")]
    assert sorted(os.listdir(runs / "yin")) == sorted([*files, *events]) and len(events) == 1
    assert read_json(runs / "yin" / "config.json")["train"]["routine"] == "interleave"
    assert (runs / "named" / "g6-yin-yang.pt").read_bytes() == (runs / "yin" / "best.pt").read_bytes()
    lines = metrics(runs / "yin")
    assert set(lines[0]) == {"epoch", "step", "trains", "trainable_parameters", "train", "dev"}
    # iterative unfreezing: the heads alone, then one layer and the pooler, then the other layer
    counts = [line["trainable_parameters"] for line in lines]
    layer = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 2 * 32
    assert np.diff(counts).tolist() == [2 * (layer + 32 * 32 + 32), 0, 2 * layer]  # in two backbones
    timing = [json.loads(line) for line in (runs / "yin" / "timing.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in timing] == [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert set(timing[0]) == {
        "epoch", "seconds", "seconds_without_evaluation", "train_seconds", "tokens", "examples_per_second",
        "peak_memory_bytes", "device",
    }  # fmt: skip
    assert set(timing[0]["train_seconds"]) == set(DEFAULT_TASKS) and timing[0]["peak_memory_bytes"] > 1e7
    assert timing[0]["examples_per_second"] > 1 and re.fullmatch(r"cpu \(.+, \d+ threads\)", timing[0]["device"])


def test_scores_have_the_documented_structure(runs: Path) -> None:
    scores = read_json(runs / "yin" / "scores.json")
    assert set(scores) == {"dev", "epoch", "checkpoint"} and scores["checkpoint"] == "best.pt"
    dev = scores["dev"]
    assert {name: set(found) if isinstance(found, dict) else type(found) for name, found in dev.items()} == {
        "sst": {"accuracy", "f1"}, "para": {"accuracy", "f1"}, "sts": {"pearson", "spearman"},
        "score": float, "score_raw_r": float,
    }  # fmt: skip
    accuracy, r = dev["sst"]["accuracy"] + dev["para"]["accuracy"], dev["sts"]["pearson"]
    assert dev["score"] == pytest.approx((accuracy + (1 + r) / 2) / 3)
    assert dev["score_raw_r"] == pytest.approx((accuracy + r) / 3)
    lines = metrics(runs / "yin")
    assert dev == lines[scores["epoch"] - 1]["dev"]  # the checkpoint that was read back scores as it did
    assert dev["score"] == max(line["dev"]["score"] for line in lines)


def test_predictions_hold_every_id_in_order_and_give_the_scores(runs: Path, small_data: Path) -> None:
    """From the files alone, as the course's server would score them."""
    dev = read_json(runs / "yin" / "scores.json")["dev"]
    names = {f"{task}-{split}-output.csv" for task in DEFAULT_TASKS for split in ("dev", "test")}
    assert set(os.listdir(runs / "yin" / "predictions")) == names
    for task in DEFAULT_TASKS.values():
        for split in ("dev", "test"):
            ids, values = predicted(runs / "yin", task, split)
            assert ids == [row[0] for row in table(small_data / task.files[split], ("id",))]
            if task.kind != "similarity":
                assert set(values) <= set(range(task.num_outputs if task.kind == "classes" else 2))
        truth = [float(row[0]) for row in table(small_data / task.files["dev"], (task.label_column,))]
        _, found = predicted(runs / "yin", task)
        if task.kind == "similarity":
            assert np.corrcoef(truth, found)[0, 1] == pytest.approx(dev["sts"]["pearson"], abs=1e-6)
        else:
            assert np.mean(np.equal(truth, found)) == dev[task.name]["accuracy"]


def test_tensorboard_events(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "yin"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = set(tags["scalars"])
    for task in DEFAULT_TASKS:
        scores = ("pearson", "spearman") if task == "sts" else ("accuracy", "f1")
        assert {f"loss/{task}", f"lr/{task}", f"optim/gradient_norm_{task}"} <= scalars
        assert {f"{split}/{task}_{score}" for split in ("dev", "train") for score in scores} <= scalars
    assert {"dev/score", "perf/examples_per_second", "perf/peak_memory_gb"} <= scalars
    assert set(tags["images"]) == {"plots/sst_confusion", "plots/para_confusion", "plots/sts_residuals"}
    groups = dict.fromkeys(tag.partition("/")[0] for tag in sorted([*scalars, *tags["images"]]))
    assert list(groups) == ["dev", "loss", "lr", "optim", "perf", "plots", "train"]  # as TensorBoard sorts them
    assert len(events.Images("plots/sst_confusion")) == 4
    assert events.Images("plots/sts_residuals")[0].encoded_image_string.startswith(b"\x89PNG")
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"routine": "interleave"' in text
    points = [(point.step, point.value) for point in events.Scalars("dev/score")]
    assert points == [(line["step"], pytest.approx(line["dev"]["score"])) for line in metrics(runs / "yin")]
    assert events.Scalars("dev/score_best")[-1].value == pytest.approx(max(value for _, value in points))


def test_tensorboards_table_of_options(runs: Path) -> None:
    """It has a row for each run, of the run's name, and shows the first five columns and all metrics."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    multiplexer = EventMultiplexer(tensor_size_guidance={"hparams": 100}).AddRunsFromDirectory(str(runs))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(runs))
    backend, request = backend_context.Context(TBContext(data_provider=provider)), RequestContext()
    metadata = backend.hparams_metadata(request, "")
    columns = backend.experiment_from_metadata(request, "", True, metadata, [])
    assert {column.name for column in columns.hparam_infos[:5]} == {"lr", "arch", "batch_size", "optim", "lora"}
    asked = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=9, allowed_statuses=[0, 1, 2, 3])
    (row,) = list_session_groups.Handler(request, backend, "", asked).run().session_groups
    assert row.name == "yin" and row.hparams["lr"].number_value == 1e-3 and row.hparams["lora"].string_value == "none"
    assert {"sst_lr_multiplier", "pal", "max_length"} <= set(row.hparams) and "run_dir" not in row.hparams
    found, dev = {metric.name.tag: metric.value for metric in row.metric_values}, metrics(runs / "yin")[-1]["dev"]
    best = read_json(runs / "yin" / "scores.json")["dev"]["score"]
    assert found == {
        "dev/score_best": pytest.approx(best),
        "dev/sst_accuracy": pytest.approx(dev["sst"]["accuracy"]),
        "dev/para_accuracy": pytest.approx(dev["para"]["accuracy"]),
        "dev/sts_pearson": pytest.approx(dev["sts"]["pearson"]),
    }


def test_what_is_printed(train: Run, tmp_path: Path) -> None:
    out = train("--run_dir", "run", "--use_gpu", "--max_length", 8)
    for words in ("Epoch 1/2: the heads train", "Epoch 2/2", "SST sentiment", "best checkpoint run/best.pt"):
        assert words in out
    assert re.search(r"truncated [\d,]+ sequences to 8 tokens \(--max_length\)", out)
    assert torch.cuda.is_available() or "--use_gpu: there is no cuda or mps device here" in out
    score = read_json(tmp_path / "run" / "scores.json")["dev"]["score"]
    assert f"{score:.4f}" in out.splitlines()[-3]
    assert all(len(line) <= 120 for line in out.splitlines() if "/" not in line)


def test_a_run_without_a_folder_gets_a_name(train: Run) -> None:
    train("--train_sst", "--epochs", 1, "--arch", "v2")
    train("--train_sst", "--epochs", 1, "--name", "mine")
    assert [re.sub(r"\d+", "0", name) for name in sorted(os.listdir("runs"))] == ["mine", "v0-0-0"]


def test_test_files_may_be_missing_or_left_alone(train: Run, script: Run, small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(small_data, "data")
    (tmp_path / "data" / "sts-test-student.csv").unlink()
    out = train("--data_dir", "data", "--run_dir", "run", "--epochs", 1)
    assert "STS similarity: there is no test file sts-test-student.csv" in out
    assert len(os.listdir("run/predictions")) == 5
    script("--evaluate", "run/best.pt", "--data_dir", "data", "--no_test_predictions", "--run_dir", "again")
    assert sorted(os.listdir("again/predictions")) == [f"{task}-dev-output.csv" for task in sorted(DEFAULT_TASKS)]


def test_dry_run_prints_the_plan_and_creates_nothing(train: Run, runs: Path, tmp_path: Path) -> None:
    out = train("--dry_run", "--num_sts_trains", 5, "--fine_tune_mode", "iterative", "--epochs", 7, "--run_dir", "run")
    assert os.listdir(tmp_path) == []
    rows = {line.split("  ")[0]: line.split() for line in reversed(out.splitlines())}  # a chart has titles too
    assert rows["STS similarity"][2:5] == ["20", "5", "15"] and rows["SST sentiment"][2:5] == ["20", "1", "3"]
    assert rows["SST sentiment"][6:] == ["4.00e-03", "0.009", "ce"] and rows["STS similarity"][-1] == "pearson"
    assert "7 epochs of 21 steps" in out and "from epoch 1 the heads train; from epoch 2" in out
    weights = load(runs / "yin" / "best.pt")["weights"]
    total = sum(tensor.numel() for name, tensor in weights.items() if "running_" not in name)
    assert {"backbone sentiment", "backbone similarity", "pair layer", "head sst", "head para", "head sts"} <= set(rows)
    assert rows["all"][:4] == ["all", f"{total:,}", f"{total:,}", "100.0%"]
    assert "estimated memory" in out and "state of Adamax, one for each task: 0.00 GB" in out


def test_a_run_is_the_same_as_a_process_of_its_own(tiny_flags: list[str], tmp_path: Path, train: Run) -> None:
    """Exit code 0, nothing but the table on standard output, and the same figures as in this process."""
    done = shell("multitask_classifier.py", *tiny_flags, "--run_dir", tmp_path / "a", "--no_tensorboard")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    train("--run_dir", "b")
    for name in ("metrics.jsonl", "predictions/sts-test-output.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_reader_that_goes_away_leaves_a_run_to_go_on_with(tiny_flags: list[str], tmp_path: Path) -> None:
    """As in `multitask_classifier.py | head -1`."""
    words = [sys.executable, str(ROOT / "multitask_classifier.py"), *tiny_flags, "--run_dir", str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("From epoch 1"):
                break
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1 and "cannot be written" not in errors and "Traceback" not in errors
    epochs = len(metrics(tmp_path / "run")) if (tmp_path / "run" / "metrics.jsonl").exists() else 0
    # whichever line it was that nobody read
    assert load(tmp_path / "run" / "resume.pt")["progress"]["epoch"] == epochs


def test_evaluate_reproduces_the_scores(script: Run, runs: Path, small_data: Path, tmp_path: Path) -> None:
    best, wanted = runs / "yin" / "best.pt", read_json(runs / "yin" / "scores.json")["dev"]
    out = script("--evaluate", best, "--data_dir", small_data, "--run_dir", "again", "--threads", 1)
    assert read_json(tmp_path / "again" / "scores.json") == {"dev": wanted, "checkpoint": str(best)}
    assert f"{wanted['score']:.4f}" in out
    for path in (runs / "yin" / "predictions").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "predictions" / path.name).read_bytes()
    assert sorted(os.listdir("again")) == ["predictions", "scores.json"]


def test_evaluate_writes_beside_the_checkpoint_and_takes_other_files(
    script: Run, runs: Path, small_data: Path, tmp_path: Path
) -> None:
    """Only what a checkpoint was trained on has to be there."""
    shutil.copyfile(runs / "sst" / "best.pt", "model.pt")
    lines = (small_data / "ids-sst-dev.csv").read_text().splitlines(keepends=True)
    (tmp_path / "mine.csv").write_text("".join(lines[:4]))
    script("--evaluate", "model.pt", "--data_dir", "nowhere", "--sst_dev", "mine.csv")
    assert set(read_json(tmp_path / "model-evaluation" / "scores.json")["dev"]) == {"sst", "score", "score_raw_r"}
    assert sorted(os.listdir(tmp_path)) == ["mine.csv", "model-evaluation", "model.pt"]
    assert len(predicted(tmp_path / "model-evaluation", DEFAULT_TASKS["sst"])[0]) == 3


def test_files_of_others_stay(script: Run, train: Run, runs: Path, small_data: Path, tmp_path: Path) -> None:
    """Scores of a training run, and whatever else lies in a folder of predictions."""
    shutil.copytree(runs / "sst", "run")
    evaluate = ["--evaluate", "run/best.pt", "--data_dir", small_data]
    for message in (
        refusal(script, *evaluate, "--run_dir", "run"),
        refusal(ensemble.main, ["run/best.pt", "--data_dir", str(small_data), "--run_dir", "run"]),
    ):
        assert "--run_dir run: holds a training run" in message
    write_text(tmp_path / "project" / "predictions" / "mine.txt", "precious")
    script(*evaluate, "--run_dir", "project")
    train("--train_sts", "--epochs", 1, "--run_dir", "project")
    assert (tmp_path / "project" / "predictions" / "mine.txt").read_text() == "precious"
    names = {path.name for path in (tmp_path / "project" / "predictions").iterdir()}
    assert names == {"mine.txt", "sts-dev-output.csv", "sts-test-output.csv"}  # those of the last run alone


def test_files_in_place_of_folders_are_known_at_once(
    script: Run, train: Run, runs: Path, small_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    best = runs / "sst" / "best.pt"
    evaluate, combine = ["--evaluate", best, "--data_dir", small_data], [str(best), "--data_dir", str(small_data)]
    for message in (
        refusal(script, *evaluate, "--run_dir", "file"),
        refusal(ensemble.main, [*combine, "--run_dir", "file"]),
        refusal(train, "--run_dir", "file", "--overwrite"),
    ):
        assert message.startswith("--run_dir file: cannot be written")
    assert refusal(ensemble.main, [*combine, "--cache", "file"]).startswith("--cache file: cannot be written")
    assert refusal(script, "--evaluate", best, "--export", "file").startswith("--export file: cannot be written")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions").write_text("x")
    assert "out/predictions" in refusal(script, *evaluate, "--run_dir", "out")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("run", ["yin", "cross"])
def test_predictions_are_those_of_the_prediction_files(
    script: Run, runs: Path, small_data: Path, tmp_path: Path, run: str
) -> None:
    for task in DEFAULT_TASKS.values():
        texts = ["\t".join(row).strip() for row in table(small_data / task.files["dev"], task.text_columns)]
        (tmp_path / "x.txt").write_text("".join(f"{text}\n\n" for text in texts))
        out = script("--evaluate", runs / run / "best.pt", "--predict", "x.txt", "--task", task.name)
        rows = [line.split("\t") for line in out.splitlines()]
        assert ["\t".join(row[-len(task.text_columns) :]) for row in rows] == texts
        if task.kind == "similarity":
            raw, labels = predicted(runs / run, task)[1], table(small_data / task.files["dev"], [task.label_column])
            slope, intercept = np.polyfit(raw, [float(label) for (label,) in labels], 1)
            wanted = np.clip(slope * np.array(raw) + intercept, 0, 5)  # dev's fitted line, since raw ones have no scale
            assert [float(row[0]) for row in rows] == pytest.approx(wanted, abs=6e-4)
        else:
            assert [float(row[0]) for row in rows] == predicted(runs / run, task)[1]
            names = task.label_names or ("different", "paraphrase")
            assert all(row[1] == names[int(row[0])] and 0.2 <= float(row[2]) <= 1 for row in rows)
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_file_and_standard_input_are_split_alike(
    script: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the mark that some editors begin a file with nor any end of line is a part of a text."""
    content = "\ufeffA goat .\rA caf\u00e9 .\r\nA server .\n".encode()
    (tmp_path / "x.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    words = ["--evaluate", runs / "yin" / "best.pt", "--task", "sst", "--predict"]
    out = [script(*words, name) for name in ("x.txt", "-")]
    assert [line.split("\t")[-1] for line in out[0].splitlines()] == ["A goat .", "A caf\u00e9 .", "A server ."]
    assert out[1] == out[0]


@pytest.mark.parametrize(
    ("task", "text", "words"),
    [
        ("sst", "one\ttwo\n", ("line 1", "1 text ")),
        ("sts", "\n\na\tb\n\none\n", ("line 5", "2 texts", "tab")),
        ("sts", "a\t\n", ("line 1", "2 texts")),
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
    assert "task quora" in message and "not trained on it" in message and "sst" in message


@pytest.mark.parametrize("words", [["--optim", "Adagrad"], ["--evaluate", "no-such.pt"], ["@no-such.args"]])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str]) -> None:
    done = shell("multitask_classifier.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and "error: " in done.stderr and words[-1] in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("quora-train.csv", b"", ["quora-train.csv", "empty", "datasets.py"]),
        ("quora-dev.csv", None, ["quora-dev.csv", "--para_dev", "--data_dir"]),
        ("ids-sst-train.csv", None, ["ids-sst-train.csv", "--sst_train", "datasets.py --out data", "data/sample"]),
    ],
)
def test_bad_data_is_refused_before_anything_is_made(
    train: Run, script: Run, runs: Path, small_data: Path, tmp_path: Path, name: str, content: Any, wanted: list[str]
) -> None:
    path = shutil.copytree(small_data, tmp_path / "data") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    message = refusal(train, "--data_dir", "data", "--run_dir", "run")
    assert all(word in message for word in wanted)
    if name == "quora-dev.csv":
        assert name in refusal(script, "--evaluate", runs / "yin" / "best.pt", "--data_dir", "data", "--run_dir", "out")
    assert os.listdir(tmp_path) == ["data"]


def test_what_is_no_model_of_a_run_is_named(
    script: Run, tiny_flags: list[str], runs: Path, small_data: Path, tmp_path: Path
) -> None:
    make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1).fit()
    for path, words in (("run/resume.pt", "a state for --resume"), ("run", "a folder")):
        for message in (
            refusal(script, "--evaluate", path, "--data_dir", small_data),
            refusal(script, *tiny_flags, "--init_from", path, "--run_dir", "other"),
            *([refusal(ensemble.main, [path])] if path != "run" else []),
        ):
            assert f"{path}: is {words}" in message and "best.pt" in message
    content = load(runs / "yin" / "best.pt")
    del content["weights"]["pair_layer.dense.weight"]
    save(Path("odd.pt"), content)
    message = refusal(script, "--evaluate", "odd.pt", "--data_dir", small_data)
    assert "odd.pt" in message and "1 missing: pair_layer.dense.weight" in message


def test_base_weights_may_have_moved(
    script: Run, tiny_flags: list[str], tiny_bert: Path, runs: Path, small_data: Path, tmp_path: Path
) -> None:
    """A checkpoint with adapters has none; those that --pretrained names have to be the very same."""
    shutil.copytree(tiny_bert, tmp_path / "models" / "bert")
    flags = ["--train_sst", "--lora_mode", "attn-only", "--epochs", 1, "--pretrained", tmp_path / "models" / "bert"]
    make_trainer(tiny_flags, tmp_path / "run", *flags).fit()
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
    whole = ["--evaluate", runs / "sst" / "best.pt", "--data_dir", small_data, "--run_dir", "out"]
    assert "holds all of its weights" in refusal(script, *whole, "--pretrained", "moved/bert")


def test_a_finished_run_is_not_overwritten_by_accident(train: Run, tmp_path: Path) -> None:
    flags = ["--run_dir", "run", "--epochs", 1, "--train_sst"]
    train(*flags)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = (tmp_path / "run" / "best.pt").read_bytes()
    message = refusal(train, *flags)
    assert "--run_dir run" in message and "finished run" in message and "--overwrite" in message
    assert "--overwrite" in refusal(train, *flags, "--resume")
    assert (tmp_path / "run" / "best.pt").read_bytes() == before
    train(*flags, "--overwrite", "--seed", 5)
    assert (tmp_path / "run" / "best.pt").read_bytes() != before
    assert len(metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_an_unfinished_run_is_not_overwritten_by_accident(train: Run, tiny_flags: list[str], tmp_path: Path) -> None:
    """Resumed, it writes what was missing, and a copy that --filepath asks for."""
    flags = ["--epochs", 1, "--train_sst"]
    train(*flags, "--run_dir", "whole")
    make_trainer(tiny_flags, tmp_path / "run", *flags).fit()  # killed before its last scores were written
    assert "--resume goes on with it" in refusal(train, *flags, "--run_dir", "run")
    train(*flags, "--run_dir", "run", "--resume", "--filepath", tmp_path / "copies" / "best.pt")
    assert (tmp_path / "run" / "scores.json").read_bytes() == (tmp_path / "whole" / "scores.json").read_bytes()
    assert (tmp_path / "copies" / "best.pt").read_bytes() == (tmp_path / "run" / "best.pt").read_bytes()
    assert not (tmp_path / "run" / "resume.pt").exists()


def test_what_cannot_be_resumed_is_known_before_data_are_read(
    script: Run, train: Run, tiny_flags: list[str], tmp_path: Path
) -> None:
    """Nothing to resume, other flags, the state of another run, and adapters that cannot be."""
    assert "--run_dir nowhere: there is no resume.pt" in refusal(script, "--run_dir", "nowhere", "--resume")
    make_trainer(tiny_flags, tmp_path / "run").fit()
    make_trainer(tiny_flags, tmp_path / "cross", "--arch", "v2").fit()
    message = refusal(script, "--run_dir", "run", "--resume")  # without the run's own flags
    assert "began with --max_length 64 instead of 512" in message and "--lr 0.001 instead of" in message
    message = refusal(train, "--run_dir", "run", "--resume", "--arch", "v2")
    assert "--resume" in message and "--arch yin-yang instead of v2" in message
    shutil.copyfile("cross/resume.pt", "run/resume.pt")
    message = refusal(train, "--run_dir", "run", "--resume")
    assert "run/resume.pt" in message and "another arch" in message
    message = refusal(script, "--lora_dict", '{"mode": "attn-only", "r": 0}', "--data_dir", "nowhere")
    assert message.startswith("--lora_dict: ") and not (tmp_path / "nowhere").exists()


def test_a_filepath_that_cannot_be_written_is_known_before_training(train: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "run" / "config.json", "{}")
    write_text(tmp_path / "run" / "best.pt", "a former run's")
    assert "folder" in refusal(train, "--filepath", "folder", "--run_dir", "run", "--overwrite")
    assert (tmp_path / "run" / "best.pt").read_text() == "a former run's"  # and an epoch is hours on the real data


@pytest.mark.parametrize("flag", ["--filepath", "--benchmark"])
def test_a_device_is_not_replaced_by_a_file(train: Run, tmp_path: Path, flag: str) -> None:
    """Root may rename a file to /dev/null, after which nothing on the machine has one; a pipe stands for it here."""
    os.mkfifo(tmp_path / "device")
    assert f"{flag} device: is a folder or a device" in refusal(train, flag, "device", "--run_dir", "run")
    message = refusal(write_text, tmp_path / "device", "x")
    assert "device: cannot be written" in message and "it is a folder or a device" in message
    assert (tmp_path / "device").is_fifo() and os.listdir(tmp_path) == ["device"]

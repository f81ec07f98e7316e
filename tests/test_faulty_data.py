"""Faulty data from the file to the trained model and to --predict: a reason and a count, never a traceback."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import HEADERS, changed, configure, copied, make_trainer, metrics, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import multitask_classifier
from datasets import load_splits, tokenise
from models.checkpoint import load
from tasks import TASKS
from text.tokenizer import Tokenizer, load_tokenizer
from utils.errors import UserError

FILES = {task.name: task.files for task in TASKS.values()}
LINE = {"sst": b"0\ta\tA film .\t3", "para": b"0\ta\tA film ?\tA film .\t1.0", "sts": b"0\ta\tA film .\tFilms .\t2.5"}


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Tokenizer:
    return load_tokenizer(tiny_bert, 64)


@pytest.fixture(scope="module")
def best(finished_runs: Path) -> str:
    """A checkpoint that knows all tasks."""
    return str(finished_runs / "yin" / "best.pt")


def rows_of(folder: Path, task: str, split: str) -> list[bytes]:
    return (folder / FILES[task][split]).read_bytes().splitlines()


def rewrite(folder: Path, task: str, split: str, lines: list[bytes]) -> None:
    """Write the lines of one file of a data folder."""
    folder.mkdir(exist_ok=True)
    (folder / FILES[task][split]).write_bytes(b"\n".join(lines) + b"\n")


words = st.sampled_from(
    [b"film", b"a film .", b"0", b"1", b"2.5", b"9", b"-1", b"nan", b"inf", b"1e999", b"\xff", b"\xc3\xa9",
     b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\0", b'"', b'""', b"'", b"\r", b"\x1b[2J", b"x" * 300,
     b"w " * 200, b"\x7f", b""]
)  # fmt: skip
fields = st.lists(words | st.binary(max_size=5), max_size=4).map(b"".join)
lines = st.lists(fields, max_size=6).map(b"\t".join) | st.sampled_from(list(LINE.values()))
bodies = st.tuples(st.lists(lines, max_size=8), st.sampled_from([b"\n", b"\r\n", b"\n\n"])).map(
    lambda x: x[1].join(x[0])
)


@settings(max_examples=250, deadline=20_000, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(task=st.sampled_from(list(LINE)), body=bodies, bom=st.booleans(), broken=st.binary(max_size=30) | st.none())
def test_any_file_becomes_batches_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, task: str, body: bytes, bom: bool,
    broken: bytes | None,
) -> None:  # fmt: skip
    """Each row is an example or was counted; examples are tokenised and packed as for training."""
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    content = (b"\xef\xbb\xbf" if bom else b"") + HEADERS[task] + body if broken is None else broken + body
    for split in ("train", "dev"):
        (folder / FILES[task][split]).write_bytes(content)
    config, said = configure("--data_dir", folder, "--max_bad_rows", 1000, f"--train_{task}"), []
    try:
        splits = load_splits(config.data, config.tasks, {task: TASKS[task]}, ["train", "dev", "test"], said.append)
    except UserError as error:
        assert str(error).isprintable() and folder.name in str(error)
        return
    examples = splits["train"][task]
    rows = sum(line.strip(b" \r") != b"" for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")[1:])
    assert sum("skipped row" in line for line in said) == 2 * (rows - len(examples))
    assert len(set(examples.ids)) == len(examples) > 0
    assert all(text and text == " ".join(text.split()) for column in examples.texts for text in column)
    data = tokenise(splits, tokenizer, dict.fromkeys(splits["train"], "cross"), False, said.append)["train"][task]
    batch = data.batch(np.arange(len(data)))
    assert batch.num_sequences == len(examples) and batch.max_seqlen <= 64
    assert batch.input_ids.min() >= 0 and batch.input_ids.max() < tokenizer.vocab_size
    labels = data.labels(np.arange(len(data)))
    low, high = TASKS[task].label_range
    assert ((labels >= low) & (labels <= high)).all()


texts = st.lists(fields, max_size=5).map(b"\t".join)


@settings(max_examples=120, deadline=20_000, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    task=st.sampled_from(["sst", "quora", "sts"]),
    body=st.lists(texts | st.sampled_from([b"A film .", b"A film .\tFilms .", b""]), max_size=5).map(b"\n".join)
    | st.binary(max_size=60),
)
def test_any_file_to_predict_is_labelled_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], best: str, task: str,
    body: bytes,
) -> None:  # fmt: skip
    """A label for each line that is not empty, or one line of error."""
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(body)
    capsys.readouterr()
    flags = [
        "--evaluate",
        best,
        "--predict",
        str(path),
        "--task",
        task,
        "--threads",
        "1",
    ]
    try:
        multitask_classifier.main(flags)
    except UserError as error:
        assert str(error).isprintable() and str(path) in str(error)
        assert capsys.readouterr().out == ""
        return
    text = body.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    assert capsys.readouterr().out.count("\n") == sum(bool(line.strip()) for line in text.split("\n"))


def test_bytes_on_standard_input_that_are_no_text(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under some locales, Python decodes them as lone surrogates."""
    terminal = io.TextIOWrapper(io.BytesIO(b"a film \xff\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", terminal)
    flags = ["--evaluate", best, "--predict", "-", "--task", "sst"]
    message = refusal(multitask_classifier.main, flags)
    assert message.startswith("--predict -: cannot be read") and "UTF-8" in message


def test_very_long_texts_are_cut_and_counted(
    best: str, tiny_flags: list[str], small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("A film .\n" + "film " * 10_000 + "\n", encoding="utf-8")
    capsys.readouterr()
    multitask_classifier.main(["--evaluate", best, "--predict", str(path), "--task", "sst"])
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 2 and "truncated 1 sequences to 64 tokens (--max_length)" in shown.err
    rows = rows_of(small_data, "sts", "train")
    folder = shutil.copytree(small_data, tmp_path / "data")
    rewrite(folder, "sts", "train", [*rows, b"x\tlong\t" + b"film " * 10_000 + b"\t" + b"a " * 10_000 + b"\t3"])
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--data_dir", folder, "--train_sts", "--epochs", 1)
    assert "truncated 2 sequences to 64 tokens (--max_length)" in capsys.readouterr().out
    trainer.fit()
    assert len(trainer.loader.train["sts"]) == len(rows) and trainer.loader.train["sts"].lengths.max() == 128


@pytest.mark.parametrize("arch", ["yin-yang", "v2", "r4"])
def test_one_row_of_everything(tiny_flags: list[str], small_data: Path, tmp_path: Path, arch: str) -> None:
    """With figures and TensorBoard. A correlation of one row is 0."""
    for task in LINE:
        for split in ("train", "dev", "test"):
            rewrite(tmp_path / "data", task, split, rows_of(small_data, task, split)[:2])
    where = ["--data_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run")]
    multitask_classifier.main([*tiny_flags, *where, "--arch", arch])
    for line in metrics(tmp_path / "run"):
        assert line["dev"]["sts"] == {"pearson": 0.0, "spearman": 0.0}
        assert line["dev"]["sst"]["accuracy"] in (0.0, 1.0) and line["train"]["sts"]["steps"] == 1
        assert np.isfinite([task["loss"] for task in line["train"].values()]).all()
    assert len(list((tmp_path / "run" / "predictions").iterdir())) == 6
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "run" / "best.pt")["weights"].values())


def test_one_class_only(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    """All labels of a task are the same: a correlation with a constant is 0, a Pearson loss 1."""
    folder = shutil.copytree(small_data, tmp_path / "data")
    for task in LINE:
        for split in ("train", "dev"):
            head, *rows = rows_of(small_data, task, split)
            rewrite(folder, task, split, [head, *(row[: row.rindex(b"\t")] + b"\t1" for row in rows)])
    multitask_classifier.main([*tiny_flags, "--data_dir", str(folder), "--run_dir", str(tmp_path / "run")])
    for line in metrics(tmp_path / "run"):
        assert line["dev"]["sts"] == {"pearson": 0.0, "spearman": 0.0}
        assert line["train"]["sts"]["loss"] == 1.0 and line["train"]["sts"]["pearson"] == 0.0
        assert all(0 <= line["dev"][name]["accuracy"] <= 1 for name in ("sst", "para"))


@pytest.mark.parametrize("how", ["gone", "binary"])
def test_files_that_change_during_the_run_change_nothing(
    tiny_flags: list[str], small_data: Path, tmp_path: Path, how: str
) -> None:
    """Everything is read once, before training."""
    folder = shutil.copytree(small_data, tmp_path / "data")

    def change(line: str) -> None:
        if line.startswith("\nEpoch 1"):
            for path in folder.iterdir():
                path.unlink() if how == "gone" else path.write_bytes(b"\0" * 99)

    stays = make_trainer(tiny_flags, tmp_path / "stays", "--epochs", 3)
    stays.fit()
    changes = make_trainer(tiny_flags, tmp_path / "changes", "--data_dir", folder, "--epochs", 3)
    changes.say = change
    changes.fit()
    assert metrics(tmp_path / "changes") == metrics(tmp_path / "stays")
    assert changed(copied(stays.model), copied(changes.model)) == set()

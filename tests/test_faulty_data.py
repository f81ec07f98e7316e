"""Faulty data from the file to the trained model and to --predict: a reason and a count, never a traceback."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_datasets import HEADERS
from test_training import changed, copied, load, make_trainer, metrics

import multitask_classifier
from cli.parser import parse
from config import Config
from datasets import load_splits, tokenise
from tasks import TASKS
from text.tokenizer import Tokenizer, load_tokenizer
from training.trainer import Trainer
from utils.errors import UserError

FILES = {task.name: task.files for task in TASKS.values()}
LINE = {"sst": b"0\ta\tA film .\t3", "para": b"0\ta\tA film ?\tA film .\t1.0", "sts": b"0\ta\tA film .\tFilms .\t2.5"}


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Tokenizer:
    return load_tokenizer(tiny_bert, 64)


def config_of(data: Path, *more: object) -> Config:
    return parse(["--data_dir", str(data), "--max_bad_rows", "1000", *map(str, more)], TASKS, "test", "Test.")


def rows_of(folder: Path, task: str, split: str) -> list[bytes]:
    return (folder / FILES[task][split]).read_bytes().splitlines()


def rewrite(source: Path, folder: Path, task: str, split: str, lines: list[bytes], end: bytes = b"\n") -> Path:
    """A copy of a data folder in which one file has these lines."""
    if not folder.exists():
        shutil.copytree(source, folder)
    (folder / FILES[task][split]).write_bytes(end.join(lines) + end)
    return folder


def train(flags: list[str], run: Path, data: Path, *more: object) -> tuple[Trainer, str]:
    """A finished run on other data, and what it said."""
    said: list[str] = []
    trainer = make_trainer(flags, run, "--data_dir", data, "--epochs", 1, *more, say=said.append)
    trainer.fit()
    return trainer, "".join(said)


# ------------------------------------------------------------------------------------------------- any bytes whatsoever

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
    """Read, counted, tokenised and packed as for training; each row is an example or was counted."""
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    content = (b"\xef\xbb\xbf" if bom else b"") + HEADERS[task] + body if broken is None else broken + body
    for split in ("train", "dev"):
        (folder / FILES[task][split]).write_bytes(content)
    config, said = config_of(folder, f"--train_{task}"), []
    try:
        splits = load_splits(config.data, config.tasks, {task: TASKS[task]}, ["train", "dev", "test"], said.append)
    except UserError as error:
        assert str(error).isprintable() and folder.name in str(error)
        return
    examples = splits["train"][task]
    rows = content.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").count(b"\n")
    assert sum("skipped row" in line for line in said) == 2 * (rows - len(examples))
    data = tokenise(splits, tokenizer, "cross", False, said.append)["train"][task]
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
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    trained: Trainer,
    task: str,
    body: bytes,
) -> None:
    """The whole of --predict, checkpoint and model included: a label for each line that is not empty, or one line."""
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(body)
    capsys.readouterr()
    try:
        multitask_classifier.main(
            ["--evaluate", str(trained.run.best), "--predict", str(path), "--task", task, "--threads", "1"]
        )
    except UserError as error:
        assert str(error).isprintable() and str(path) in str(error)
        assert capsys.readouterr().out == ""
        return
    text = body.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    assert capsys.readouterr().out.count("\n") == sum(bool(line.strip()) for line in text.split("\n"))


def test_a_terminal_whose_bytes_are_no_text(trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own decoding hands them on as lone surrogates under some locales."""
    import io
    import sys

    terminal = io.TextIOWrapper(io.BytesIO(b"a film \xff\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(UserError, match="^--predict -: cannot be read .*UTF-8"):
        multitask_classifier.main(["--evaluate", str(trained.run.best), "--predict", "-", "--task", "sst"])


def test_long_lines_to_predict_are_cut_and_counted(trained: Trainer, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("A film .\n" + "film " * 10_000 + "\n", encoding="utf-8")
    capsys.readouterr()
    multitask_classifier.main(["--evaluate", str(trained.run.best), "--predict", str(path), "--task", "sst"])
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 2 and "truncated 1 sequences to 64 tokens (--max_length)" in shown.err


# --------------------------------------------------------------------------------------- one fault, and a run after it


def spoil(rows: list[bytes], at: int, change: Callable[[bytes], bytes]) -> list[bytes]:
    return [*rows[:at], change(rows[at]), *rows[at + 1 :]]


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "bad UTF-8": (lambda row: row.replace(b" ", b"\xff", 1), "is not UTF-8 (byte 0xff"),
    "NUL": (lambda row: row.replace(b" ", b"\0", 1), "holds a NUL byte"),
    "open quote": (lambda row: row.replace(b"\t", b'\t"', 2), "has a broken quote"),
    "NaN label": (lambda row: row[: row.rindex(b"\t")] + b"\tnan", "nan is outside 0 to"),
    "infinite label": (lambda row: row[: row.rindex(b"\t")] + b"\tinf", "inf is outside 0 to"),
    "negative label": (lambda row: row[: row.rindex(b"\t")] + b"\t-1", "-1 is outside 0 to"),
    "label out of range": (lambda row: row[: row.rindex(b"\t")] + b"\t17", "17 is outside 0 to"),
    "a label of words": (lambda row: row[: row.rindex(b"\t")] + b"\tgood", "'good' is not a number"),
    "no label": (lambda row: row[: row.rindex(b"\t")] + b"\t", "is missing"),
    "an empty line": (lambda row: b"", "too few fields"),
    "a lone surrogate": (lambda row: row.replace(b" ", b"\xed\xa0\x80", 1), "is not UTF-8 (byte 0xed"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("task", list(LINE))
def test_one_faulty_row_is_told_counted_and_left_out(small_data: Path, tmp_path: Path, task: str, fault: str) -> None:
    """The other rows are those of the file without it."""
    change, reason = FAULTS[fault]
    rows = rows_of(small_data, task, "train")
    faulty = rewrite(small_data, tmp_path / "faulty", task, "train", spoil(rows, 7, change))
    without = rewrite(small_data, tmp_path / "without", task, "train", [*rows[:7], *rows[8:]])
    found = []
    for folder in (faulty, without):
        said: list[str] = []
        config = config_of(folder, f"--train_{task}")
        splits = load_splits(config.data, config.tasks, {task: TASKS[task]}, ["train"], said.append)
        found.append((splits["train"][task], said))
    (examples, said), (wanted, silent) = found
    assert examples.ids == wanted.ids and examples.texts == wanted.texts and silent == []
    assert examples.labels is not None and np.array_equal(examples.labels, wanted.labels)
    place = f"{folder.parent / 'faulty' / FILES[task]['train']}:8: "
    assert len(said) == 2 and said[0].startswith(f"skipped row {place}") and reason in said[0]
    assert said[1] == "skipped 1 unreadable rows in all (--max_bad_rows 1000)"


def test_duplicate_ids_keep_the_first(small_data: Path, tmp_path: Path) -> None:
    rows = rows_of(small_data, "sst", "train")
    folder = rewrite(small_data, tmp_path / "data", "sst", "train", [*rows, rows[3]])
    said: list[str] = []
    config = config_of(folder, "--train_sst")
    splits = load_splits(config.data, config.tasks, {"sst": TASKS["sst"]}, ["train"], said.append)
    assert len(splits["train"]["sst"]) == len(rows) - 1
    assert f":{len(rows) + 1}: id " in said[0] and "was already used in line 4" in said[0]


def test_line_ends_and_byte_order_marks_train_the_same(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    plain, _ = train(tiny_flags, tmp_path / "plain", small_data, "--train_sst")
    rows = rows_of(small_data, "sst", "train")
    folder = rewrite(small_data, tmp_path / "data", "sst", "train", [b"\xef\xbb\xbf" + rows[0], *rows[1:]], b"\r\n")
    other, _ = train(tiny_flags, tmp_path / "other", folder, "--train_sst")
    assert changed(copied(plain.model), copied(other.model)) == set()


def test_sentences_of_ten_thousand_words_are_cut_and_counted(
    tiny_flags: list[str], small_data: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = rows_of(small_data, "sts", "train")
    long = b"x\tlong\t" + b"film " * 10_000 + b"\t" + b"a " * 10_000 + b"\t3"
    folder = rewrite(small_data, tmp_path / "data", "sts", "train", [*rows, long])
    capsys.readouterr()
    trainer, _ = train(tiny_flags, tmp_path / "run", folder, "--train_sts")
    assert "truncated 2 sequences to 64 tokens (--max_length)" in capsys.readouterr().out
    assert len(trainer.train_data["sts"]) == len(rows) and trainer.train_data["sts"].lengths.max() == 128


# ----------------------------------------------------------------------------------------------------- very little data


@pytest.mark.parametrize("arch", ["yin-yang", "v2", "r4"])
def test_one_row_of_everything(tiny_flags: list[str], small_data: Path, tmp_path: Path, arch: str) -> None:
    """Train, dev and test of one row each, figures and TensorBoard too; a correlation of one row is 0."""
    folder = tmp_path / "data"
    for task in LINE:
        for split in ("train", "dev", "test"):
            rewrite(small_data, folder, task, split, rows_of(small_data, task, split)[:2])
    flags = [*tiny_flags, "--data_dir", str(folder), "--run_dir", str(tmp_path / "run"), "--arch", arch]
    multitask_classifier.main(flags)
    for line in metrics(tmp_path / "run"):
        assert line["dev"]["sts"] == {"pearson": 0.0, "spearman": 0.0}
        assert line["dev"]["sst"]["accuracy"] in (0.0, 1.0) and line["train"]["sts"]["steps"] == 1
        assert np.isfinite([own["loss"] for own in line["train"].values()]).all()
    names = sorted(path.name for path in (tmp_path / "run" / "predictions").iterdir())
    assert len(names) == 6
    weights = load(tmp_path / "run" / "best.pt")["weights"]
    assert all(own.isfinite().all() for own in weights.values())


@pytest.mark.parametrize("splits", [("train",), ("dev",), ("train", "dev")])
def test_one_class_only(tiny_flags: list[str], small_data: Path, tmp_path: Path, splits: tuple[str, ...]) -> None:
    """Every label of every task the same: a correlation with a constant is 0, a Pearson loss 1."""
    folder = tmp_path / "data"
    for task in LINE:
        for split in splits:
            head, *rows = rows_of(small_data, task, split)
            rewrite(small_data, folder, task, split, [head, *(row[: row.rindex(b"\t")] + b"\t1" for row in rows)])
    multitask_classifier.main([*tiny_flags, "--data_dir", str(folder), "--run_dir", str(tmp_path / "run")])
    for line in metrics(tmp_path / "run"):
        if "dev" in splits:
            assert line["dev"]["sts"] == {"pearson": 0.0, "spearman": 0.0}
        if "train" in splits:
            assert line["train"]["sts"]["loss"] == 1.0 and line["train"]["sts"]["pearson"] == 0.0
        scores = [line["dev"][name]["accuracy"] for name in ("sst", "para")]
        assert all(0 <= score <= 1 for score in scores) and np.isfinite(line["dev"]["score"])


# ----------------------------------------------------------------------------------------------- files that do not stay


@pytest.mark.parametrize("how", ["gone", "other rows", "binary", "shorter"])
def test_files_that_change_during_the_run_change_nothing(
    tiny_flags: list[str], small_data: Path, tmp_path: Path, how: str
) -> None:
    """Everything is read once, before training; the run ends as if nothing had happened."""
    folder = tmp_path / "data"
    shutil.copytree(small_data, folder)

    def change(text: str) -> None:
        if not text.startswith("\nEpoch 1"):
            return
        for path in folder.iterdir():
            content = path.read_bytes()
            if how == "gone":
                path.unlink()
            else:
                path.write_bytes({"other rows": content.upper(), "binary": b"\0" * 99, "shorter": content[:50]}[how])

    flags = ["--data_dir", folder, "--epochs", 3]
    stays = make_trainer(tiny_flags, tmp_path / "stays", "--epochs", 3)
    stays.fit()
    changes = make_trainer(tiny_flags, tmp_path / "changes", *flags, say=change)
    changes.fit()
    assert metrics(tmp_path / "changes") == metrics(tmp_path / "stays")
    assert changed(copied(stays.model), copied(changes.model)) == set()

"""What is kept of large files between runs: the same as fresh, made anew when anything changes, never an obstacle."""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import cut

import datasets
import multitask_classifier
from datasets import BadRows, Examples, TaskData, read_examples
from tasks import PARA, SST, STS, Task
from text import rows as text_rows
from text import token_cache as cache
from text.cleaning import Cleaner
from text.token_cache import CODE, Arrays, cache_key, cached, pack_texts, unpack_texts
from text.tokenizer import TokenArrays, Tokenizer, load_tokenizer
from utils.errors import UserError
from utils.files import cache_folder

TEXTS = (["the plot is n't good", "a film", "it works !"], ["no plot", "the wolves ran " * 30, "a film"])
ROWS = "\tid\tsentence1\tsentence2\tsimilarity\n0\té1\tOne\tZwei é\t2.5\n1\tb\tbad\t\t1\n2\tc\tThree\tFour\t0\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where arrays are kept; not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minbert" / "arrays"


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows from small files is kept too."""
    monkeypatch.setattr(text_rows, "LARGE_FILE", 1)
    monkeypatch.setattr(datasets, "MANY_TEXTS", 1)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Tokenizer:
    return load_tokenizer(tiny_bert, 64)


@pytest.fixture(scope="module")
def cleaner(nltk_data: Path) -> Cleaner:
    return Cleaner()


def fail(*arguments: object) -> Arrays:
    raise AssertionError("made again")


# ---------------------------------------------------------------------------------------------------------- any arrays


def test_arrays_come_back_as_they_were(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = {"a/0": np.arange(5, dtype=np.int32), "b": np.zeros((0, 2), np.float32), "c": np.array(7)}
    assert cached("kind", "k" * 64, lambda: arrays) is arrays
    with caplog.at_level(logging.INFO, "minbert"):
        found = cached("kind", "k" * 64, fail)
    assert caplog.messages == [f"kind from {folder / 'kind-'}{'k' * 32}.npz"]
    assert list(found) == list(arrays)
    for name, own in arrays.items():
        assert found[name].dtype == own.dtype and found[name].shape == own.shape
        np.testing.assert_array_equal(found[name], own)
    assert len(os.listdir(folder)) == 1


@pytest.mark.parametrize("texts", [[], ["a"], ["a", "é\u2028 \u0000 b", "电影"]])
def test_texts_come_back_as_they_were(texts: list[str]) -> None:
    assert unpack_texts(pack_texts(texts)) == texts


def test_a_key_holds_parts_apart_and_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [cache_key("ab", "c"), cache_key("a", "bc"), cache_key("abc"), cache_key("ab", "c", ""), cache_key(b"ab", 5)]
    for name in CODE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(cache.ROOT / name, tmp_path / name)
    monkeypatch.setattr(cache, "ROOT", tmp_path)
    assert cache_key("ab", "c") == keys[0]
    for name in CODE:
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write("# another rule\n")
        keys.append(cache_key("ab", "c"))
    assert len(set(keys)) == len(keys)
    assert len(cache_key("a lone surrogate \ud800")) == 64


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "text", "foreign", "pickled"])
def test_a_damaged_file_is_made_again(folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    arrays = {"x": np.arange(100), "y": np.ones(3)}
    cached("kind", "k" * 64, lambda: arrays)
    [path] = folder.iterdir()
    whole = path.read_bytes()
    at = whole.index(arrays["x"].tobytes())
    contents = {
        "empty": b"",
        "cut": whole[:-40],
        "text": b"no archive",
        "changed": whole[:at] + b"\7" + whole[at + 1 :],
    }
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "foreign":
        np.savez(path, x=arrays["x"])
    else:
        np.savez(path, names=np.array("x"), x=np.array([{}]))
    with caplog.at_level(logging.INFO, "minbert"):
        assert cached("kind", "k" * 64, lambda: arrays) is arrays
    assert f"{path}: cannot be read (" in caplog.text and "is made again" in caplog.text
    assert os.listdir(folder) == [path.name]
    np.testing.assert_array_equal(cached("kind", "k" * 64, fail)["x"], arrays["x"])


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file in the way", encoding="utf-8")
    with caplog.at_level(logging.INFO, "minbert"):
        assert cached("kind", "k" * 64, lambda: {"x": np.ones(3)})["x"].sum() == 3
    assert "kind not kept for the next run: " in caplog.text


def test_the_longest_unused_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"x": np.arange(100)}
    cached("kind", "a" * 64, lambda: arrays)
    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(cache, "MAX_BYTES", 2 * size)
    cached("kind", "b" * 64, lambda: arrays)
    for name, age in (("a", 200), ("b", 100)):
        path = folder / f"kind-{name * 32}.npz"
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    cached("kind", "a" * 64, fail)  # used again
    cached("kind", "c" * 64, lambda: arrays)
    assert sorted(path.name[5] for path in folder.iterdir()) == ["a", "c"]


# ------------------------------------------------------------------------------------------------------- rows of a file


def read(path: Path, task: Task = STS, split: str = "train") -> tuple[Examples, list[str]]:
    reports: list[str] = []
    return read_examples(path, task, split, BadRows(5, reports.append)), reports


def columns(examples: Examples) -> tuple:
    labels = None if examples.labels is None else (examples.labels.dtype, examples.labels.tolist())
    return examples.ids, examples.texts, labels


@pytest.mark.parametrize(("task", "split"), [(STS, "train"), (PARA, "train"), (SST, "train"), (STS, "test")])
def test_rows_are_the_same_with_their_reports(
    folder: Path, tmp_path: Path, task: Task, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.csv"
    header = ["id", *task.text_columns, *([task.label_column] if split == "train" else [])]
    labels = ["1", "0", "x", "1"] if split == "train" else [""] * 4
    texts = [["One", "Two"], ["Zwei é", "B"], ["C", "C"], ["", "D"]]
    rows = [[f"id{i}", *own[: len(task.text_columns)], labels[i]][: len(header)] for i, own in enumerate(texts)]
    path.write_text("\n".join("\t".join(row) for row in [header, *rows]), encoding="utf-8")
    fresh, reports = read(path, task, split)
    assert len(fresh) == (2 if split == "train" else 3) and len(reports) == 4 - len(fresh) and not folder.exists()
    monkeypatch.setattr(text_rows, "LARGE_FILE", 1)
    assert columns(read(path, task, split)[0]) == columns(fresh)
    monkeypatch.setattr(text_rows.Rows, "parse", fail)
    kept, again = read(path, task, split)
    assert columns(kept) == columns(fresh) and again == reports
    moved = path.rename(tmp_path / "moved.csv")
    kept, again = read(moved, task, split)
    assert columns(kept) == columns(fresh) and again == [line.replace("file.csv", "moved.csv") for line in reports]


@pytest.mark.usefixtures("always")
def test_rows_follow_the_file_and_the_task(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text(ROWS, encoding="utf-8")
    first, _ = read(path)
    path.write_text(ROWS.replace("2.5", "3.5"), encoding="utf-8")
    second, _ = read(path)
    assert first.labels is not None and second.labels is not None
    assert (first.labels[0], second.labels[0]) == (2.5, 3.5)
    narrow = replace(STS, label_range=(0, 3))
    assert read(path, narrow)[0].ids == ["c"]
    assert read(path, replace(STS, text_columns=("sentence2", "sentence1")))[0].texts[0] == ["Zwei é", "Four"]
    assert len(os.listdir(folder)) == 4


@pytest.mark.usefixtures("always")
def test_refusals_are_the_same(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text(ROWS.split("\n")[0] + "\n0\ta\tA\tB\t9\n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"none of its 1 rows can be read \(line 2: similarity 9 is outside 0 to 5\)"
        ):
            read(path)


# ------------------------------------------------------------------------------------------------------------ token ids


def pairs(texts: tuple[list[str], ...] = TEXTS) -> Examples:
    return Examples(STS, "train", Path("x"), [str(i) for i in range(len(texts[0]))], texts, None)


def assert_same(found: Sequence[TokenArrays], wanted: Sequence[TokenArrays]) -> None:
    assert len(found) == len(wanted)
    for own, other in zip(found, wanted, strict=True):
        for field in fields(TokenArrays):
            a, b = getattr(own, field.name), getattr(other, field.name)
            assert type(a) is type(b) and np.array_equal(a, b)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype


@pytest.mark.parametrize("encoding", ["siamese", "cross"])
@pytest.mark.parametrize("cleaned", [False, True])
def test_token_ids_are_the_same(
    folder: Path, tokenizer: Tokenizer, cleaner: Cleaner, encoding: str, cleaned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = cleaner if cleaned else None
    wanted = TaskData(pairs(), tokenizer, encoding, own).tokens
    assert not folder.exists()
    monkeypatch.setattr(datasets, "MANY_TEXTS", 1)
    assert_same(TaskData(pairs(), tokenizer, encoding, own).tokens, wanted)
    monkeypatch.setattr(Tokenizer, "encode", fail)
    found = TaskData(pairs(), tokenizer, encoding, own)
    assert_same(found.tokens, wanted)
    assert found.truncated == sum(tokens.truncated for tokens in wanted) == (0 if cleaned else 1)


def test_many_texts_are_kept_and_few_are_not(folder: Path, tokenizer: Tokenizer) -> None:
    for count in (datasets.MANY_TEXTS - 1, datasets.MANY_TEXTS):
        examples = Examples(SST, "train", Path("x"), ["id"] * count, (["a film"] * count,), None)
        TaskData(examples, tokenizer, "siamese")
        assert folder.exists() == (count == datasets.MANY_TEXTS)
    half = datasets.MANY_TEXTS // 2
    TaskData(pairs((["a film"] * half, ["no plot"] * half)), tokenizer, "siamese")
    assert len(os.listdir(folder)) == 2


@pytest.mark.usefixtures("always")
def test_token_ids_follow_texts_tokenizer_and_cleaning(
    folder: Path, tokenizer: Tokenizer, cleaner: Cleaner, tiny_bert: Path, tmp_path: Path
) -> None:
    first, second = TEXTS
    other_words = shutil.copytree(tiny_bert, tmp_path / "bert")
    (other_words / "vocab.txt").write_text((tiny_bert / "vocab.txt").read_text() + "wolves\n", encoding="utf-8")
    cased = shutil.copytree(tiny_bert, tmp_path / "cased")
    (cased / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    other_cleaner = Cleaner()
    other_cleaner._stopwords |= {"film"}
    cases = [
        (TEXTS, tokenizer, "siamese", None),
        (([*first[:2], "it works ?"], second), tokenizer, "siamese", None),
        ((second, first), tokenizer, "siamese", None),
        ((first[::-1], second), tokenizer, "siamese", None),
        (TEXTS, load_tokenizer(tiny_bert, 63), "siamese", None),
        (TEXTS, load_tokenizer(other_words, 64), "siamese", None),
        (TEXTS, load_tokenizer(cased, 64), "siamese", None),
        (TEXTS, tokenizer, "cross", None),
        (TEXTS, tokenizer, "siamese", cleaner),
        (TEXTS, tokenizer, "siamese", other_cleaner),
    ]
    for count, (texts, own_tokenizer, encoding, own_cleaner) in enumerate(cases, start=1):
        TaskData(pairs(texts), own_tokenizer, encoding, own_cleaner)
        assert len(os.listdir(folder)) == count
    TaskData(pairs(), load_tokenizer(tiny_bert, 64), "siamese", None)  # the same words from another object
    TaskData(replace(pairs(), path=Path("y"), split="dev", labels=np.ones(3, np.float32)), tokenizer, "siamese")
    assert len(os.listdir(folder)) == len(cases)


# --------------------------------------------------------------------------------------------------------- a whole run


def test_runs_are_the_same_with_and_without(
    folder: Path, tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data = cut(tmp_path / "data", 20)
    with (data / "quora-train.csv").open("a", encoding="utf-8") as file:
        file.write("20\tbad\tno label\tat all\t\n")

    def run(name: str) -> tuple[bytes, dict[str, bytes], str]:
        capsys.readouterr()
        flags = [*tiny_flags, "--data_dir", str(data), "--no_tensorboard", "--run_dir", str(tmp_path / name)]
        multitask_classifier.main(flags)
        predictions = {path.name: path.read_bytes() for path in (tmp_path / name / "predictions").iterdir()}
        reports = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
        return (tmp_path / name / "metrics.jsonl").read_bytes(), predictions, "\n".join(reports)

    without = run("without")
    assert "quora-train.csv:22: is_duplicate is missing" in without[2] and not folder.exists()
    monkeypatch.setattr(text_rows, "LARGE_FILE", 1)
    monkeypatch.setattr(datasets, "MANY_TEXTS", 1)
    assert run("first") == without
    assert len(os.listdir(folder)) == 2 * 9
    monkeypatch.setattr(Tokenizer, "encode", fail)
    monkeypatch.setattr(text_rows.Rows, "parse", fail)
    assert run("kept") == without


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number for which no user is known."""

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/place")
    assert cache_folder() == Path("/place/minbert")


@pytest.mark.usefixtures("always")
def test_token_ids_follow_the_library(folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for count, version in enumerate([tokenizers.__version__, "99.0"], start=1):
        monkeypatch.setattr(tokenizers, "__version__", version)
        TaskData(pairs(), tokenizer, "siamese", None)
        assert len(os.listdir(folder)) == count

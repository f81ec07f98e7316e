"""Arrays kept between runs: they are the same as fresh ones, follow everything they depend on, and never stop a run."""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from helpers import HEADERS, fail

import datasets
from datasets import BadRows, Examples, TaskData, read_examples
from tasks import PARA, SST, STS, Task
from text import rows as text_rows
from text import token_cache
from text.token_cache import CODE, cache_key, cached, pack_texts, unpack_texts
from text.tokenizer import TokenArrays, Tokenizer, load_tokenizer
from utils.errors import UserError
from utils.files import cache_folder

TEXTS = (["the plot is n't good", "a film", "it works !"], ["no plot", "the wolves ran " * 30, "a film"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept arrays, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minbert" / "arrays"


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the rows and token ids of small files too."""
    monkeypatch.setattr(text_rows, "LARGE_FILE", 1)
    monkeypatch.setattr(datasets, "MANY_TEXTS", 1)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Tokenizer:
    return load_tokenizer(tiny_bert, 64)


def make_cleaner(word: str) -> SimpleNamespace:
    """Return a cleaner that removes one word."""
    return SimpleNamespace(clean=lambda text: text.replace(word, "") or text, fingerprint=word)


def test_arrays_come_back_as_they_were(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = {"a/0": np.arange(5, dtype=np.int32), "b": np.zeros((0, 2), np.float32), "c": np.array(7)}
    assert cached("kind", "k" * 64, lambda: arrays) is arrays
    with caplog.at_level(logging.INFO, "minbert"):
        found = cached("kind", "k" * 64, fail)
    assert caplog.messages == [f"kind from {folder / 'kind-'}{'k' * 32}.npz"]
    assert list(found) == list(arrays) and len(os.listdir(folder)) == 1
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    for texts in ([], ["a"], ["a", "é\u2028 \u0000 b", "电影"]):
        assert unpack_texts(pack_texts(texts)) == texts


def test_a_key_separates_its_parts_and_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [cache_key("ab", "c"), cache_key("a", "bc"), cache_key("abc"), cache_key("ab", "c", ""), cache_key(b"ab", 5)]
    for name in CODE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(token_cache.ROOT / name, tmp_path / name)
    monkeypatch.setattr(token_cache, "ROOT", tmp_path)
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
    contents = {"empty": b"", "cut": whole[:-40], "text": b"no archive"}
    contents["changed"] = whole[:at] + b"\7" + whole[at + 1 :]
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


def test_a_folder_that_cannot_be_written_stops_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file in the way", encoding="utf-8")
    with caplog.at_level(logging.INFO, "minbert"):
        assert cached("kind", "k" * 64, lambda: {"x": np.ones(3)})["x"].sum() == 3
    assert "kind not kept for the next run: " in caplog.text
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as in a container whose user has no entry
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        cache_folder()


def test_the_file_that_was_unused_for_longest_is_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"x": np.arange(100)}
    cached("kind", "a" * 64, lambda: arrays)
    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(token_cache, "MAX_BYTES", 2 * size)
    cached("kind", "b" * 64, lambda: arrays)
    for name, age in (("a", 200), ("b", 100)):
        path = folder / f"kind-{name * 32}.npz"
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    cached("kind", "a" * 64, fail)  # used again
    cached("kind", "c" * 64, lambda: arrays)
    assert sorted(path.name[5] for path in folder.iterdir()) == ["a", "c"]


def read(path: Path, task: Task = STS, split: str = "train") -> tuple[tuple, list[str]]:
    """Return the columns of a file, and what is reported of its other rows."""
    reports: list[str] = []
    examples = read_examples(path, task, split, BadRows(5, reports.append))
    labels = None if examples.labels is None else (examples.labels.dtype, examples.labels.tolist())
    return (examples.ids, examples.texts, labels), reports


@pytest.mark.parametrize(("task", "split"), [(STS, "train"), (PARA, "train"), (SST, "train"), (STS, "test")])
def test_rows_are_the_same_with_their_reports(
    folder: Path, tmp_path: Path, task: Task, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.csv"
    header = ["id", *task.text_columns, *([task.label_column] if split == "train" else [])]
    labels = ["1", "0", "x", "1"] if split == "train" else [""] * 4
    texts = [["One", "Two"], ["Zwei é", "B"], ["C", "C"], ["", "D"]]
    rows = [[f"id{i}", *row[: len(task.text_columns)], labels[i]][: len(header)] for i, row in enumerate(texts)]
    path.write_text("\n".join("\t".join(row) for row in [header, *rows]), encoding="utf-8")
    fresh, reports = read(path, task, split)
    assert len(reports) == 4 - len(fresh[0]) == (2 if split == "train" else 1) and not folder.exists()
    monkeypatch.setattr(text_rows, "LARGE_FILE", 1)
    assert read(path, task, split) == (fresh, reports)
    monkeypatch.setattr(text_rows.Rows, "parse", fail)
    moved = path.rename(tmp_path / "moved.csv")
    assert read(moved, task, split) == (fresh, [line.replace("file.csv", "moved.csv") for line in reports])


@pytest.mark.usefixtures("always")
def test_rows_follow_the_file_and_the_task(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    content = HEADERS["sts"] + b"0\ta\tOne\tTwo\t2.5\n2\tc\tThree\tFour\t0\n"
    path.write_bytes(content)
    assert read(path)[0][2] == (np.float32, [2.5, 0])
    path.write_bytes(content.replace(b"2.5", b"3.5"))
    assert read(path)[0][2] == (np.float32, [3.5, 0])
    assert read(path, replace(STS, label_range=(0, 3)))[0][0] == ["c"]
    assert read(path, replace(STS, text_columns=("sentence2", "sentence1")))[0][1][0] == ["Two", "Four"]
    assert len(os.listdir(folder)) == 4


@pytest.mark.usefixtures("always")
def test_refusals_are_the_same(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes(HEADERS["sts"] + b"0\ta\tA\tB\t9\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of its 1 rows can be read \(line 2: similarity 9 is outside 0 to"):
            read(path)


def pairs(texts: tuple[list[str], ...] = TEXTS) -> Examples:
    return Examples(STS, "train", Path("x"), [str(i) for i in range(len(texts[0]))], texts, None)


def assert_same(found: Sequence[TokenArrays], wanted: Sequence[TokenArrays]) -> None:
    for tokens, other in zip(found, wanted, strict=True):
        assert tokens.truncated == other.truncated
        for name in ("input_ids", "offsets", "second_start"):
            array, wanted_array = getattr(tokens, name), getattr(other, name)
            assert array.dtype == wanted_array.dtype and np.array_equal(array, wanted_array)


@pytest.mark.parametrize("encoding", ["siamese", "cross"])
@pytest.mark.parametrize("cleaner", [None, make_cleaner("wolves ran ")])
def test_token_ids_are_the_same(
    folder: Path, tokenizer: Tokenizer, encoding: str, cleaner: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = TaskData(pairs(), tokenizer, encoding, cleaner).tokens
    assert not folder.exists()
    monkeypatch.setattr(datasets, "MANY_TEXTS", 1)
    assert_same(TaskData(pairs(), tokenizer, encoding, cleaner).tokens, wanted)
    monkeypatch.setattr(Tokenizer, "encode", fail)
    kept = TaskData(pairs(), tokenizer, encoding, cleaner)
    assert_same(kept.tokens, wanted)
    assert kept.truncated == (0 if cleaner else 1)


def test_many_texts_are_kept_and_few_are_not(folder: Path, tokenizer: Tokenizer) -> None:
    for count in (datasets.MANY_TEXTS - 1, datasets.MANY_TEXTS):
        examples = Examples(SST, "train", Path("x"), ["id"] * count, (["a film"] * count,), None)
        TaskData(examples, tokenizer, "siamese")
        assert folder.exists() == (count == datasets.MANY_TEXTS)
    half = datasets.MANY_TEXTS // 2
    TaskData(pairs((["a film"] * half, ["no plot"] * half)), tokenizer, "siamese")
    assert len(os.listdir(folder)) == 2


@pytest.mark.usefixtures("always")
def test_token_ids_follow_texts_tokenizer_library_and_cleaning(
    folder: Path, tokenizer: Tokenizer, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = TEXTS
    other_words = shutil.copytree(tiny_bert, tmp_path / "bert")
    (other_words / "vocab.txt").write_text((tiny_bert / "vocab.txt").read_text() + "wolves\n", encoding="utf-8")
    cased = shutil.copytree(tiny_bert, tmp_path / "cased")
    (cased / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    cases = [
        (TEXTS, tokenizer, "siamese", None),
        (([*first[:2], "it works ?"], second), tokenizer, "siamese", None),
        ((second, first), tokenizer, "siamese", None),
        ((first[::-1], second), tokenizer, "siamese", None),
        (TEXTS, load_tokenizer(tiny_bert, 63), "siamese", None),
        (TEXTS, load_tokenizer(other_words, 64), "siamese", None),
        (TEXTS, load_tokenizer(cased, 64), "siamese", None),
        (TEXTS, tokenizer, "cross", None),
        (TEXTS, tokenizer, "siamese", make_cleaner("the")),
        (TEXTS, tokenizer, "siamese", make_cleaner("film")),
    ]
    for count, (texts, chosen, encoding, cleaner) in enumerate(cases, start=1):
        TaskData(pairs(texts), chosen, encoding, cleaner)
        assert len(os.listdir(folder)) == count
    TaskData(pairs(), load_tokenizer(tiny_bert, 64), "siamese")  # the same words from another object
    TaskData(replace(pairs(), path=Path("y"), split="dev", labels=np.ones(3, np.float32)), tokenizer, "siamese")
    assert len(os.listdir(folder)) == len(cases)
    monkeypatch.setattr(tokenizers, "__version__", "99.0")
    TaskData(pairs(), tokenizer, "siamese")
    assert len(os.listdir(folder)) == len(cases) + 1

"""Pairs of duplicate questions in their public forms become positive examples of a training file."""

import gzip
import json
from pathlib import Path

import pytest
from helpers import shell

from config import DataOptions, TaskOptions
from datasets import BadRows, load_split
from tasks import PARA

PAIRS = [("How do I  exit vim?", 'Leaving "vi"'), ("a", "b"), ("Was ist Äther?", "What is\naether?")]
TSV = "".join("\t".join(" ".join(text.split()) for text in pair) + "\n" for pair in PAIRS) + "only one text\n\tb\n"
JSONL = "".join(json.dumps(pair) + "\n" for pair in PAIRS) + '["a", "b", "c"]\n["a", 3]\n[oops\n'


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.tsv.gz", "pairs.jsonl", "pairs.jsonl.gz"])
def test_both_public_forms(tmp_path: Path, small_data: Path, name: str) -> None:
    content = (JSONL if "jsonl" in name else TSV).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    out = tmp_path / "new" / "more.csv"
    done = shell("data/convert_duplicates.py", tmp_path / name, "--out", out)
    assert done.returncode == 0 and done.stdout.startswith(f"3 pairs in {out}; {3 if 'jsonl' in name else 2} lines")
    options = TaskOptions(train=str(small_data / "quora-train.csv"), extra=(str(out),))
    found = load_split(DataOptions(), options, PARA, "train", BadRows(0, print))
    assert found is not None and found.labels is not None and found.labels[-3:].tolist() == [1, 1, 1]
    texts = [(first, second) for first, second in zip(*found.texts, strict=True)][-3:]
    assert texts == [("How do I exit vim?", 'Leaving "vi"'), ("a", "b"), ("Was ist Äther?", "What is aether?")]


def test_the_first_pairs_are_taken(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text(TSV, encoding="utf-8")
    done = shell("data/convert_duplicates.py", tmp_path / "pairs.tsv", "--out", tmp_path / "o.csv", "--count", 2)
    assert "too small" in shell("data/convert_duplicates.py", tmp_path / "pairs.tsv", "--count", 0).stderr
    assert done.stdout.startswith("2 pairs") and len((tmp_path / "o.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("content", [None, b"no pair\n", b"\x1f\x8b\x08 damaged", b"\xff\xfe\t\xff\n"])
def test_what_cannot_be_used_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "pairs").write_bytes(content)
    done = shell("data/convert_duplicates.py", tmp_path / "pairs", "--out", tmp_path / "o.csv")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert str(tmp_path / "pairs") in done.stderr and not (tmp_path / "o.csv").exists()

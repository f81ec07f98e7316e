"""The synthetic sample has reproducible bytes, the format of the course's files and balanced labels."""

import re
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT, shell

SAMPLE = ROOT / "data" / "sample"
ROWS = {"train": 600, "dev": 150, "test-student": 150}
COLUMNS = {
    "ids-sst": ["", "id", "sentence", "sentiment"],
    "quora": ["", "id", "sentence1", "sentence2", "is_duplicate"],
    "sts": ["", "id", "sentence1", "sentence2", "similarity"],
}
FILES = [f"{task}-{split}.csv" for task in COLUMNS for split in ROWS]


def make(folder: Path, *flags: str) -> dict[str, bytes]:
    """Write a sample and return its files."""
    assert shell("data/make_sample.py", "--out", folder, *flags).returncode == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(task: str, split: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a committed file, split at tabs."""
    text = (SAMPLE / f"{task}-{split}.csv").read_bytes().decode("utf-8")
    assert text.endswith("\n") and "\r" not in text and '"' not in text
    header, *rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
    return header, rows


def texts(task: str, split: str) -> list[frozenset[str]]:
    """Return the sentences of each row, without their order."""
    header, rows = read(task, split)
    first = header.index("id") + 1
    return [frozenset(row[first : first + (1 if task == "ids-sst" else 2)]) for row in rows]


def labels(task: str, split: str) -> list[str]:
    return [row[-1] for row in read(task, split)[1]]


def test_the_same_seed_gives_the_committed_bytes(tmp_path: Path) -> None:
    made = make(tmp_path / "new" / "folder")
    assert sorted(made) == sorted(FILES)
    assert made == {path.name: path.read_bytes() for path in SAMPLE.iterdir()}


def test_another_seed_gives_other_files(tmp_path: Path) -> None:
    made = make(tmp_path, "--seed", "1")
    assert sorted(made) == sorted(FILES)
    for name in FILES:
        same = set(made[name].splitlines()[1:]) & set((SAMPLE / name).read_bytes().splitlines()[1:])
        assert not same, name


@pytest.mark.parametrize("task", COLUMNS)
@pytest.mark.parametrize("split", ROWS)
def test_every_row_parses(task: str, split: str) -> None:
    header, rows = read(task, split)
    expected = COLUMNS[task] if split != "test-student" else COLUMNS[task][:-1]
    if (task, split) == ("ids-sst", "test-student"):
        expected = ["0", *expected]
        assert [row[:2] for row in rows] == [[str(i + 1), f"{i}.0"] for i in range(len(rows))]
    assert header == expected
    assert len(rows) == ROWS[split]
    first = header.index("id") + 1
    for row in rows:
        assert len(row) == len(header)
        assert row[0].isdecimal()
        assert re.fullmatch("[0-9a-f]{25}", row[first - 1])
        if task == "ids-sst":
            assert re.fullmatch(r" [A-Z].* \.", row[first])
        else:
            assert all(re.fullmatch(r"[A-Z].*\w[.?]", text) for text in row[first : first + 2])
        assert not re.search(r"[{}|/;]|\b[Aa] [aeiou]|  ", "\t".join(row)), row  # what the grammar must not leave


@pytest.mark.parametrize("split", ["train", "dev"])
def test_labels_are_balanced_and_cover_their_range(split: str) -> None:
    sst, count = Counter(labels("ids-sst", split)), ROWS[split]
    assert sorted(sst) == ["0", "1", "2", "3", "4"] and all(0.15 <= number / count <= 0.25 for number in sst.values())
    assert Counter(labels("quora", split)) == {"0.0": 0.6 * count, "1.0": 0.4 * count}
    scores = labels("sts", split)
    assert all(re.fullmatch(r"[0-4]\.[02468]|5\.0", score) for score in scores) and {"0.0", "5.0"} <= set(scores)
    assert Counter(min(int(float(score)), 4) for score in scores) == {i: 0.2 * count for i in range(5)}


@pytest.mark.parametrize("task", COLUMNS)
def test_no_text_or_id_is_used_twice(task: str) -> None:
    every_text = [text for split in ROWS for text in texts(task, split)]
    assert len(set(every_text)) == len(every_text) == sum(ROWS.values())
    every_id = [row[read(task, split)[0].index("id")] for split in ROWS for row in read(task, split)[1]]
    assert len(set(every_id)) == len(every_id)


def test_no_pair_repeats_one_sentence() -> None:
    assert all(len(pair) == 2 for task in ("quora", "sts") for split in ROWS for pair in texts(task, split))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = shell("data/make_sample.py", "--out", tmp_path / "file")
    assert done.returncode == 2 and done.stderr.startswith(f"error: --out {tmp_path / 'file'}: cannot be written")
    assert done.stderr.count("\n") == 1


def test_word_overlap_does_not_decide_duplicates() -> None:
    """No threshold on the Jaccard overlap of the two questions' words gets more than 70 % of the pairs right."""
    overlaps = []
    for row in read("quora", "train")[1]:
        one, two = (set(re.findall(r"\w+", text.lower())) for text in row[2:4])
        overlaps.append((len(one & two) / len(one | two), row[-1] == "1.0"))
    best = max(sum((overlap >= cut) == label for overlap, label in overlaps) for cut, _ in overlaps)
    assert best / len(overlaps) < 0.7

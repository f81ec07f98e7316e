"""Reading the course's files: rows, labels, bad rows, splits and batches."""

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import HEADERS, ROOT, SAMPLE, configure, refusal

import datasets
from config import DataOptions, TaskOptions
from datasets import BadRows, Examples, TaskData, column_names, find_file, load_split, load_splits, read_examples
from tasks import PARA, SST, STS, Task
from text.packing import unpack
from text.tokenizer import load_tokenizer
from utils.errors import UserError


def read(
    folder: Path, content: bytes, task: Task = SST, split: str = "train", limit: int = 20
) -> tuple[Examples, list[str]]:
    """Return the examples of a file with this content, and the reports of bad rows without the folder."""
    reports: list[str] = []
    path = folder / "file.csv"
    path.write_bytes(content)
    examples = read_examples(path, task, split, BadRows(limit, reports.append))
    return examples, [report.removeprefix(f"{folder}/") for report in reports]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    content = b"similarity\tsentence2 \tnote\t sentence1\tid\n3.2\tTwo\tx\t One  two\xc2\xa0three \ta1\n0\tB\t\tA\ta2\n"
    examples, reports = read(tmp_path, content, STS)
    assert reports == [] and len(examples) == 2
    assert examples.ids == ["a1", "a2"]
    assert examples.texts == (["One two three", "A"], ["Two", "B"])
    assert (examples.task, examples.split, examples.path) == (STS, "train", tmp_path / "file.csv")
    assert column_names(examples.path) == ["similarity", "sentence2", "note", "sentence1", "id"]
    assert column_names(tmp_path / "none.csv") == []


def test_similarities_stay_real_numbers(tmp_path: Path) -> None:
    examples, _ = read(tmp_path, HEADERS["sts"] + b"0\ta\tA\tB\t3.2\n1\tb\tA\tB\t0.8\n2\tc\tA\tB\t5\n", STS)
    assert examples.labels is not None and examples.labels.dtype == np.float32
    np.testing.assert_array_equal(examples.labels, np.array([3.2, 0.8, 5.0], dtype=np.float32))


@pytest.mark.parametrize(("task", "top"), [(SST, b"4"), (PARA, b"1")])
def test_whole_labels_may_be_written_as_reals(tmp_path: Path, task: Task, top: bytes) -> None:
    texts = b"\t".join([b"Text"] * len(task.text_columns))
    rows = [b"%d\tid%d\t%s\t%s\n" % (i, i, texts, label) for i, label in enumerate([top, top + b".0", b" 0.0 ", b"0"])]
    examples, reports = read(tmp_path, HEADERS[task.name] + b"".join(rows), task)
    assert reports == [] and examples.labels is not None and examples.labels.dtype == np.int64
    assert examples.labels.tolist() == [int(top), int(top), 0, 0]


def test_quotes_are_undone(tmp_path: Path) -> None:
    content = HEADERS["sst"] + b'0\ta\t"He said ""no""."\t1\n1\tb\tA 5" disk .\t2\n2\tc\t"one\ttwo"\t3\n'
    examples, reports = read(tmp_path, content)
    assert reports == []
    assert examples.texts == (['He said "no".', 'A 5" disk .', "one two"],)


def test_one_broken_quote_costs_one_row(tmp_path: Path) -> None:
    content = HEADERS["sst"] + b'0\ta\t"Open .\t1\n1\tb\tFine .\t2\n2\tc\t"A" b .\t3\n3\td\tFine "too" .\t4\n'
    examples, reports = read(tmp_path, content)
    assert examples.ids == ["b", "d"]
    assert [report.split(": ")[0] for report in reports] == ["file.csv:2", "file.csv:4"]
    assert all("broken quote" in report and "\t" not in report for report in reports)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\r\n"])
def test_crlf_byte_order_mark_and_last_line(tmp_path: Path, end: bytes) -> None:
    content = b"\xef\xbb\xbfid\tsentence\tsentiment\r\na\tCaf\xc3\xa9\t1\r\nb\tB\t2" + end
    examples, reports = read(tmp_path, content)
    assert reports == [] and examples.ids == ["a", "b"] and examples.texts == (["Café", "B"],)
    assert examples.labels is not None and examples.labels.tolist() == [1, 2]


def test_a_test_file_needs_no_labels(tmp_path: Path) -> None:
    content = b"0\t\tid\tsentence\n1\t0.0\ta\tA\n"
    examples, _ = read(tmp_path, content, split="test")
    assert examples.labels is None and examples.ids == ["a"]
    assert examples.take(0, seed=0).labels is None
    labelled, _ = read(tmp_path, HEADERS["sst"] + b"0\ta\tA\t3\n", split="test")
    assert labelled.labels is not None and labelled.labels.tolist() == [3]
    assert "expected sentence, sentiment once each" in refusal(read, tmp_path, content, SST, "dev")
    twice = b"id\tsentence\tsentiment\tsentiment\na\tA\t3\t1\n"
    assert "expected sentence once each" in refusal(read, tmp_path, twice, SST, "test")


def test_take_is_a_seeded_subset_in_file_order(tmp_path: Path) -> None:
    rows = b"".join(b"%d\tid%d\tText %d\t%d\n" % (i, i, i, i % 5) for i in range(50))
    examples, _ = read(tmp_path, HEADERS["sst"] + rows)
    assert examples.take(50, seed=1) is examples and examples.take(99, seed=1) is examples
    some = examples.take(10, seed=1)
    numbers = [int(name.removeprefix("id")) for name in some.ids]
    assert len(some) == 10 and numbers == sorted(set(numbers)) and numbers != list(range(10))
    assert some.texts == ([f"Text {i}" for i in numbers],)
    assert some.labels is not None and some.labels.tolist() == [i % 5 for i in numbers]
    assert examples.take(10, seed=1).ids == some.ids != examples.take(10, seed=2).ids


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        (SST, b"1\tbad\tText", "too few fields, 3 instead of 4"),
        (SST, b"1\tbad\tText\t3\t", "too many fields, 5 instead of 4"),
        (SST, b"1\tbad\t \xc2\xa0 \t3", "sentence is empty"),
        (STS, b"1\tbad\tText\t\t3", "sentence2 is empty"),
        (STS, b"1\tbad\tText\tText\t ", "similarity is missing"),
        (SST, b"1\tbad\tText\tgood", "sentiment 'good' is not a number"),
        (SST, b"1\tbad\tText\t0_1", "sentiment '0_1' is not a number"),
        (SST, b"1\tbad\tText\t5", "sentiment 5 is outside 0 to 4"),
        (SST, b"1\tbad\tText\t-1", "sentiment -1 is outside 0 to 4"),
        (SST, b"1\tbad\tText\t2.5", "sentiment 2.5 is not a whole number"),
        (PARA, b"1\tbad\tText\tText\t0.5", "is_duplicate 0.5 is not a whole number"),
        (PARA, b"1\tbad\tText\tText\t2", "is_duplicate 2 is outside 0 to 1"),
        (STS, b"1\tbad\tText\tText\t5.01", "similarity 5.01 is outside 0 to 5"),
        (STS, b"1\tbad\tText\tText\tnan", "similarity nan is outside 0 to 5"),
        (SST, b"1\tbad\tText\t-inf", "sentiment -inf is outside 0 to 4"),
        (SST, b"1\t \tText\t3", "id is missing"),
        (SST, b"1\tgood\tText\t3", "id 'good' was already used in line 2"),
        (SST, b"1\tbad\tTe\0xt\t3", "holds a NUL byte"),
        (SST, b"1\tbad\tTe\xffxt\t3", "is not UTF-8 (byte 0xff at position 9)"),
        (STS, b"1\tbad\tText\tTe\xed\xa0\x80xt\t3", "is not UTF-8 (byte 0xed at position 14)"),  # a lone surrogate
        (SST, b"1\tbad\tTe\rxt\t3", "has a broken quote or field"),
        (SST, b"1\tbad\t" + b"x" * 200_000 + b"\t3", "has a broken quote or field"),
    ],
)
def test_a_bad_row_is_reported_counted_and_skipped(tmp_path: Path, task: Task, row: bytes, reason: str) -> None:
    texts = b"\t".join([b"Text"] * len(task.text_columns))
    good, last = (b"0\t%s\t%s\t1" % (name, texts) for name in (b"good", b"last"))
    examples, reports = read(tmp_path, HEADERS[task.name] + b"\n".join([good, row, last]) + b"\n", task)
    assert examples.ids == ["good", "last"]
    assert examples.labels is not None and examples.labels.tolist() == [1, 1]
    assert all(column == ["Text", "Text"] for column in examples.texts)
    assert len(reports) == 1 and reports[0].startswith(f"file.csv:3: {reason}")


def test_bad_rows_over_the_limit_refuse_the_run() -> None:
    reports: list[str] = []
    bad_rows = BadRows(2, reports.append)
    bad_rows.check()
    bad_rows.add(Path("a.csv"), 2, "id is missing")
    bad_rows.add(Path("b.csv"), 7, "id is missing")
    bad_rows.check()
    assert reports == ["a.csv:2: id is missing", "b.csv:7: id is missing"]
    bad_rows.limit = 1
    assert refusal(bad_rows.check).endswith(
        "(a.csv:2: id is missing; b.csv:7: id is missing); mend the file or raise --max_bad_rows"
    )
    bad_rows.limit = 2
    for line in range(3, 2003):
        bad_rows.add(Path("c.csv"), line, "sentence is empty")
    assert len(reports) == 3
    assert refusal(bad_rows.check) == (
        "unreadable rows: 2,002, more than --max_bad_rows 2 (a.csv:2: id is missing; b.csv:7: id is missing; "
        "c.csv:3: sentence is empty; ...); mend the file or raise --max_bad_rows"
    )


def test_a_file_of_bad_rows_alone_is_refused(tmp_path: Path) -> None:
    rows = b"".join(b"%d\tid%d\tText\t%d\n" % (i, i, 7) for i in range(30))
    message = refusal(read, tmp_path, HEADERS["sst"] + rows)
    assert f"30, more than --max_bad_rows 20 ({tmp_path}/file.csv:2: sentiment 7 is outside 0 to 4" in message
    message = refusal(read, tmp_path, HEADERS["sst"] + rows, SST, "train", 30)
    assert message.endswith("none of its 30 rows can be read (line 2: sentiment 7 is outside 0 to 4); mend the file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf\r\n\n", "the file is empty"),
        (HEADERS["sst"], "has a header but no rows"),
        (HEADERS["sts"] + b"0\ta\tA\tB\t1\n", "expected sentence, sentiment once each and separated by tabs or commas"),
        (HEADERS["sts"] + b"0\ta\tA\tB\t1\n", "but found ['', 'id', 'sentence1', 'sentence2', 'similarity']"),
        (b"id;sentence;sentiment\na;Text;1\n", "but found ['id;sentence;sentiment']"),
        (b"id,sentence,stars\na,Text,1\n", "--sst_columns text=NAME,label=NAME"),
        (b"id\tid\tsentence\tsentiment\na\ta\tText\t1\n", "expected sentence, sentiment once each"),
        (b"\x7fELF\x02\x01\0\0\x03\0>\n", "looks binary"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "looks binary"),
        (b"%PDF-1.7\n\0\0\1", "looks binary"),
        ("id\tsentence\tsentiment\na\tText\t1\n".encode("utf-16"), "looks binary"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    message = refusal(read, tmp_path, content)
    assert message.startswith(f"{tmp_path}/file.csv: ") and words in message


ROWS = [("A , film", "3"), ("Bad .", "0"), ("So so", "2")]


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("kind", ["tabs.csv", "commas.csv", "lines.jsonl", "commas.csv.gz", "lines.jsonl.gz"])
def test_peoples_files_are_read_as_they_are(tmp_path: Path, kind: str, ids: bool) -> None:
    """Their separators, their names of columns, without ids, with blank lines, compressed."""
    out = io.StringIO()
    if ".jsonl" in kind:
        for i, (text, label) in enumerate(ROWS):
            row = {"id": f"x{i}", "sentence": 5, "review": text, "stars": int(label), "more": [1, None]}
            out.write(json.dumps({key: value for key, value in row.items() if ids or key != "id"}) + "\n\n")
    else:
        writer = csv.writer(out, delimiter="\t" if "tabs" in kind else ",", lineterminator="\n \n")
        writer.writerows([[*["id"] * ids, "sentence", "stars", "review"]])
        writer.writerows([[*[f"x{i}"] * ids, "other", label, text] for i, (text, label) in enumerate(ROWS)])
    content = out.getvalue().encode()
    (tmp_path / kind).write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    columns = configure("--sst_columns", "text=review, label=stars").tasks["sst"].columns
    examples = read_examples(tmp_path / kind, SST, "train", BadRows(0, print), columns or ())
    assert examples.ids == (["x0", "x1", "x2"] if ids else ["1", "2", "3"])
    assert examples.texts == ([text for text, _ in ROWS],)
    assert examples.labels is not None and examples.labels.tolist() == [3, 0, 2]


def test_renamed_columns_leave_a_file_of_the_course_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"id\tsentence\tsentiment\na\tText\t3\n")
    examples = read_examples(tmp_path / "x.csv", SST, "dev", BadRows(0, print), ("text=review", "label=stars"))
    assert (examples.ids, examples.texts) == (["a"], (["Text"],))


def test_quotes_may_be_a_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'sentence\tsentiment\n"Bah," he said\t1\n"fine" film\t3\n')
    message = refusal(read_examples, path, SST, "dev", BadRows(0, print))
    assert "broken quote" in message and "--quoting none" in message
    examples = read_examples(path, SST, "dev", BadRows(0, print), quoting="none")
    assert examples.texts == (['"Bah," he said', '"fine" film'],)
    assert configure("--quoting", "none").data.quoting == "none"


def test_a_compressed_file_is_read_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(b"sentence\tsentiment\nA\t1\n" + b"B\t1\n" * (1 << 20)))
    monkeypatch.setattr(datasets, "MAX_DATA", 1 << 20)
    assert f"{path}: is too large (larger than 1 MiB)" in refusal(read_examples, path, SST, "dev", BadRows(0, print))


def test_bad_lines_of_json_are_counted(tmp_path: Path) -> None:
    rows = [{"sentence": "A", "sentiment": 1}, [1], {"sentence": None, "sentiment": 1}, {"sentence": "\ud800 B"}]
    text = "\n".join([*map(json.dumps, rows), "{", json.dumps({"sentence": "C", "sentiment": True})])
    (tmp_path / "x.jsonl").write_text(text)
    reports: list[str] = []
    examples = read_examples(tmp_path / "x.jsonl", SST, "train", BadRows(9, reports.append))
    assert examples.ids == ["1", "6"] and examples.labels is not None and examples.labels.tolist() == [1, 1]
    assert [report.split(":", 1)[1] for report in reports] == [
        "2: is no JSON object", "3: sentence is empty", "4: sentiment is missing", "5: is no JSON object",
    ]  # fmt: skip


def test_wrong_words_of_columns_and_damaged_compression_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(HEADERS["sst"] * 99)[:-9])
    assert "the compressed file is damaged" in refusal(
        read_examples, tmp_path / "x.csv.gz", SST, "train", BadRows(0, print)
    )
    (tmp_path / "x.csv.gz").write_bytes(HEADERS["sst"])
    assert "cannot be decompressed" in refusal(read_examples, tmp_path / "x.csv.gz", SST, "train", BadRows(0, print))
    for columns in (["text"], ["text="], ["text1=a"]):
        message = refusal(read_examples, tmp_path / "x.csv", SST, "train", BadRows(0, print), columns)
        assert f"--sst_columns {columns[0]}" in message and "text=NAME" in message


def test_labels_that_are_all_one_too_high_are_told(tmp_path: Path) -> None:
    rows = b"".join(b"%d\tid%d\tText\t%d\n" % (i, i, 1 + i % 5) for i in range(15))
    message = refusal(read, tmp_path, HEADERS["sst"] + rows)
    assert "labels 1 to 5? SST sentiment has 0 to 4" in message and "subtract 1 from every sentiment" in message
    _, reports = read(tmp_path, HEADERS["sst"] + rows + b"15\tid15\tText\t0\n")
    assert len(reports) == 3


def test_bad_rows_may_be_a_share_of_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = configure("--max_bad_rows", "10%").data.max_bad_rows
    good = b"".join(b"%d\tid%d\tText\t1\n" % (i, i) for i in range(90))
    bad = b"".join(b"%d\tid%d\tText\tx\n" % (i, i) for i in range(90, 100))
    bad_rows = BadRows(share, print)
    for _ in range(5):
        (tmp_path / "file.csv").write_bytes(HEADERS["sst"] + good + bad)
        assert len(read_examples(tmp_path / "file.csv", SST, "train", bad_rows)) == 90
        bad_rows.check()
    assert bad_rows.count == 50 and capsys.readouterr().out.count("\n") == 21
    (tmp_path / "file.csv").write_bytes(HEADERS["sst"] + good + bad * 2)
    message = refusal(read_examples, tmp_path / "file.csv", SST, "train", bad_rows)
    assert "20 of its 110 rows are unreadable, more than --max_bad_rows 10% (line 92: " in message
    with pytest.raises(SystemExit):
        configure("--max_bad_rows", "100%")


def test_find_file(tmp_path: Path) -> None:
    assert find_file(tmp_path, None, SST, "dev") is None
    usual, other = tmp_path / "ids-sst-dev.csv", tmp_path / "other.csv"
    usual.touch()
    other.touch()
    assert find_file(tmp_path, None, SST, "dev") == usual
    assert find_file(tmp_path, str(other), SST, "dev") == other
    with pytest.raises(UserError, match="cannot be read"):
        read_examples(tmp_path, SST, "train", BadRows(0, print))
    for wrong in (str(tmp_path / "none.csv"), str(tmp_path), "", "x" * 5000):
        with pytest.raises(UserError, match="^--sst_test .*: there is no such file"):
            find_file(tmp_path, wrong, SST, "test")


def test_load_split(tmp_path: Path) -> None:
    data = DataOptions(data_dir=str(tmp_path), max_bad_rows=1, max_train_examples=2)
    bad_rows = BadRows(data.max_bad_rows, lambda line: None)
    assert load_split(data, TaskOptions(), PARA, "test", bad_rows) is None
    for split in ("train", "dev"):
        message = refusal(load_split, data, TaskOptions(), PARA, split, bad_rows)
        for word in (f"{tmp_path}/quora-{split}.csv", f"--para_{split}", "--data_dir", "datasets.py --out data"):
            assert word in message
    rows = b"".join(b"%d\tid%d\tA\tB\t1.0\n" % (i, i) for i in range(5))
    (tmp_path / "quora-train.csv").write_bytes(HEADERS["para"] + rows)
    (tmp_path / "mine.csv").write_bytes(HEADERS["para"] + rows + b"\n")
    train = load_split(data, TaskOptions(), PARA, "train", bad_rows)
    dev = load_split(data, TaskOptions(dev=str(tmp_path / "mine.csv")), PARA, "dev", bad_rows)
    chosen = np.sort(np.random.default_rng(0).choice(5, 2, replace=False))  # whatever --seed is
    assert train is not None and train.ids == [f"id{i}" for i in chosen] != ["id0", "id1"]
    assert dev is not None and len(dev) == 5 and dev.path == tmp_path / "mine.csv"
    for split in ("train", "test"):
        found = load_split(data, TaskOptions(**{split: str(tmp_path / "mine.csv")}), PARA, split, bad_rows)
        assert found is not None and found.path == tmp_path / "mine.csv"
    (tmp_path / "quora-dev.csv").write_bytes(HEADERS["para"] + rows + b"5\ta\tA\n6\tb\tA\n")
    with pytest.raises(UserError, match="unreadable rows: 2, more than --max_bad_rows 1"):
        load_split(data, TaskOptions(), PARA, "dev", bad_rows)


@pytest.mark.parametrize("encoding", ["siamese", "cross"])
def test_batches_hold_both_texts_of_a_pair(tiny_bert: Path, encoding: str) -> None:
    """All first texts before all second ones, or each pair as one sequence with two token types."""
    tokenizer = load_tokenizer(tiny_bert, 64)
    texts = (["the film", "a", "no plot at all"], ["a very good film", "it works", "a"])
    data = TaskData(Examples(STS, "dev", Path("x"), ["a", "b", "c"], texts, None), tokenizer, encoding)
    first, second = ([tokenizer.encode([text]).input_ids.tolist() for text in column] for column in texts)
    chosen = np.array([2, 0])
    if encoding == "siamese":
        wanted, ones = [column[i] for column in (first, second) for i in chosen], [0] * 4
    else:
        wanted, ones = [first[i] + second[i][1:] for i in chosen], [len(second[i]) - 1 for i in chosen]
    batch = data.batch(chosen)
    ids, types = (unpack(rows, batch).tolist() for rows in (batch.input_ids, batch.token_type_ids))
    width = max(map(len, wanted))
    assert ids == [row + [0] * (width - len(row)) for row in wanted]
    assert types == [
        [int(len(row) - n <= i < len(row)) for i in range(width)] for row, n in zip(wanted, ones, strict=True)
    ]
    assert data.lengths.tolist() == [data.batch(np.array([i])).num_tokens for i in range(3)]


@pytest.mark.skipif(not (ROOT / "data" / SST.files["train"]).is_file(), reason="the course's files are not in data/")
@pytest.mark.parametrize(
    ("task", "split", "count"),
    [
        (SST, "train", 8544),
        (SST, "dev", 546),
        (SST, "test", 2210),
        (PARA, "train", 16273),
        (PARA, "dev", 1962),
        (STS, "train", 6040),
        (STS, "dev", 401),
        (STS, "test", 1725),
    ],
)
def test_real_files(task: Task, split: str, count: int) -> None:
    path = ROOT / "data" / task.files[split]
    reports: list[str] = []
    examples = read_examples(path, task, split, BadRows(20, reports.append))
    assert len(examples) == count
    assert count + len(reports) == path.read_bytes().count(b"\n") - 1
    if task is PARA and split == "train":  # two rows of the course's file end before their last fields
        assert reports == [f"{path}:2081: is_duplicate is missing", f"{path}:11422: sentence2 is empty"]
    assert not any('""' in text for text in examples.texts[0]) or task is PARA  # Quora's own text has doubled quotes
    if split == "test":
        assert examples.labels is None
        return
    assert examples.labels is not None
    assert (examples.labels.min(), examples.labels.max()) == task.label_range
    if task.kind == "similarity":
        assert np.any(examples.labels % 1 > 0)
    else:
        assert set(examples.labels.tolist()) == set(range(int(task.label_range[1]) + 1))


def extra_splits(tmp_path: Path, content: str, *more: str) -> Examples:
    """Return the training examples of SST with a further file."""
    (tmp_path / "extra.csv").write_text(content, encoding="utf-8")
    config = configure("--train_sst", "--data_dir", SAMPLE, "--sst_extra", tmp_path / "extra.csv", *more)
    return load_splits(config.data, config.tasks, {"sst": SST}, ["train"], print)["train"]["sst"]


def test_binary_labels_of_an_extra_file_become_the_ends_of_the_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of CFIMDB in R1; other labels stay."""
    data = DataOptions(str(SAMPLE))
    plain = load_splits(data, {"sst": TaskOptions()}, {"sst": SST}, ["train"], print)["train"]["sst"]
    found = extra_splits(tmp_path, "id\tsentence\tsentiment\na\tdreadful\t0\nb\tfine\t1\nc\tgood\t1\n")
    assert plain.labels is not None and found.labels is not None
    assert len(found) == len(plain) + 3 and found.texts[0][-3:] == ["dreadful", "fine", "good"]
    assert found.labels.tolist() == [*plain.labels.tolist(), 0, 4, 4] and found.ids == [*plain.ids, "a", "b", "c"]
    assert "extra.csv: its labels 0 and 1 become 0 and 4, the lowest and the highest class" in capsys.readouterr().out
    found = extra_splits(tmp_path, "id\tsentence\tsentiment\na\tdreadful\t0\nb\tmiddling\t2\n")
    assert "become" not in capsys.readouterr().out
    assert found.labels is not None and found.labels[-2:].tolist() == [0, 2]
    few = extra_splits(tmp_path, "id\tsentence\tsentiment\na\tbad\t0\n", "--max_train_examples", "50")
    whole = extra_splits(tmp_path, "id\tsentence\tsentiment\na\tbad\t0\n")
    assert len(few) == 50 and few.ids == whole.take(50, seed=0).ids  # drawn from both files


def test_low_similarities_of_an_extra_file_stay(tmp_path: Path) -> None:
    """They may be of pairs that have little in common; only classes may have another scale."""
    for name in ("sts-train.csv", "extra.csv"):
        (tmp_path / name).write_bytes(HEADERS["sts"] + b"0\t%s\tA\tB\t0.5\n1\tb\tA\tB\t1\n" % name[:1].encode())
    options = TaskOptions(extra=(str(tmp_path / "extra.csv"),))
    found = load_split(DataOptions(data_dir=str(tmp_path)), options, STS, "train", BadRows(0, print))
    assert found is not None and found.labels is not None and found.labels.tolist() == [0.5, 1, 0.5, 1]


def test_an_extra_file_is_also_found_in_the_data_folder(tmp_path: Path) -> None:
    """CFIMDB's, which recipes name, may be missing; any other one would be a mistake."""
    for name in ("sts-train.csv", "extra.csv"):
        (tmp_path / name).write_bytes(HEADERS["sts"] + b"0\t%s\tA\tB\t0.5\n" % name[:1].encode())
    options = {"sts": TaskOptions(extra=("extra.csv", "ids-cfimdb-train.csv"))}
    said: list[str] = []
    train = load_splits(DataOptions(data_dir=str(tmp_path)), options, {"sts": STS}, ["train"], said.append)["train"]
    assert train["sts"].ids == ["s", "e"] and len(said) == 1
    assert said[0].startswith("--sts_extra ids-cfimdb-train.csv: there is no such file; STS similarity trains without")
    missing = {"sts": TaskOptions(extra=("no.csv",))}
    message = refusal(load_splits, DataOptions(str(tmp_path)), missing, {"sts": STS}, ["train"], print)
    assert message.startswith("--sts_extra no.csv: there is no such file, here or in --data_dir")

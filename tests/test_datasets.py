"""Reading the course's files, and fetching them."""

import functools
import http.server
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Child

import datasets
from cli.parser import parse
from config import DataOptions, TaskOptions
from datasets import BadRows, Examples, TaskData, find_file, load_split, load_splits, read_examples
from tasks import PARA, SST, STS, TASKS, Task
from text.packing import unpack
from text.tokenizer import load_tokenizer
from utils.download import COURSE_FILES, fetch, git_blob_id
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"
HEADERS = {
    "sst": b"\tid\tsentence\tsentiment\n",
    "para": b"\tid\tsentence1\tsentence2\tis_duplicate\n",
    "sts": b"\tid\tsentence1\tsentence2\tsimilarity\n",
}


def read(
    folder: Path, content: bytes, task: Task = SST, split: str = "train", limit: int = 20
) -> tuple[Examples, list[str]]:
    """The examples of a file with this content and what was reported of it, without the folder."""
    reports: list[str] = []
    path = folder / "file.csv"
    path.write_bytes(content)
    examples = read_examples(path, task, split, BadRows(limit, reports.append))
    return examples, [report.removeprefix(f"{folder}/") for report in reports]


def refusal(folder: Path, content: bytes, task: Task = SST, split: str = "train", limit: int = 20) -> str:
    """The one line with which a file is refused, without the folder."""
    with pytest.raises(UserError) as error:
        read(folder, content, task, split, limit)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{folder}/", "")


# ----------------------------------------------------------------------------------------------------------------------
# Rows that can be read


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    content = b"similarity\tsentence2 \tnote\t sentence1\tid\n3.2\tTwo\tx\t One  two\xc2\xa0three \ta1\n0\tB\t\tA\ta2\n"
    examples, reports = read(tmp_path, content, STS)
    assert reports == [] and len(examples) == 2
    assert examples.ids == ["a1", "a2"]
    assert examples.texts == (["One two three", "A"], ["Two", "B"])
    assert (examples.task, examples.split, examples.path) == (STS, "train", tmp_path / "file.csv")


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
    assert "expected id, sentence, sentiment" in refusal(tmp_path, content, split="dev")
    twice = b"id\tsentence\tsentiment\tsentiment\na\tA\t3\t1\n"
    assert "expected id, sentence, sentiment once each" in refusal(tmp_path, twice, split="test")


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


# ----------------------------------------------------------------------------------------------------------------------
# Rows that cannot


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        (SST, b"1\tbad\tText", "too few fields, 3 instead of 4"),
        (SST, b"", "too few fields, 0 instead of 4"),
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


def test_an_id_of_a_bad_row_is_still_free(tmp_path: Path) -> None:
    examples, reports = read(tmp_path, HEADERS["sst"] + b"0\ta\tText\t9\n1\ta\tText\t1\n")
    assert examples.ids == ["a"] and len(reports) == 1


def test_bad_rows_over_the_limit_refuse_the_run() -> None:
    reports: list[str] = []
    bad_rows = BadRows(2, reports.append)
    bad_rows.check()
    bad_rows.add(Path("a.csv"), 2, "id is missing")
    bad_rows.add(Path("b.csv"), 7, "id is missing")
    bad_rows.check()
    assert reports == ["a.csv:2: id is missing", "b.csv:7: id is missing"]
    for line in range(3, 2003):
        bad_rows.add(Path("c.csv"), line, "sentence is empty")
    assert len(reports) == 3
    with pytest.raises(UserError) as error:
        bad_rows.check()
    assert str(error.value) == (
        "unreadable rows: 2,002, more than --max_bad_rows 2 (a.csv:2: id is missing; b.csv:7: id is missing; "
        "c.csv:3: sentence is empty; ...); mend the file or raise --max_bad_rows"
    )


def test_few_bad_rows_are_all_named() -> None:
    bad_rows = BadRows(0, lambda line: None)
    bad_rows.add(Path("a.csv"), 2, "id is missing")
    with pytest.raises(UserError, match=r"--max_bad_rows 0 \(a\.csv:2: id is missing\); mend the file or raise"):
        bad_rows.check()


def test_a_file_of_bad_rows_alone_is_refused(tmp_path: Path) -> None:
    rows = b"".join(b"%d\tid%d\tText\t%d\n" % (i, i, 7) for i in range(30))
    message = refusal(tmp_path, HEADERS["sst"] + rows)
    assert "30, more than --max_bad_rows 20 (file.csv:2: sentiment 7 is outside 0 to 4" in message
    message = refusal(tmp_path, HEADERS["sst"] + rows, limit=30)
    assert message == "file.csv: none of its 30 rows can be read (line 2: sentiment 7 is outside 0 to 4); mend the file"


# ----------------------------------------------------------------------------------------------------------------------
# Files that cannot be read


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf\r\n\n", "the file is empty"),
        (HEADERS["sst"], "has a header but no rows"),
        (HEADERS["sts"] + b"0\ta\tA\tB\t1\n", "expected id, sentence, sentiment once each and separated by tabs"),
        (HEADERS["sts"] + b"0\ta\tA\tB\t1\n", "but found ['', 'id', 'sentence1', 'sentence2', 'similarity']"),
        (b"id,sentence,sentiment\na,Text,1\n", "but found ['id,sentence,sentiment']"),
        (b"id\tid\tsentence\tsentiment\na\ta\tText\t1\n", "expected id, sentence, sentiment once each"),
        (b"\x7fELF\x02\x01\0\0\x03\0>\n", "looks binary"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "looks binary"),
        (b"%PDF-1.7\n\0\0\1", "looks binary"),
        ("id\tsentence\tsentiment\na\tText\t1\n".encode("utf-16"), "looks binary"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    message = refusal(tmp_path, content)
    assert message.startswith("file.csv: ") and words in message


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_examples(tmp_path, SST, "train", BadRows(0, print))


def test_find_file(tmp_path: Path) -> None:
    assert find_file(tmp_path, None, SST, "dev") is None
    own, other = tmp_path / "ids-sst-dev.csv", tmp_path / "other.csv"
    own.touch()
    other.touch()
    assert find_file(tmp_path, None, SST, "dev") == own
    assert find_file(tmp_path, str(other), SST, "dev") == other
    for wrong in (str(tmp_path / "none.csv"), str(tmp_path), "", "x" * 5000):
        with pytest.raises(UserError, match="^--sst_test .*: there is no such file"):
            find_file(tmp_path, wrong, SST, "test")


def test_load_split(tmp_path: Path) -> None:
    data = DataOptions(data_dir=str(tmp_path), max_bad_rows=1, max_train_examples=2)
    bad_rows = BadRows(data.max_bad_rows, lambda line: None)
    assert load_split(data, TaskOptions(), PARA, "test", bad_rows) is None
    for split in ("train", "dev"):
        with pytest.raises(UserError) as error:
            load_split(data, TaskOptions(), PARA, split, bad_rows)
        for word in (f"{tmp_path}/quora-{split}.csv", f"--para_{split}", "--data_dir", "python datasets.py --out data"):
            assert word in str(error.value)
        assert "data/sample" in str(error.value)
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


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("encoding", ["siamese", "cross"])
def test_batches_hold_both_texts_of_a_pair(tiny_bert: Path, encoding: str) -> None:
    """All first texts before all second ones, or each pair as one sequence with two token types."""
    tokenizer = load_tokenizer(tiny_bert, 64)
    texts = (["the film", "a", "no plot at all"], ["a very good film", "it works", "a"])
    data = TaskData(Examples(STS, "dev", Path("x"), ["a", "b", "c"], texts, None), tokenizer, encoding)
    first, second = ([tokenizer.encode([text]).input_ids.tolist() for text in column] for column in texts)
    chosen = np.array([2, 0])
    if encoding == "siamese":
        wanted, ones = [own[i] for own in (first, second) for i in chosen], [0] * 4
    else:
        wanted, ones = [first[i] + second[i][1:] for i in chosen], [len(second[i]) - 1 for i in chosen]
    batch = data.batch(chosen)
    ids, types = (unpack(rows, batch).tolist() for rows in (batch.input_ids, batch.token_type_ids))
    width = max(map(len, wanted))
    assert ids == [own + [0] * (width - len(own)) for own in wanted]
    assert types == [
        [int(len(own) - n <= i < len(own)) for i in range(width)] for own, n in zip(wanted, ones, strict=True)
    ]
    assert data.lengths.tolist() == [data.batch(np.array([i])).num_tokens for i in range(3)]


# ----------------------------------------------------------------------------------------------------------------------
# Anything at all

fragments = st.sampled_from(
    [b"id", b"x", b"3", b"0.5", b"nan", b"\t", b"\t", b"\n", b"\r\n", b'"', b"\0", b"\xff", b" "]
)
rows = st.lists(st.binary(max_size=6) | fragments, max_size=40).map(b"".join)
contents = st.binary(max_size=200) | st.builds(bytes.__add__, st.sampled_from(list(HEADERS.values())), rows)


@settings(max_examples=400, deadline=None)
@given(content=contents, task=st.sampled_from(list(TASKS.values())), split=st.sampled_from(["train", "test"]))
def test_any_bytes_give_examples_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, task: Task, split: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    bad_rows = BadRows(1000, lambda line: None)
    try:
        examples = read_examples(path, task, split, bad_rows)
    except UserError as error:
        assert str(error).isprintable()
        return
    lines = content.rstrip(b"\r\n").count(b"\n")
    assert len(examples) + bad_rows.count == lines and len(examples) > 0
    assert len(set(examples.ids)) == len(examples)
    assert [len(column) for column in examples.texts] == [len(examples)] * len(task.text_columns)
    assert all(text and text == " ".join(text.split()) for column in examples.texts for text in column)
    if examples.labels is not None:
        assert examples.labels.shape == (len(examples),)
        assert task.label_range[0] <= examples.labels.min() <= examples.labels.max() <= task.label_range[1]


# ----------------------------------------------------------------------------------------------------------------------
# The real files, where they are at hand


@pytest.mark.skipif(not REAL.is_dir(), reason="the course's files are not at hand")
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
    path = REAL / task.files[split]
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


# ----------------------------------------------------------------------------------------------------------------------
# Fetching

GOOD = {"a.csv": b"first\n" * 50_000, "b.csv": "zweite é\n".encode()}
IDS = {name: git_blob_id(content) for name, content in GOOD.items()}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the URL at which a local server offers it."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name, content in GOOD.items():
        (folder / name).write_bytes(content)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def copyfile(self, source: object, outputfile: object) -> None:
            if self.path.endswith("/short.csv"):  # hang up after the headers
                self.close_connection = True
            else:
                super().copyfile(source, outputfile)  # type: ignore[arg-type]

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_git_blob_id_is_gits_own() -> None:
    assert git_blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_fetch_and_keep(served: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, url = served
    out = tmp_path / "new" / "data"
    fetch(out, url, IDS)
    assert contents_of(out) == GOOD
    assert capsys.readouterr().out.count("verified") == 2
    for path in folder.iterdir():
        path.unlink()
    fetch(out, url, IDS)  # nothing is asked of the server
    assert contents_of(out) == GOOD
    assert capsys.readouterr().out.count("already there") == 2


def test_corrupted_content_is_refused(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    (folder / "b.csv").write_bytes(GOOD["b.csv"][:-1])
    with pytest.raises(UserError, match="^b.csv: wrong checksum"):
        fetch(tmp_path / "data", url, IDS)
    assert contents_of(tmp_path / "data") == {"a.csv": GOOD["a.csv"]}


def test_failed_downloads_are_one_line(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    (folder / "short.csv").write_bytes(b"x" * 100)
    for name in ("none.csv", "short.csv"):
        with pytest.raises(UserError, match=f"^{name}: cannot be fetched from {url}/{name} .*check the network"):
            fetch(tmp_path / "data", url, {name: "0" * 40})
    assert contents_of(tmp_path / "data") == {}


def test_a_file_that_cannot_be_written_leaves_none_of_its_name(served: tuple[Path, str], tmp_path: Path) -> None:
    """Else the next attempt would take it for a file of the user."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        fetch(tmp_path / "data", served[1], IDS)

    assert Child(work, tmp_path / "log").wait() == 1
    assert f"UserError: --out {tmp_path / 'data'}: cannot be written" in (tmp_path / "log").read_text()
    assert not (tmp_path / "data" / "a.csv").exists()
    fetch(tmp_path / "data", served[1], IDS)
    assert contents_of(tmp_path / "data") == GOOD


def test_a_file_in_the_way_is_left_alone(served: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"mine")
    with pytest.raises(UserError, match="a.csv: is not the course's file"):
        fetch(tmp_path, served[1], IDS)
    assert (tmp_path / "a.csv").read_bytes() == b"mine"
    with pytest.raises(UserError, match="^--out .*a.csv: cannot be written"):
        fetch(tmp_path / "a.csv", served[1], IDS)


def test_the_script_fetches_every_file_of_the_tasks(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name for task in TASKS.values() for name in task.files.values()} <= set(COURSE_FILES)
    monkeypatch.setattr(datasets, "COURSE_URL", served[1])
    with pytest.raises(UserError, match="^ids-cfimdb-dev.csv: cannot be fetched"):
        datasets.main(["--out", str(tmp_path / "data")])


def test_the_script_without_a_network(tmp_path: Path) -> None:
    environment = {"https_proxy": "http://127.0.0.1:9", "PATH": ""}  # nobody listens on this port
    command = [sys.executable, str(ROOT / "datasets.py"), "--out", str(tmp_path / "data")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ids-cfimdb-dev.csv: cannot be fetched") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------- further training files


def extra_splits(tmp_path: Path, content: str, *more: str) -> Examples:
    (tmp_path / "extra.csv").write_text(content, encoding="utf-8")
    words = ["--train_sst", "--data_dir", str(SAMPLE), "--sst_extra", str(tmp_path / "extra.csv"), *more]
    config = parse(words, TASKS, "test", "Test.")
    return load_splits(config.data, config.tasks, {"sst": SST}, ["train"], print)["train"]["sst"]


def test_binary_labels_of_an_extra_file_become_the_ends_of_the_scale(tmp_path: Path) -> None:
    """As CFIMDB's in R1."""
    plain = load_splits(DataOptions(str(SAMPLE)), {"sst": TaskOptions()}, {"sst": SST}, ["train"], print)["train"][
        "sst"
    ]
    found = extra_splits(tmp_path, "id\tsentence\tsentiment\na\tdreadful\t0\nb\tfine\t1\nc\tgood\t1\n")
    assert plain.labels is not None and found.labels is not None
    assert len(found) == len(plain) + 3 and found.texts[0][-3:] == ["dreadful", "fine", "good"]
    assert found.labels.tolist() == [*plain.labels.tolist(), 0, 4, 4] and found.ids == [*plain.ids, "a", "b", "c"]


def test_other_labels_of_an_extra_file_stay(tmp_path: Path) -> None:
    found = extra_splits(tmp_path, "id\tsentence\tsentiment\na\tdreadful\t0\nb\tmiddling\t2\n")
    assert found.labels is not None and found.labels[-2:].tolist() == [0, 2]
    cut = extra_splits(tmp_path, "id\tsentence\tsentiment\na\tbad\t0\n", "--max_train_examples", "50")
    whole = extra_splits(tmp_path, "id\tsentence\tsentiment\na\tbad\t0\n")
    assert len(cut) == 50 and cut.ids == whole.take(50, seed=0).ids  # of both files alike


def test_low_similarities_of_an_extra_file_stay(tmp_path: Path) -> None:
    """They may be of pairs that have little in common; only classes are known to have a scale of their own."""
    for name in ("sts-train.csv", "extra.csv"):
        (tmp_path / name).write_bytes(HEADERS["sts"] + b"0\t%s\tA\tB\t0.5\n1\tb\tA\tB\t1\n" % name[:1].encode())
    options = TaskOptions(extra=(str(tmp_path / "extra.csv"),))
    found = load_split(DataOptions(data_dir=str(tmp_path)), options, STS, "train", BadRows(0, print))
    assert found is not None and found.labels is not None and found.labels.tolist() == [0.5, 1, 0.5, 1]


def test_a_missing_extra_file_is_named(tmp_path: Path) -> None:
    config = parse(["--train_sst", "--data_dir", str(SAMPLE), "--sst_extra", "no.csv"], TASKS, "test", "Test.")
    with pytest.raises(UserError, match="--sst_extra no.csv: there is no such file"):
        load_splits(config.data, config.tasks, {"sst": SST}, ["train"], print)

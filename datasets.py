"""From the course's csv files to examples, token ids and packed batches.

The files are tab-separated in spite of their name, with a header line. As a script, `python datasets.py --out data`
fetches the course's files and verifies them.
"""

import codecs
import csv
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
import torch

from cli.parser import OneLineParser
from config import DataOptions, TaskOptions
from tasks import Task
from text.cleaning import Cleaner
from text.packing import Batch, PackedBatch, pack, ragged_rows
from text.token_cache import Arrays, cache_key, cached, pack_texts, unpack_texts
from text.tokenizer import TokenArrays, Tokenizer
from utils.console import run_script
from utils.download import COURSE_URL, fetch
from utils.errors import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Examples


@dataclass(frozen=True, eq=False)
class Examples:
    """One split of one task, column by column.

    `texts` has a list for each text column. `labels` is [N]: int64 for classes and binary, float32 for similarity
    (never rounded), None where the file has no label column.
    """

    task: Task
    split: str  # train, dev or test
    path: Path
    ids: list[str]
    texts: tuple[list[str], ...]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, count: int, seed: int) -> "Examples":
        """A random subset of `count` examples in file order; self where there are no more than that."""
        if count >= len(self):
            return self
        return self.at(np.sort(np.random.default_rng(seed).choice(len(self), size=count, replace=False)))

    def at(self, chosen: np.ndarray) -> "Examples":
        """The examples at these rows [M]."""
        return replace(
            self,
            ids=[self.ids[i] for i in chosen],
            texts=tuple([column[i] for i in chosen] for column in self.texts),
            labels=None if self.labels is None else self.labels[chosen],
        )


class BadRows:
    """Counts unreadable rows over all files of a run, reports each, and refuses the run past the limit.

    A run within the limit has every row reported. Past it the run is refused anyway, so that the reports stop there
    (a wrong column of labels would print a line for each of 280,000 rows) and only the count goes on.
    """

    SHOWN = 3  # places that the final error repeats

    def __init__(self, limit: int, report: Callable[[str], None]) -> None:
        self.limit = limit
        self.report = report
        self.count = 0
        self.first: list[str] = []

    def add(self, path: Path, line_number: int, reason: str) -> None:
        """Report "FILE:LINE: reason" and count it."""
        place = f"{path}:{line_number}: {reason}"
        self.count += 1
        if len(self.first) < self.SHOWN:
            self.first.append(place)
        if self.count <= self.limit + 1:
            self.report(place)

    def check(self) -> None:
        """Raise UserError where there are more unreadable rows than the limit allows."""
        if self.count > self.limit:
            more = "; ..." if self.count > len(self.first) else ""
            raise UserError(
                f"unreadable rows: {self.count:,}, more than --max_bad_rows {self.limit} "
                f"({'; '.join(self.first)}{more}); mend the file or raise --max_bad_rows"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Reading

LARGE_FILE = 8 << 20  # bytes from which on the rows are kept between runs; SST's and STS's are one or two million
_SOURCE = "fetch the course's files with `python datasets.py --out data` or try --data_dir data/sample"


class _BadRow(Exception):
    """Why a row cannot be read."""


def _fields(line: bytes) -> list[str]:
    """The fields of one line.

    Standard csv quoting, like the course's own reader: `"He said ""no""."` is He said "no". On all eleven files at hand
    csv quoting and csv.QUOTE_NONE count the same rows, one for each line; but the latter leaves the wrapping and the
    doubled quotes in the sentences (about 1,900 rows). No field holds a line break, so that each line is parsed by
    itself: one broken quote costs one row, where a parser of the whole file would swallow lines up to the next quote.
    `strict` makes it an error; otherwise what follows the quote would silently become part of the text.
    The parser drops the carriage return of a CRLF line end.
    """
    if b"\0" in line:
        raise _BadRow("holds a NUL byte")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRow(f"is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1})") from None
    try:
        return next(csv.reader((text,), delimiter="\t", strict=True), [])
    except csv.Error as error:
        raise _BadRow(f"has a broken quote or field ({str(error)!r})") from None


def column_names(path: Path) -> list[str]:
    """What the first line of a file names, or nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            first = file.readline().removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
        return [name.strip() for name in _fields(first)]
    except (OSError, _BadRow):
        return []


def _clean(text: str) -> str:
    """White space collapsed and stripped. Case and punctuation are left to the tokenizer."""
    return " ".join(text.split())


def _label(text: str, task: Task) -> float:
    """The label of one row; a whole number unless the task is a similarity."""
    text = text.strip()
    if not text:
        raise _BadRow(f"{task.label_column} is missing")
    try:
        value = float(text.replace("_", " "))  # to Python 0_1 is a number
    except ValueError:
        raise _BadRow(f"{task.label_column} {text[:40]!r} is not a number") from None
    low, high = task.label_range
    if not low <= value <= high:  # also true of nan
        raise _BadRow(f"{task.label_column} {text[:40]} is outside {low:g} to {high:g}")
    if task.kind != "similarity" and value != int(value):
        raise _BadRow(f"{task.label_column} {text[:40]} is not a whole number")
    return value


def _row(line: bytes, header: Sequence[str], task: Task) -> tuple[str, list[str], float]:
    """Id, texts and label of one line; the label is nan where there is no label column."""
    fields = _fields(line)
    if len(fields) != len(header):
        amount = "few" if len(fields) < len(header) else "many"
        raise _BadRow(f"too {amount} fields, {len(fields)} instead of {len(header)}")
    row = dict(zip(header, fields, strict=True))
    row_id = row["id"].strip()
    if not row_id:
        raise _BadRow("id is missing")
    texts = [_clean(row[name]) for name in task.text_columns]
    if not all(texts):
        raise _BadRow(f"{task.text_columns[texts.index('')]} is empty")
    return row_id, texts, _label(row[task.label_column], task) if task.label_column in row else math.nan


def _header(content: bytes, path: Path, task: Task, split: str) -> list[str]:
    """The column names in the first line; raises UserError unless each wanted one is there once."""
    try:
        header = [name.strip() for name in _fields(content.split(b"\n", 1)[0])]
    except _BadRow as error:
        raise UserError(
            f"{path}: the first line {error}: the file looks binary or damaged; give a tab-separated text file in UTF-8"
        ) from None
    wanted = ["id", *task.text_columns]
    if split != "test" or task.label_column in header:
        wanted.append(task.label_column)
    if all(header.count(name) == 1 for name in wanted):
        return header
    if b"\0" in content[:4096]:
        raise UserError(f"{path}: looks binary (NUL bytes); give a tab-separated text file in UTF-8")
    raise UserError(
        f"{path}: wrong columns for {task.title}: expected {', '.join(wanted)} once each and separated by tabs, "
        f"but found {repr(header)[:200]}"
    )


@dataclass(frozen=True)
class _Rows:
    """What a file holds for a task, column by column, and the lines that cannot be read with the reasons."""

    ids: list[str]
    texts: tuple[list[str], ...]
    labels: np.ndarray | None  # [N]
    bad: list[tuple[int, str]]

    @classmethod
    def parse(cls, lines: Sequence[bytes], header: Sequence[str], task: Task) -> "_Rows":
        """The rows of `lines`, the first of which is line 2 of the file."""
        seen: dict[str, int] = {}  # id -> its line
        rows: list[tuple[list[str], float]] = []
        bad: list[tuple[int, str]] = []
        for number, line in enumerate(lines, start=2):
            try:
                row_id, row_texts, label = _row(line, header, task)
                if row_id in seen:
                    raise _BadRow(f"id {row_id[:40]!r} was already used in line {seen[row_id]}")
            except _BadRow as error:
                bad.append((number, str(error)))
            else:
                seen[row_id] = number
                rows.append((row_texts, label))
        texts = tuple([row_texts[i] for row_texts, _ in rows] for i in range(len(task.text_columns)))
        labels = None
        if task.label_column in header:
            dtype = np.float32 if task.kind == "similarity" else np.int64
            labels = np.array([label for _, label in rows], dtype=dtype)
        return cls(list(seen), texts, labels, bad)

    def pack(self) -> Arrays:
        """The same as arrays."""
        columns = {"ids": self.ids, "reasons": [reason for _, reason in self.bad]}
        columns |= {f"texts/{i}": column for i, column in enumerate(self.texts)}
        arrays = {name: pack_texts(column) for name, column in columns.items()}
        arrays["lines"] = np.array([number for number, _ in self.bad], np.int64)
        return arrays if self.labels is None else {**arrays, "labels": self.labels}

    @classmethod
    def unpack(cls, arrays: Arrays) -> "_Rows":
        """The inverse of `pack`."""
        texts = tuple(unpack_texts(own) for name, own in arrays.items() if name.startswith("texts/"))
        bad = zip(arrays["lines"].tolist(), unpack_texts(arrays["reasons"]), strict=True)
        return cls(unpack_texts(arrays["ids"]), texts, arrays.get("labels"), list(bad))


def _rows(content: bytes, header: Sequence[str], task: Task) -> _Rows:
    """The rows of a file's content; those of a large file are kept between runs."""

    def parse() -> _Rows:
        return _Rows.parse(content.split(b"\n")[1:], header, task)

    if len(content) < LARGE_FILE:
        return parse()
    return _Rows.unpack(cached("examples", cache_key(content, task), lambda: parse().pack()))


def read_examples(path: Path, task: Task, split: str, bad_rows: BadRows) -> Examples:
    """All readable rows of a file; the others go to `bad_rows`, whose limit is checked when every row was bad.

    Columns are found by their names and others are ignored. Labels are read where there is a label column, which
    only a test file may lack. CRLF line ends and a byte order mark are accepted.

    Raises UserError for a file that is unreadable, empty, binary, without rows or with the wrong columns.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    content = content.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
    if not content:
        raise UserError(f"{path}: the file is empty; {_SOURCE}")
    header = _header(content, path, task, split)
    if b"\n" not in content:
        raise UserError(f"{path}: the file has a header but no rows; {_SOURCE}")
    rows = _rows(content, header, task)
    for number, reason in rows.bad:
        bad_rows.add(path, number, reason)
    if not rows.ids:
        bad_rows.check()
        number, reason = rows.bad[0]
        raise UserError(
            f"{path}: none of its {len(rows.bad)} rows can be read (line {number}: {reason}); mend the file"
        )
    return Examples(task, split, path, rows.ids, rows.texts, rows.labels)


# ----------------------------------------------------------------------------------------------------------------------
# Finding a task's files

SUBSET_SEED = 0  # --max_train_examples takes the same rows whatever --seed is, so that runs can be compared


def find_file(data_dir: Path, override: str | None, task: Task, split: str) -> Path | None:
    """The file of a split: the override, else the task's own name inside `data_dir`; None where there is none.

    Raises UserError where an override does not exist.
    """
    path = data_dir / task.files[split] if override is None else Path(override)
    if os.path.isfile(path):
        return path
    if override is not None:
        raise UserError(f"--{task.name}_{split} {override}: there is no such file; check the path")
    return None


def read_extra(path: Path, task: Task, bad_rows: BadRows) -> Examples:
    """A further training file (--NAME_extra), in the task's own format.

    Where a task has more than two classes and all labels are 0 or 1, as CFIMDB's, they become the lowest and the
    highest class (R1, section 5.1).
    """
    if not path.is_file():
        raise UserError(f"--{task.name}_extra {path}: there is no such file; check the path")
    examples = read_examples(path, task, "train", bad_rows)
    assert examples.labels is not None  # a training file has them
    if task.kind == "classes" and examples.labels.max() <= 1:
        return replace(examples, labels=examples.labels * int(task.label_range[1]))
    return examples


def concatenated(parts: Sequence[Examples]) -> Examples:
    """The examples of several files of one task, one file after the other."""
    first, *others = parts
    if not others:
        return first
    texts = tuple(list(chain.from_iterable(columns)) for columns in zip(*(part.texts for part in parts), strict=True))
    labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    return replace(first, ids=[own for part in parts for own in part.ids], texts=texts, labels=labels)


def load_split(data: DataOptions, options: TaskOptions, task: Task, split: str, bad_rows: BadRows) -> Examples | None:
    """The examples of a split, at most --max_train_examples of train; None for a test file that does not exist.

    Raises UserError for a missing train or dev file, for what `read_examples` refuses and past --max_bad_rows.
    """
    override = {"train": options.train, "dev": options.dev, "test": options.test}[split]
    path = find_file(Path(data.data_dir), override, task, split)
    if path is None and split == "test":
        return None
    if path is None:
        raise UserError(
            f"{Path(data.data_dir) / task.files[split]}: there is no {split} file of {task.title}; "
            f"name it with --{task.name}_{split} or its folder with --data_dir, or {_SOURCE}"
        )
    examples = read_examples(path, task, split, bad_rows)
    if split == "train":
        examples = concatenated([examples, *(read_extra(Path(name), task, bad_rows) for name in options.extra or ())])
    bad_rows.check()
    if split == "train" and data.max_train_examples is not None:
        return examples.take(data.max_train_examples, SUBSET_SEED)
    return examples


def load_splits(
    data: DataOptions,
    options: Mapping[str, TaskOptions],
    tasks: Mapping[str, Task],
    names: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, dict[str, Examples]]:
    """The examples of each split in `names`, by task. `say` hears of skipped rows and of missing test files.

    Raises UserError as `load_split` does.
    """
    bad_rows = BadRows(data.max_bad_rows, lambda line: say(f"skipped row {line}"))
    splits: dict[str, dict[str, Examples]] = {split: {} for split in names}
    for split in names:
        for name, task in tasks.items():
            examples = load_split(data, options[name], task, split, bad_rows)
            if examples is None:
                say(f"{task.title}: there is no test file {task.files['test']}, so no test predictions")
            else:
                splits[split][name] = examples
    if bad_rows.count:
        say(f"skipped {bad_rows.count} unreadable rows in all (--max_bad_rows {data.max_bad_rows})")
    return splits


# ----------------------------------------------------------------------------------------------------------------------
# Token ids and packed batches

MANY_TEXTS = 20_000  # from which on token ids are kept between runs; fewer are tokenised in less than a second


def token_arrays(
    texts: tuple[list[str], ...], tokenizer: Tokenizer, joined: bool, cleaner: Cleaner | None
) -> list[TokenArrays]:
    """Clean and tokenise columns of texts; with `joined`, two columns become one of pairs."""
    if cleaner is not None:
        texts = tuple([cleaner.clean(text) for text in column] for column in texts)
    return [tokenizer.encode(*texts)] if joined else [tokenizer.encode(column) for column in texts]


def kept_token_arrays(
    texts: tuple[list[str], ...], tokenizer: Tokenizer, joined: bool, cleaner: Cleaner | None
) -> list[TokenArrays]:
    """The same; those of many texts are kept between runs."""
    if sum(map(len, texts)) < MANY_TEXTS:
        return token_arrays(texts, tokenizer, joined, cleaner)

    def make() -> Arrays:
        made = token_arrays(texts, tokenizer, joined, cleaner)
        return {f"{name}/{i}": np.asarray(value) for i, own in enumerate(made) for name, value in vars(own).items()}

    parts = [tokenizer.sha256, tokenizer.max_length, tokenizers.__version__, joined, cleaner and cleaner.fingerprint]
    arrays = cached("tokens", cache_key(*parts, *("\n".join(column) for column in texts)), make)
    return [
        TokenArrays(
            input_ids=arrays[f"input_ids/{i}"],
            offsets=arrays[f"offsets/{i}"],
            second_start=arrays[f"second_start/{i}"],
            truncated=int(arrays[f"truncated/{i}"]),
        )
        for i in range(1 if joined else len(texts))
    ]


class Batches(Protocol):
    """What training and evaluation need of a split of a task."""

    examples: Examples

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example [N]."""

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples [B] as the model takes them."""

    def labels(self, indices: np.ndarray) -> torch.Tensor:
        """The examples' labels [B]."""


class TaskData:
    """One tokenised split of one task, from which any batch can be made."""

    def __init__(
        self, examples: Examples, tokenizer: Tokenizer, pair_encoding: str, cleaner: Cleaner | None = None
    ) -> None:
        """Clean and tokenise `examples`; with `cross`, the two texts of a pair become one sequence."""
        self.examples = examples
        joined = examples.task.is_pair and pair_encoding == "cross"
        self.tokens = kept_token_arrays(examples.texts, tokenizer, joined, cleaner)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def truncated(self) -> int:
        """Sequences that lost tokens to --max_length."""
        return sum(tokens.truncated for tokens in self.tokens)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example [N], both texts of a pair together."""
        return np.sum([np.diff(tokens.offsets) for tokens in self.tokens], axis=0)

    def sha256(self) -> str:
        """Names the tokens and labels in their order."""
        digest = hashlib.sha256()
        for tokens in self.tokens:
            for own in (tokens.input_ids, tokens.offsets, tokens.second_start):
                digest.update(own.tobytes())
        if self.examples.labels is not None:
            digest.update(self.examples.labels.tobytes())
        return digest.hexdigest()

    def batch(self, indices: np.ndarray) -> PackedBatch:
        """The examples [B] as one packed batch: B sequences, or 2B for siamese pairs, first texts before second."""
        ids, lengths, second = [], [], []
        for tokens in self.tokens:
            starts = tokens.offsets[indices]
            own = tokens.offsets[indices + 1] - starts
            ids.append(tokens.input_ids[ragged_rows(starts, own)])
            lengths.append(own)
            second.append(tokens.second_start[indices])
        return pack(np.concatenate(ids), np.concatenate(lengths), np.concatenate(second))

    def first_tokens(self, indices: np.ndarray) -> np.ndarray:
        """Number of the first token of each sequence of `batch(indices)` [S], all first texts counted before second."""
        sizes = [len(tokens.input_ids) for tokens in self.tokens]
        before = np.cumsum([0, *sizes[:-1]])
        return np.concatenate([n + tokens.offsets[indices] for n, tokens in zip(before, self.tokens, strict=True)])

    def labels(self, indices: np.ndarray) -> torch.Tensor:
        """The examples' labels [B]: int64 classes and 0/1, or float32 similarities."""
        assert self.examples.labels is not None, f"{self.examples.path} has no labels"
        return torch.from_numpy(self.examples.labels[indices])


def tokenise(
    splits: Mapping[str, Mapping[str, Examples]],
    tokenizer: Tokenizer,
    pair_encoding: str,
    extra_clean: bool,
    say: Callable[[str], None],
) -> dict[str, dict[str, TaskData]]:
    """Token ids for every split; `say` hears of sequences that had to be cut.

    Raises UserError where `extra_clean` is asked for and nltk or its data cannot be had.
    """
    cleaner = Cleaner() if extra_clean else None
    data = {
        split: {name: TaskData(examples, tokenizer, pair_encoding, cleaner) for name, examples in by_task.items()}
        for split, by_task in splits.items()
    }
    truncated = sum(own.truncated for by_task in data.values() for own in by_task.values())
    if truncated:
        say(f"truncated {truncated} sequences to {tokenizer.max_length} tokens (--max_length)")
    return data


# ----------------------------------------------------------------------------------------------------------------------
# Fetching


def main(argv: Sequence[str]) -> None:
    """Fetch the course's files."""
    parser = OneLineParser(prog="datasets.py", description="Fetch the course's files of 2024 and verify them.")
    parser.add_argument("--out", default="data", metavar="DIR", help="folder to put them in (default: %(default)s)")
    fetch(Path(parser.parse_args(argv).out), COURSE_URL)


if __name__ == "__main__":
    run_script(main)

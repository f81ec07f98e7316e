"""Parse the rows of a task's file; a row that cannot be read becomes a line number and a reason.

A file has tabs or commas between its fields, or a JSON object in each line.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks import Task
from text.token_cache import Arrays, cache_key, cached, pack_texts, unpack_texts
from utils.errors import UserError

LARGE_FILE = 8 << 20  # bytes; the rows of larger files are kept between runs. SST's and STS's have one or two million


class RowError(Exception):
    """The reason why a row cannot be read."""


class OutsideError(RowError):
    """The reason why a label cannot be used: `value` is outside the task's range."""

    def __init__(self, message: str, value: float) -> None:
        super().__init__(message)
        self.value = value


JSON_LINES = ""  # in place of the character between fields


@dataclass(frozen=True)
class Layout:
    """How a file is written: the character between fields or JSON_LINES, and the names of its columns in our words.

    `renames` has our word for each column that has another name in the file. `first_row` counts lines from 1. `quoting`
    is csv, or none where quotes are a part of the text.
    """

    delimiter: str
    header: list[str]
    renames: Mapping[str, str]
    first_row: int
    quoting: str = "csv"


def our_names(header: Sequence[str], renames: Mapping[str, str]) -> list[str]:
    """Return the columns by our words; a column whose name another one of this header takes over has none.

    So a file that has none of the renamed columns, such as the course's test file, is read by the usual names.
    """
    taken = {renames[name] for name in header if name in renames}
    return [renames.get(name, "" if name in taken else name) for name in header]


def parse_renames(columns: Sequence[str], task: Task) -> dict[str, str]:
    """Return our word for each column that --NAME_columns names. Raises UserError for anything but WORD=NAME."""
    words = task.column_words()
    renames = {}
    for item in columns:
        word, equals, name = item.partition("=")
        if not (equals and name.strip() and word.strip() in words):
            raise UserError(f"--{task.name}_columns {item}: write {' or '.join(f'{known}=NAME' for known in words)}")
        renames[name.strip()] = words[word.strip()]
    return renames


def split_fields(line: bytes, delimiter: str = "\t", quoting: str = "csv") -> list[str]:
    """Return the fields of one line. Raises RowError if the line is not UTF-8, has a NUL byte or a broken quote.

    Quoting is that of csv, as in the course's own reader: `"He said ""no""."` is He said "no". No field contains a line
    break, so each line is parsed alone: a broken quote costs one row, while a parser of the whole file would skip to
    the next quote. Without `strict`, the rest of the row would silently become part of the text.
    """
    text = decode(line)
    if quoting == "none":
        return text.rstrip("\r").split(delimiter)
    try:
        return next(csv.reader((text,), delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise RowError(f"has a broken quote or field ({str(error)!r}), which --quoting none takes as text") from None


def decode(line: bytes) -> str:
    """Return the text of a line. Raises RowError if it is not UTF-8 or has a NUL byte."""
    if b"\0" in line:
        raise RowError("holds a NUL byte")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1})") from None


def parse_object(line: bytes) -> dict[str, str]:
    """Return the values of a JSON object in one line as text. Raises RowError if it is none.

    Numbers become text, true and false become 1 and 0, and null and nested values become nothing.
    """
    try:
        values = json.loads(decode(line))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise RowError("is no JSON object")
    texts = {}
    for name, value in values.items():
        number = isinstance(value, (int, float))
        texts[name] = value if isinstance(value, str) else str(+value) if number else ""
    return {name: text.encode("utf-8", "replace").decode() for name, text in texts.items()}  # no lone surrogates


def possible_headers(line: bytes, path: Path, quoting: str = "csv") -> dict[str, list[str]]:
    """Return the column names in a file's first line by each character that may be between its fields.

    Raises RowError if the line cannot be read in any way.
    """
    if ".jsonl" in path.suffixes:
        return {JSON_LINES: list(parse_object(line))}
    found, first_error = {}, None
    for delimiter in ("\t", ","):
        try:
            found[delimiter] = [name.strip() for name in split_fields(line, delimiter, quoting)]
        except RowError as error:
            first_error = first_error or error
    if not found:
        raise first_error or RowError("cannot be read")
    return found


def find_layout(
    content: bytes, path: Path, task: Task, split: str, renames: Mapping[str, str], quoting: str = "csv"
) -> Layout:
    """Return how a file is written. Raises UserError unless each needed column is there once.

    Only a test file may lack the label column. Without a column of ids, the numbers of the rows are the ids.
    """
    remedy = "give a text file in UTF-8, separated by tabs or commas"
    try:
        headers = possible_headers(content.split(b"\n", 1)[0], path, quoting)
    except RowError as error:
        raise UserError(f"{path}: the first line {error}: the file looks binary or damaged; {remedy}") from None
    for delimiter, names in headers.items():
        header = our_names(names, renames)
        needed = list(task.text_columns)
        if split != "test" or task.label_column in header:
            needed.append(task.label_column)
        if all(header.count(name) == 1 for name in needed) and header.count("id") <= 1:
            return Layout(delimiter, header, renames, 1 if delimiter == JSON_LINES else 2, quoting)
    if b"\0" in content[:4096]:
        raise UserError(f"{path}: looks binary (NUL bytes); {remedy}")
    needed = [*task.text_columns, *([task.label_column] if split != "test" else [])]
    found = repr(max(headers.values(), key=len))[:200]
    words = ",".join(f"{word}=NAME" for word in task.column_words() if word != "id")
    raise UserError(
        f"{path}: wrong columns for {task.title}: expected {', '.join(needed)} once each and separated by tabs or "
        f"commas, and perhaps id, but found {found}; --{task.name}_columns {words} tells other names"
    )


def parse_label(text: str, task: Task) -> float:
    """Return the label of a row: a whole number, or any number for a similarity. Raises RowError for anything else."""
    text = text.strip()
    if not text:
        raise RowError(f"{task.label_column} is missing")
    try:
        value = float(text.replace("_", " "))  # float() reads 0_1 as 1
    except ValueError:
        raise RowError(f"{task.label_column} {text[:40]!r} is not a number") from None
    low, high = task.label_range
    if not low <= value <= high:  # also true for nan
        raise OutsideError(f"{task.label_column} {text[:40]} is outside {low:g} to {high:g}", value)
    if task.kind != "similarity" and value != int(value):
        raise RowError(f"{task.label_column} {text[:40]} is not a whole number")
    return value


def parse_fields(line: bytes, layout: Layout) -> dict[str, str]:
    """Return the fields of one line by our words. Raises RowError."""
    if layout.delimiter == JSON_LINES:
        texts = parse_object(line)
        return dict(zip(our_names(list(texts), layout.renames), texts.values(), strict=True))
    fields = split_fields(line, layout.delimiter, layout.quoting)
    if len(fields) != len(layout.header):
        amount = "few" if len(fields) < len(layout.header) else "many"
        raise RowError(f"too {amount} fields, {len(fields)} instead of {len(layout.header)}")
    return dict(zip(layout.header, fields, strict=True))


def parse_row(line: bytes, layout: Layout, task: Task, number: int) -> tuple[str, list[str], float]:
    """Return id, texts and label of one line; without a label column, the label is nan. Raises RowError.

    Without a column of ids, the id is `number`. White space in texts is collapsed and stripped. The tokenizer handles
    case and punctuation.
    """
    row = parse_fields(line, layout)
    row_id = row.get("id", "").strip() if "id" in layout.header else str(number)
    if not row_id:
        raise RowError("id is missing")
    texts = [" ".join(row.get(name, "").split()) for name in task.text_columns]
    if not all(texts):
        raise RowError(f"{task.text_columns[texts.index('')]} is empty")
    has_label = task.label_column in layout.header
    return row_id, texts, parse_label(row.get(task.label_column, ""), task) if has_label else math.nan


@dataclass(frozen=True)
class Rows:
    """The readable rows of a file, column by column, and the numbers of the other lines with the reasons."""

    ids: list[str]
    texts: tuple[list[str], ...]  # one list for each text column
    labels: np.ndarray | None  # [N]: int64 classes, float32 similarities; None without a label column
    bad: list[tuple[int, str]]  # line number, reason
    outside: np.ndarray  # labels [K] that are outside the task's range, float64

    @classmethod
    def parse(cls, lines: Sequence[bytes], layout: Layout, task: Task) -> "Rows":
        """Parse `lines`, the first of which holds the file's first row. Blank lines are no rows."""
        line_of: dict[str, int] = {}  # id -> line number
        rows: list[tuple[list[str], float]] = []
        bad: list[tuple[int, str]] = []
        outside: list[float] = []
        for number, line in enumerate(lines, start=layout.first_row):
            if line.strip(b" \r") == b"":
                continue
            try:
                row_id, row_texts, label = parse_row(line, layout, task, len(rows) + len(bad) + 1)
                if row_id in line_of:
                    raise RowError(f"id {row_id[:40]!r} was already used in line {line_of[row_id]}")
            except RowError as error:
                bad.append((number, str(error)))
                if isinstance(error, OutsideError):
                    outside.append(error.value)
            else:
                line_of[row_id] = number
                rows.append((row_texts, label))
        texts = tuple([row_texts[i] for row_texts, _ in rows] for i in range(len(task.text_columns)))
        labels = None
        if task.label_column in layout.header:
            dtype = np.float32 if task.kind == "similarity" else np.int64
            labels = np.array([label for _, label in rows], dtype=dtype)
        return cls(list(line_of), texts, labels, bad, np.array(outside, np.float64))

    def pack(self) -> Arrays:
        """Return the rows as arrays."""
        columns = {"ids": self.ids, "reasons": [reason for _, reason in self.bad]}
        columns |= {f"texts/{i}": column for i, column in enumerate(self.texts)}
        arrays = {name: pack_texts(column) for name, column in columns.items()}
        arrays["lines"] = np.array([number for number, _ in self.bad], np.int64)
        arrays["outside"] = self.outside
        return arrays if self.labels is None else {**arrays, "labels": self.labels}

    @classmethod
    def unpack(cls, arrays: Arrays) -> "Rows":
        """Return the inverse of `pack`."""
        texts = tuple(unpack_texts(column) for name, column in arrays.items() if name.startswith("texts/"))
        bad = zip(arrays["lines"].tolist(), unpack_texts(arrays["reasons"]), strict=True)
        return cls(unpack_texts(arrays["ids"]), texts, arrays.get("labels"), list(bad), arrays["outside"])

    def one_too_high(self, task: Task) -> bool:
        """Return whether all labels seem one too high: several follow the highest, and only the lowest never occurs."""
        low, high = (int(bound) for bound in task.label_range)
        if task.kind == "similarity" or self.labels is None:
            return False
        follow = len(self.outside) > 1 and bool((self.outside == high + 1).all())
        return follow and set(self.labels.tolist()) == set(range(low + 1, high + 1))


def read_rows(content: bytes, layout: Layout, task: Task) -> Rows:
    """Return the rows of a file's content; large files are read once and kept."""

    def parse() -> Rows:
        return Rows.parse(content.split(b"\n")[layout.first_row - 1 :], layout, task)

    if len(content) < LARGE_FILE:
        return parse()
    return Rows.unpack(cached("examples", cache_key(content, task, layout), lambda: parse().pack()))

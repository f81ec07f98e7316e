"""Parse the tab-separated rows of a task's file; a row that cannot be read becomes a line number and a reason."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks import Task
from text.token_cache import Arrays, cache_key, cached, pack_texts, unpack_texts
from utils.errors import UserError

LARGE_FILE = 8 << 20  # bytes; the rows of larger files are kept between runs. SST's and STS's have one or two million


class RowError(Exception):
    """The reason why a row cannot be read."""


def split_fields(line: bytes) -> list[str]:
    """Return the fields of one line. Raises RowError if the line is not UTF-8, has a NUL byte or a broken quote.

    Quoting is that of csv, as in the course's own reader: `"He said ""no""."` is He said "no". csv.QUOTE_NONE finds the
    same number of rows in all eleven files at hand, but leaves the quotes in about 1,900 sentences. No field contains a
    line break, so each line is parsed alone: a broken quote costs one row, while a parser of the whole file would skip
    to the next quote. Without `strict`, the rest of the row would silently become part of the text. The parser drops
    the carriage return of a CRLF line end.
    """
    if b"\0" in line:
        raise RowError("holds a NUL byte")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1})") from None
    try:
        return next(csv.reader((text,), delimiter="\t", strict=True), [])
    except csv.Error as error:
        raise RowError(f"has a broken quote or field ({str(error)!r})") from None


def parse_header(content: bytes, path: Path, task: Task, split: str) -> list[str]:
    """Return the column names in the first line. Raises UserError unless each needed column is there once.

    Only a test file may lack the label column.
    """
    try:
        header = [name.strip() for name in split_fields(content.split(b"\n", 1)[0])]
    except RowError as error:
        raise UserError(
            f"{path}: the first line {error}: the file looks binary or damaged; give a tab-separated text file in UTF-8"
        ) from None
    needed = ["id", *task.text_columns]
    if split != "test" or task.label_column in header:
        needed.append(task.label_column)
    if all(header.count(name) == 1 for name in needed):
        return header
    if b"\0" in content[:4096]:
        raise UserError(f"{path}: looks binary (NUL bytes); give a tab-separated text file in UTF-8")
    raise UserError(
        f"{path}: wrong columns for {task.title}: expected {', '.join(needed)} once each and separated by tabs, "
        f"but found {repr(header)[:200]}"
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
        raise RowError(f"{task.label_column} {text[:40]} is outside {low:g} to {high:g}")
    if task.kind != "similarity" and value != int(value):
        raise RowError(f"{task.label_column} {text[:40]} is not a whole number")
    return value


def parse_row(line: bytes, header: Sequence[str], task: Task) -> tuple[str, list[str], float]:
    """Return id, texts and label of one line; without a label column, the label is nan. Raises RowError.

    White space in texts is collapsed and stripped. The tokenizer handles case and punctuation.
    """
    fields = split_fields(line)
    if len(fields) != len(header):
        amount = "few" if len(fields) < len(header) else "many"
        raise RowError(f"too {amount} fields, {len(fields)} instead of {len(header)}")
    row = dict(zip(header, fields, strict=True))
    row_id = row["id"].strip()
    if not row_id:
        raise RowError("id is missing")
    texts = [" ".join(row[name].split()) for name in task.text_columns]
    if not all(texts):
        raise RowError(f"{task.text_columns[texts.index('')]} is empty")
    return row_id, texts, parse_label(row[task.label_column], task) if task.label_column in row else math.nan


@dataclass(frozen=True)
class Rows:
    """The readable rows of a file, column by column, and the numbers of the other lines with the reasons."""

    ids: list[str]
    texts: tuple[list[str], ...]  # one list for each text column
    labels: np.ndarray | None  # [N]: int64 classes, float32 similarities; None without a label column
    bad: list[tuple[int, str]]  # line number, reason

    @classmethod
    def parse(cls, lines: Sequence[bytes], header: Sequence[str], task: Task) -> "Rows":
        """Parse `lines`, the first of which is line 2 of the file."""
        line_of: dict[str, int] = {}  # id -> line number
        rows: list[tuple[list[str], float]] = []
        bad: list[tuple[int, str]] = []
        for number, line in enumerate(lines, start=2):
            try:
                row_id, row_texts, label = parse_row(line, header, task)
                if row_id in line_of:
                    raise RowError(f"id {row_id[:40]!r} was already used in line {line_of[row_id]}")
            except RowError as error:
                bad.append((number, str(error)))
            else:
                line_of[row_id] = number
                rows.append((row_texts, label))
        texts = tuple([row_texts[i] for row_texts, _ in rows] for i in range(len(task.text_columns)))
        labels = None
        if task.label_column in header:
            dtype = np.float32 if task.kind == "similarity" else np.int64
            labels = np.array([label for _, label in rows], dtype=dtype)
        return cls(list(line_of), texts, labels, bad)

    def pack(self) -> Arrays:
        """Return the rows as arrays."""
        columns = {"ids": self.ids, "reasons": [reason for _, reason in self.bad]}
        columns |= {f"texts/{i}": column for i, column in enumerate(self.texts)}
        arrays = {name: pack_texts(column) for name, column in columns.items()}
        arrays["lines"] = np.array([number for number, _ in self.bad], np.int64)
        return arrays if self.labels is None else {**arrays, "labels": self.labels}

    @classmethod
    def unpack(cls, arrays: Arrays) -> "Rows":
        """Return the inverse of `pack`."""
        texts = tuple(unpack_texts(column) for name, column in arrays.items() if name.startswith("texts/"))
        bad = zip(arrays["lines"].tolist(), unpack_texts(arrays["reasons"]), strict=True)
        return cls(unpack_texts(arrays["ids"]), texts, arrays.get("labels"), list(bad))


def read_rows(content: bytes, header: Sequence[str], task: Task) -> Rows:
    """Return the rows of a file's content, of which the first line is `header`; large files are read once and kept."""

    def parse() -> Rows:
        return Rows.parse(content.split(b"\n")[1:], header, task)

    if len(content) < LARGE_FILE:
        return parse()
    return Rows.unpack(cached("examples", cache_key(content, task), lambda: parse().pack()))

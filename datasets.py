"""Read csv and jsonl files into examples, token ids and packed batches.

The course's csv files are tab-separated, in spite of their name. As a script, `python datasets.py --out data` fetches
them and verifies each.
"""

from cli.fetch import main
from utils.console import run_script

if __name__ == "__main__":  # before the imports below, none of which is needed to fetch files
    run_script(main)

import codecs
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import tokenizers
import torch

from config import DataOptions, TaskOptions
from tasks import TASKS, Task
from text.cleaning import Cleaner
from text.packing import Batch, PackedBatch, pack, ragged_rows
from text.rows import RowError, find_layout, parse_renames, possible_headers, read_rows
from text.token_cache import Arrays, cache_key, cached
from text.tokenizer import TokenArrays, Tokenizer
from utils.errors import UserError
from utils.untrusted import MAX_DATA, limited, open_regular, shown


@dataclass(frozen=True, eq=False)
class Examples:
    """One split of one task, column by column.

    `texts` has one list for each text column. `labels` is [N]: int64 for classes and binary, float32 for similarity
    (never rounded), or None if the file has no label column.
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
        """Return a random subset of `count` examples in file order, or self if there are no more than that."""
        if count >= len(self):
            return self
        return self.at(np.sort(np.random.default_rng(seed).choice(len(self), size=count, replace=False)))

    def at(self, chosen: np.ndarray) -> "Examples":
        """Return the examples at these rows [M]."""
        return replace(
            self,
            ids=[self.ids[i] for i in chosen],
            texts=tuple([column[i] for i in chosen] for column in self.texts),
            labels=None if self.labels is None else self.labels[chosen],
        )


class BadRows:
    """The unreadable rows in all files of a run: their count, and reports up to the limit.

    Reports stop past the limit, since a wrong label column would print 280,000 of them. The count continues.
    """

    SHOWN = 3  # rows that the final error repeats
    REPORTED = 20  # rows that are reported if the limit is a share

    def __init__(self, limit: float, report: Callable[[str], None]) -> None:
        """Allow so many rows in all files or, if `limit` is between 0 and 1, that share of each file."""
        self.limit = limit
        self.is_share = 0 < limit < 1
        self.report = report
        self.count = 0
        self.first: list[str] = []

    def add(self, path: Path, line_number: int, reason: str) -> None:
        """Report "FILE:LINE: reason" and count it."""
        place = shown(f"{path}:{line_number}: {reason}")
        self.count += 1
        if len(self.first) < self.SHOWN:
            self.first.append(place)
        if self.count <= (self.REPORTED if self.is_share else self.limit) + 1:
            self.report(place)

    def add_file(self, path: Path, bad: Sequence[tuple[int, str]], rows: int) -> None:
        """Report and count the unreadable rows of a file that has so many rows in all.

        Raises UserError if they are a larger share of the file than the limit allows.
        """
        for number, reason in bad:
            self.add(path, number, reason)
        if self.is_share and len(bad) > self.limit * rows:
            number, reason = bad[0]
            raise UserError(
                f"{path}: {len(bad):,} of its {rows:,} rows are unreadable, more than --max_bad_rows "
                f"{100 * self.limit:g}% (line {number}: {reason}); mend the file or raise --max_bad_rows"
            )

    def check(self) -> None:
        """Raise UserError if there are more unreadable rows than the limit allows."""
        if self.count > self.limit and not self.is_share:
            more = "; ..." if self.count > len(self.first) else ""
            raise UserError(
                f"unreadable rows: {self.count:,}, more than --max_bad_rows {self.limit:g} "
                f"({'; '.join(self.first)}{more}); mend the file or raise --max_bad_rows"
            )


MAX_HEADER = 1 << 20  # bytes of a file's first line
_SOURCE = "fetch the course's files with `python datasets.py --out data` or try --data_dir data/sample"


def open_data(path: Path) -> BinaryIO | gzip.GzipFile:
    """Open a file for reading; .gz is decompressed. Raises OSError as `open_regular` does."""
    file = open_regular(path)
    return gzip.open(file) if path.suffix == ".gz" else file


def read_content(path: Path) -> bytes:
    """Return the content of a file without a byte order mark and blank lines at its end; .gz is decompressed.

    Raises UserError if the file cannot be read.
    """
    try:
        with open_data(path) as file:
            content = limited(file, MAX_DATA)
    except (ValueError, MemoryError) as error:
        reason = str(error) or "larger than the memory"
        raise UserError(f"{path}: is too large ({reason}); split the file") from error
    except gzip.BadGzipFile as error:
        raise UserError(f"{path}: cannot be decompressed ({error}); compress it with gzip") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is damaged ({error}); compress it anew") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return content.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")


def column_names(path: Path) -> list[str]:
    """Return the column names in the first line of a file, or nothing if it cannot be read."""
    try:
        with open_data(path) as file:
            first = file.readline(MAX_HEADER).removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
        return max(possible_headers(first, path).values(), key=len)
    except (OSError, EOFError, zlib.error, RowError):
        return []


def read_examples(
    path: Path, task: Task, split: str, bad_rows: BadRows, columns: Sequence[str] = (), quoting: str = "csv"
) -> Examples:
    """Return the examples in all readable rows of a file; the other rows go to `bad_rows`.

    Columns are found by name, and `columns` are the file's names (--NAME_columns). `quoting` is --quoting. Only a
    test file may lack the label column. CRLF line ends and a byte order mark are accepted. Raises UserError for a file
    that is unreadable, empty, binary, without readable rows, with the wrong columns or with labels that are all one too
    high.
    """
    renames = parse_renames(columns, task)
    content = read_content(path)
    if not content:
        raise UserError(f"{path}: the file is empty; {_SOURCE}")
    layout = find_layout(content, path, task, split, renames, quoting)
    rows = read_rows(content, layout, task)
    if not rows.ids and not rows.bad:
        raise UserError(f"{path}: the file has a header but no rows; {_SOURCE}")
    if rows.one_too_high(task):
        low, high = task.label_range
        raise UserError(
            f"{path}: labels {low + 1:g} to {high + 1:g}? {task.title} has {low:g} to {high:g}, and no label is "
            f"{low:g}; subtract 1 from every {task.label_column}"
        )
    bad_rows.add_file(path, rows.bad, len(rows.ids) + len(rows.bad))
    if not rows.ids:
        bad_rows.check()
        count, (number, reason) = len(rows.bad), rows.bad[0]
        raise UserError(f"{path}: none of its {count} rows can be read (line {number}: {reason}); mend the file")
    return Examples(task, split, path, rows.ids, rows.texts, rows.labels)


SUBSET_SEED = 0  # --max_train_examples takes the same rows for each --seed, so that runs can be compared


def find_file(data_dir: Path, override: str | None, task: Task, split: str) -> Path | None:
    """Return the file of a split: `override`, which must exist, or the task's file in `data_dir`, or None."""
    path = data_dir / task.files[split] if override is None else Path(override)
    if os.path.isfile(path):
        return path
    if override is not None:
        raise UserError(f"--{task.name}_{split} {override}: there is no such file; check the path")
    return None


def find_extra(data_dir: Path, name: str, task: Task) -> Path | None:
    """Return a further training file (--NAME_extra) from the working folder, else from `data_dir`.

    Return None if neither has it and it is the training file of another task, such as CFIMDB's, since a recipe may name
    it. Raises UserError for any other file that is missing.
    """
    for path in (Path(name), data_dir / name):
        if path.is_file():
            return path
    if name in {row.files["train"] for row in TASKS.values()}:
        return None
    raise UserError(
        f"--{task.name}_extra {name}: there is no such file, here or in --data_dir {data_dir}; check the path"
    )


def read_extra(
    path: Path,
    task: Task,
    bad_rows: BadRows,
    say: Callable[[str], None],
    columns: Sequence[str] = (),
    quoting: str = "csv",
) -> Examples:
    """Return the examples of a further training file (--NAME_extra), which has the format of the task.

    If the task has classes and all labels in the file are 0 or 1, as in CFIMDB, they become the lowest and the highest
    class (R1, section 5.1), which `say` tells. Raises UserError for what `read_examples` refuses.
    """
    examples = read_examples(path, task, "train", bad_rows, columns, quoting)
    assert examples.labels is not None  # a training file has them
    if task.kind == "classes" and examples.labels.max() <= 1:
        highest = int(task.label_range[1])
        say(f"{path}: its labels 0 and 1 become 0 and {highest}, the lowest and the highest class of {task.title}")
        return replace(examples, labels=examples.labels * highest)
    return examples


def concatenated(parts: Sequence[Examples]) -> Examples:
    """Return the examples of several files of one task, one file after the other."""
    first, *others = parts
    if not others:
        return first
    texts = tuple(list(chain.from_iterable(columns)) for columns in zip(*(part.texts for part in parts), strict=True))
    labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    return replace(first, ids=[row_id for part in parts for row_id in part.ids], texts=texts, labels=labels)


def load_split(
    data: DataOptions,
    options: TaskOptions,
    task: Task,
    split: str,
    bad_rows: BadRows,
    say: Callable[[str], None] = print,
) -> Examples | None:
    """Return the examples of a split, or None if there is no test file. --max_train_examples limits the training split.

    Raises UserError for a missing train or dev file, for too many bad rows, and as `find_extra` and `read_examples` do.
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
    columns = options.columns or ()
    examples = read_examples(path, task, split, bad_rows, columns, data.quoting)
    if split == "train":
        found = [find_extra(Path(data.data_dir), name, task) for name in options.extra or ()]
        more = [read_extra(path, task, bad_rows, say, columns, data.quoting) for path in found if path]
        examples = concatenated([examples, *more])
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
    """Return the examples of each split in `names`, by split and task.

    `say` reports skipped rows, missing test files, and a missing training file of another task (--sst_extra). Raises
    UserError as `load_split` does.
    """
    bad_rows = BadRows(data.max_bad_rows, lambda line: say(f"skipped row {line}"))
    splits: dict[str, dict[str, Examples]] = {split: {} for split in names}
    for split in names:
        for name, task in tasks.items():
            examples = load_split(data, options[name], task, split, bad_rows, say)
            if examples is None:
                say(f"{task.title}: there is no test file {task.files['test']}, so no test predictions")
            else:
                splits[split][name] = examples
            for extra in (options[name].extra or ()) if split == "train" else ():
                if find_extra(Path(data.data_dir), extra, task) is None:
                    say(f"--{name}_extra {extra}: there is no such file; {task.title} trains without it")
    if bad_rows.count:
        say(f"skipped {bad_rows.count} unreadable rows in all (--max_bad_rows {data.max_bad_rows:g})")
    return splits


MANY_TEXTS = 20_000  # token ids of so many texts are kept between runs; fewer take less than a second


def token_arrays(
    texts: tuple[list[str], ...], tokenizer: Tokenizer, joined: bool, cleaner: Cleaner | None
) -> list[TokenArrays]:
    """Clean and tokenise columns of texts. With `joined`, two columns become one column of pairs."""
    if cleaner is not None:
        texts = tuple([cleaner.clean(text) for text in column] for column in texts)
    return [tokenizer.encode(*texts)] if joined else [tokenizer.encode(column) for column in texts]


def kept_token_arrays(
    texts: tuple[list[str], ...], tokenizer: Tokenizer, joined: bool, cleaner: Cleaner | None
) -> list[TokenArrays]:
    """Return the same as `token_arrays`, but keep the token ids of many texts between runs."""
    if sum(map(len, texts)) < MANY_TEXTS:
        return token_arrays(texts, tokenizer, joined, cleaner)

    def make() -> Arrays:
        columns = enumerate(token_arrays(texts, tokenizer, joined, cleaner))
        return {f"{name}/{i}": np.asarray(value) for i, column in columns for name, value in vars(column).items()}

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
    """What training and evaluation need from a split of a task."""

    examples: Examples

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example [N]."""

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the examples [B] as a batch for the model."""

    def labels(self, indices: np.ndarray) -> torch.Tensor:
        """Return the labels [B] of the examples."""


class TaskData:
    """One tokenised split of one task, which makes any batch."""

    def __init__(
        self, examples: Examples, tokenizer: Tokenizer, pair_encoding: str, cleaner: Cleaner | None = None
    ) -> None:
        """Clean and tokenise `examples`. With `pair_encoding` cross, the two texts of a pair become one sequence."""
        self.examples = examples
        joined = examples.task.is_pair and pair_encoding == "cross"
        self.tokens = kept_token_arrays(examples.texts, tokenizer, joined, cleaner)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def truncated(self) -> int:
        """Number of sequences that lost tokens to --max_length."""
        return sum(tokens.truncated for tokens in self.tokens)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example [N], both texts of a pair together."""
        return np.sum([np.diff(tokens.offsets) for tokens in self.tokens], axis=0)

    def sha256(self) -> str:
        """Return the hash of the tokens and labels in their order."""
        digest = hashlib.sha256()
        for tokens in self.tokens:
            for array in (tokens.input_ids, tokens.offsets, tokens.second_start):
                digest.update(array.tobytes())
        if self.examples.labels is not None:
            digest.update(self.examples.labels.tobytes())
        return digest.hexdigest()

    def batch(self, indices: np.ndarray) -> PackedBatch:
        """Return the examples [B] as one packed batch of B sequences, or of 2B for siamese pairs.

        In a siamese batch, all first texts come before all second ones.
        """
        ids, lengths, second_starts = [], [], []
        for tokens in self.tokens:
            starts = tokens.offsets[indices]
            lengths.append(tokens.offsets[indices + 1] - starts)
            ids.append(tokens.input_ids[ragged_rows(starts, lengths[-1])])
            second_starts.append(tokens.second_start[indices])
        return pack(np.concatenate(ids), np.concatenate(lengths), np.concatenate(second_starts))

    def first_tokens(self, indices: np.ndarray) -> np.ndarray:
        """Return the number in the split of the first token of each sequence of `batch(indices)`: [S].

        Tokens are counted through all first texts, then through all second ones.
        """
        sizes = [len(tokens.input_ids) for tokens in self.tokens]
        before = np.cumsum([0, *sizes[:-1]])
        return np.concatenate([n + tokens.offsets[indices] for n, tokens in zip(before, self.tokens, strict=True)])

    def labels(self, indices: np.ndarray) -> torch.Tensor:
        """Return the labels [B] of the examples: int64 classes, int64 0 or 1, or float32 similarities."""
        assert self.examples.labels is not None, f"{self.examples.path} has no labels"
        return torch.from_numpy(self.examples.labels[indices])


def tokenise(
    splits: Mapping[str, Mapping[str, Examples]],
    tokenizer: Tokenizer,
    pair_encodings: Mapping[str, str],
    extra_clean: bool,
    say: Callable[[str], None],
) -> dict[str, dict[str, TaskData]]:
    """Return the token ids of each split, by split and task. `say` reports how many sequences were truncated.

    `pair_encodings` names siamese or cross for each task, as `MultitaskBERT.pair_encodings` does. Raises UserError if
    `extra_clean` is set but nltk or its data are not available.
    """
    cleaner = Cleaner() if extra_clean else None
    data = {
        split: {name: TaskData(part, tokenizer, pair_encodings[name], cleaner) for name, part in by_task.items()}
        for split, by_task in splits.items()
    }
    truncated = sum(split.truncated for by_task in data.values() for split in by_task.values())
    if truncated:
        say(f"truncated {truncated} sequences to {tokenizer.max_length} tokens (--max_length)")
    return data

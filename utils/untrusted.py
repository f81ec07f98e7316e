"""Read files that somebody else may have made, and print what is in them.

Files are read up to a size, and never from what has no end. Texts are printed by `shown`.
"""

import errno
import json
import re
import stat
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from gzip import GzipFile

MAX_JSON = 4 << 20  # bytes; a parsed file can take thirty times as much memory
MAX_TEXT = 256 << 20  # bytes of a text file
MAX_DATA = 2 << 30  # bytes of a file of examples when it is decompressed; its rows take some times as much memory
PIECE = 1 << 20  # bytes read at a time
MAX_DIGITS = 40  # of a whole number; longer ones overflow what computes with them
MAX_WORD, MAX_SHOWN = 300, 2000  # characters of a word and of a text that are shown
PASSWORD = re.compile(r"(://[^\s:/@]*:)\S+(?=@)|([?&;]\w*(?:password|passwd|pwd)=)[^&;\s'\"]+", re.IGNORECASE)


def shown(text: str, limit: int | None = MAX_SHOWN) -> str:
    """Return a text that somebody else may have written as a terminal or a report may show it.

    The passwords of URLs are left out. Characters that move a cursor or end a line are spelled out. Words of more than
    MAX_WORD characters and the whole, above `limit`, lose their middles. With `limit` None the text is one of ours,
    with something foreign inside: its line feeds, tabs and lengths stay.
    """
    text = PASSWORD.sub(r"\1\2***", text)
    kept = "\n\t" if limit is None else ""
    if limit is not None:
        text = re.sub(rf"\S{{{MAX_WORD + 1},}}", lambda word: without_middle(word[0], MAX_WORD), text)
    if not text.isprintable():
        text = "".join(c if c in kept or is_harmless(c) else c.encode("unicode_escape").decode() for c in text)
    return text if limit is None else without_middle(text, limit)


def is_harmless(character: str) -> bool:
    """Return whether a terminal prints a character where its cursor is, and does nothing else."""
    return character.isprintable() or unicodedata.category(character) == "Zs"  # a space of any width


def without_middle(text: str, limit: int) -> str:
    """Return a text of `limit` characters at most: the middle of a longer one is left out."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[: half - 2]}...{text[-half + 2 :]}"


def open_regular(path: Path) -> BinaryIO:
    """Open a file, or what a link leads to, for reading. Raises OSError for a pipe or a device, which may never end."""
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise OSError(errno.EINVAL, "it is a pipe or a device; name a file")
    return path.open("rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a file. Raises OSError if it cannot be read, and ValueError above `limit` bytes."""
    with open_regular(path) as file:
        return limited(file, limit)


def limited(file: "BinaryIO | GzipFile", limit: int) -> bytes:
    """Return what is left in an open file. Raises ValueError if it is more than `limit` bytes."""
    pieces, size = [], 0  # read(limit) would ask for all of that memory at once
    while size <= limit and (piece := file.read(PIECE)):
        pieces.append(piece)
        size += len(piece)
    content = b"".join(pieces)
    if len(content) > limit:
        raise ValueError(f"larger than {limit >> 20} MiB")
    return content


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Return the text of a file, in which no character but a line feed ends a line.

    Raises OSError if it cannot be read, and ValueError if it is not UTF-8 or larger than `limit` bytes.
    """
    return read_bytes(path, limit).decode("utf-8-sig")


def read_json(path: Path) -> Any:
    """Return the content of a json file.

    Raises OSError if the file cannot be read, and ValueError as `parse_json` does, or if it is too large.
    """
    return parse_json(read_bytes(path, MAX_JSON).decode("utf-8-sig"))


def parse_json(text: str) -> Any:
    """Return the value that a text in JSON has.

    Raises ValueError if it is no JSON, is nested too deeply, or has a number of more than MAX_DIGITS digits.
    """
    try:
        return json.loads(text, parse_int=whole_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def whole_number(digits: str) -> int:
    """Return the number that digits spell. Raises ValueError if they are more than MAX_DIGITS."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)

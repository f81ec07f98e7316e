"""Read files that somebody else may have made: of a bounded size, and never from what has no end."""

import errno
import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from gzip import GzipFile

MAX_JSON = 4 << 20  # bytes; a parsed file can take thirty times as much memory
MAX_TEXT = 256 << 20  # bytes of a text file
MAX_DATA = 2 << 30  # bytes of a file of examples when it is decompressed; its rows take some times as much memory


def shown(name: str) -> str:
    """Return a name as a message may print it: characters that move a terminal's cursor are spelled out."""
    return name if name.isprintable() else repr(name)


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
    content = file.read(limit + 1)
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

    Raises OSError if the file cannot be read, and ValueError if it is no JSON, too large or nested too deeply.
    """
    content = read_bytes(path, MAX_JSON)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None

"""Files that are always whole, and the folder for what can be made again."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from config import UserError


def cache_folder() -> Path:
    """Where the package keeps what it can fetch or compute again: minbert in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minbert"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it: `path` is never half a file.

    Raises UserError where the folder cannot be written or the disk is full; the old file then stands unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({cause(error, path.parent)})") from error
    finally:
        with suppress(OSError):  # it is gone, or its folder could not even be made
            temporary.unlink()


def cause(error: Exception, folder: Path) -> str:
    """The reason of a failed write. torch's file writer hides a full disk behind a RuntimeError of its own."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or (isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 1 << 20):
        return "no space left on the disk; free some, or choose another --run_dir"
    return first_line(error)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)

"""Write files that are always whole, lock them, and find the cache folder."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.errors import UserError, first_line


def cache_folder() -> Path:
    """Return the cache folder: minbert in $XDG_CACHE_HOME or ~/.cache. Raises UserError if neither is known."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "minbert"
    try:
        return Path.home() / ".cache" / "minbert"
    except RuntimeError as error:
        raise UserError("this user has no home folder; name one for caches in the variable XDG_CACHE_HOME") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it, so that `path` is never half a file.

    With `keep`, the old file is kept under that name. Raises UserError if the folder cannot be written, the disk is
    full, `write` fails, or `path` is a folder or a device such as /dev/null; the old file is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError("it is a folder or a device")
        remove_left_files(path)
        with temporary.open("ab") as begun:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(begun, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mode = temporary.stat().st_mode  # what the umask allows; safetensors lets only the owner read its files
            write(temporary)
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except Exception as error:  # pickle raises a dozen kinds for content that cannot be written
        raise UserError(f"{path}: cannot be written ({cause(error, path.parent)})") from error
    finally:
        with suppress(OSError):  # the file was renamed, or its folder could not be made
            temporary.unlink()


def remove_left_files(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes have left. Those of living processes are locked."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if temporary.suffixes[-2][1:].isdigit() and temporary.is_file():
            with suppress(OSError), temporary.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()


def lock(path: Path, what: str) -> None:
    """Lock the file `path` for this process until it ends, however it ends.

    Raises UserError that begins with `what` and names the holder if another process has the lock. On a file system
    without locks this does nothing.
    """
    # never closed, since closing would release the lock
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise UserError(
                f"{what}: a run is going on here ({holder}); wait for it or choose another folder"
            ) from None
    with suppress(OSError):  # on a full disk, the message cannot name the holder
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def cause(error: Exception, folder: Path) -> str:
    """Return the reason of a failed write. torch and safetensors hide a full disk behind other errors."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if not full and not isinstance(error, OSError) and folder.is_dir():
        full = shutil.disk_usage(folder).free < 1 << 20
    if full:
        return "no space left on the disk; free some, or choose another folder"
    return first_line(error)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises UserError as `write_atomically` does."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a json file atomically. Raises UserError as `write_atomically` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def probe_folder(folder: Path, flag: str) -> None:
    """Make a folder. Raise UserError, naming `flag`, if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # which has no name, so that no kill leaves it behind
            probe.write(b"x")
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({first_line(error)}); choose another") from error


def probe_file(path: Path, flag: str) -> None:
    """Raise UserError, naming `flag`, if a file cannot be written, or is a folder or a device."""
    probe_folder(path.parent, flag)
    if path.exists() and not path.is_file():
        raise UserError(f"{flag} {path}: is a folder or a device; name a file, which may be a new one")

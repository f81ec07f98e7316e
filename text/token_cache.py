"""Keep arrays between runs: reading and tokenising a file like Quora's takes 10 s or more, loading it less than one.

The name of a kept file is the hash of everything that it depends on, including the code of this package, so it never
has to be deleted by hand. Deleting the folder is always safe.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError, first_line
from utils.files import cache_folder, write_atomically
from utils.pickles import refuse_inflating

logger = logging.getLogger("minbert")

Arrays = dict[str, np.ndarray]

MAX_BYTES = 2 << 30  # in the folder; beyond that, the files that were unused for longest are deleted
ROOT = Path(__file__).resolve().parent.parent
CODE = ("datasets.py", "text/rows.py", "text/cleaning.py", "text/tokenizer.py", "text/token_cache.py")


def cache_key(*parts: object) -> str:
    """Return the hash of `parts` (bytes as they are, others by their text) and of the code that makes the arrays."""
    digest = hashlib.sha256()
    for part in [*((ROOT / name).read_bytes() for name in CODE), *parts]:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def cached(kind: str, key: str, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays kept under `key`, or else those that `make` returns; keep these if the folder is writable."""
    path = cache_folder() / "arrays" / f"{kind}-{key[:32]}.npz"
    try:
        arrays = _read(path)
        logger.info("%s from %s", kind, path)
        return arrays
    except FileNotFoundError:
        pass
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
        logger.info("%s: cannot be read (%s) and is made again", path, first_line(error))
    arrays = make()
    try:
        write_atomically(path, lambda temporary: _write(temporary, arrays))
        _prune(path.parent)
    except UserError as error:
        logger.info("%s not kept for the next run: %s", kind, error)
    return arrays


def pack_texts(texts: Sequence[str]) -> np.ndarray:
    """Return texts, none of which is empty or has a line break, as one array of bytes."""
    return np.frombuffer("\n".join(texts).encode(), np.uint8)


def unpack_texts(packed: np.ndarray) -> list[str]:
    """Return the inverse of `pack_texts`."""
    return packed.tobytes().decode().split("\n") if packed.size else []


def _read(path: Path) -> Arrays:
    """Return the arrays of a kept file. A damaged file may raise anything."""
    refuse_inflating(path)
    with np.load(path, allow_pickle=False) as saved:
        names = str(saved["names"]).split()  # a missing array raises KeyError
        arrays = {name: saved[name] for name in names}
    with suppress(OSError):
        os.utime(path)  # _prune looks at this
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    """Write arrays with the list of their names."""
    content: dict[str, Any] = {"names": np.array(" ".join(arrays)), **arrays}
    with path.open("wb") as file:
        np.savez(file, **content)


def _prune(folder: Path) -> None:
    """Delete the files that were unused for longest until MAX_BYTES are left."""
    with suppress(OSError):  # another process may delete the same files
        total = 0
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            if total > MAX_BYTES:
                path.unlink()

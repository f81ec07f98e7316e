"""Arrays kept between runs: a file of Quora's size takes 10 s or more to read and tokenise, less than one from here.

What is kept is named by the hash of all that it follows from, this package's code included, so that it never has to be
thrown away by hand. Deleting the folder is always right.
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
from utils.untrusted import refuse_inflating

logger = logging.getLogger("minbert")

Arrays = dict[str, np.ndarray]

MAX_BYTES = 2 << 30  # in the folder; beyond that, what was longest unused goes
ROOT = Path(__file__).resolve().parent.parent
CODE = ("text/token_cache.py", "datasets.py", "text/cleaning.py", "text/tokenizer.py")  # what makes the arrays


def cache_key(*parts: object) -> str:
    """The hash of `parts` (bytes as they are, others by their text) and of the code."""
    digest = hashlib.sha256()
    for part in [*((ROOT / name).read_bytes() for name in CODE), *parts]:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def cached(kind: str, key: str, make: Callable[[], Arrays]) -> Arrays:
    """What was kept under `key`; else what `make` returns, which is then kept if the folder can be written."""
    path = cache_folder() / "arrays" / f"{kind}-{key[:32]}.npz"
    try:
        arrays = _read(path)
        logger.info("%s from %s", kind, path)
        return arrays
    except FileNotFoundError:
        pass
    except Exception as error:  # of a damaged file numpy and zipfile raise a dozen kinds
        logger.info("%s: cannot be read (%s) and is made again", path, first_line(error))
    arrays = make()
    try:
        write_atomically(path, lambda temporary: _write(temporary, arrays))
        _prune(path.parent)
    except UserError as error:
        logger.info("%s not kept for the next run: %s", kind, error)
    return arrays


def pack_texts(texts: Sequence[str]) -> np.ndarray:
    """Texts that are not empty and have no line breaks, as one array of bytes."""
    return np.frombuffer("\n".join(texts).encode(), np.uint8)


def unpack_texts(packed: np.ndarray) -> list[str]:
    """The inverse of `pack_texts`."""
    return packed.tobytes().decode().split("\n") if packed.size else []


def _read(path: Path) -> Arrays:
    refuse_inflating(path)
    with np.load(path, allow_pickle=False) as saved:
        names = str(saved["names"]).split()  # so that none is missing
        arrays = {name: saved[name] for name in names}
    with suppress(OSError):
        os.utime(path)  # for _prune
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    content: dict[str, Any] = {"names": np.array(" ".join(arrays)), **arrays}
    with path.open("wb") as file:
        np.savez(file, **content)


def _prune(folder: Path) -> None:
    """Delete what was longest unused until MAX_BYTES are left; another process may be doing the same."""
    with suppress(OSError):
        total = 0
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            if total > MAX_BYTES:
                path.unlink()

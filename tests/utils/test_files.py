"""Files that are always whole: what goes wrong while one is written leaves the old one."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
from helpers import refusal

from utils.files import sha256, write_atomically, write_text


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")

    def fail(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise error

    if isinstance(error, OSError):
        assert "file: cannot be written" in refusal(write_atomically, path, fail)
    else:
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, fail)
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "x: cannot be written" in refusal(write_text, tmp_path / "file" / "folder" / "x", "text")


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_text(path, "old")
    seen: list[str] = []

    def write(temporary: Path) -> None:
        temporary.write_text("new ünï", encoding="utf-8")
        seen.append(path.read_text(encoding="utf-8"))

    write_atomically(path, write)
    assert seen == ["old"] and path.read_text(encoding="utf-8") == "new ünï" and os.listdir(path.parent) == ["file"]


def test_sha256_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()

"""What a file of somebody else may do: files that are made to exhaust memory are refused before they are read."""

import json
import zipfile
from pathlib import Path
from typing import Any

MAX_JSON = 4 << 20  # bytes; a parsed file can take thirty times as much memory


def shown(name: str) -> str:
    """Return a name as a message may print it: characters that move a terminal's cursor are spelled out."""
    return name if name.isprintable() else repr(name)


def read_json(path: Path) -> Any:
    """Return the content of a json file.

    Raises OSError if the file cannot be read, and ValueError if it is no JSON, too large or nested too deeply.
    """
    with path.open("rb") as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise ValueError(f"larger than {MAX_JSON >> 20} MiB")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def refuse_inflating(path: Path) -> None:
    """Raise ValueError if a zip archive, as torch and numpy write them, claims to hold more bytes than it has.

    torch and numpy do not compress, so such a file can only be meant to fill the memory of its reader.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        claimed = sum(member.file_size for member in archive.infolist())
    if claimed > path.stat().st_size:
        raise ValueError(f"its members claim {claimed:,} bytes, more than the file has")

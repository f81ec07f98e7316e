"""Download the course's data files and verify them."""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from utils.console import bar_style
from utils.errors import UserError

COURSE_URL = (
    "https://raw.githubusercontent.com/amahankali10/CS224N-Spring2024-DFP-Student-Handout/"
    "3f64c60c8a0e40a9fe581235b08f4607ff187077/data"
)
COURSE_FILES = {  # file -> git blob id, the course's files of 2024
    "ids-cfimdb-dev.csv": "8a0f5dcf3d40189b96c801a12cd79bf8003e61de",
    "ids-cfimdb-test-student.csv": "1e789c709b3ca0511f027a309b6d8bd21cde41b2",
    "ids-cfimdb-train.csv": "cd57bcbd2f7214ea6dd1783d3e885d324b1f478d",
    "ids-sst-dev.csv": "3171aa629a340809d2db4a50df8f6e5ec9420ab0",
    "ids-sst-test-student.csv": "bbd2313758825f86e24416d6aad64cd93370cf7a",
    "ids-sst-train.csv": "9cb7333cb1dae49c2bd2a4b56a24882a6e8704b5",
    "quora-dev.csv": "97f9430a53b7f5544f857ff27a236c40bb42b5c7",
    "quora-test-student.csv": "a1b1e5ba3ef282ba1e9b169c509eb80dbbc68666",
    "quora-train.csv": "1f2e73b884113e629e2786001fb9cc8ae4a696c1",
    "sts-dev.csv": "9392860e584717976b8d817cc40c9e6ceeec27e0",
    "sts-test-student.csv": "25f0cf8fafdd1f82b9e2bb460c708af34341ce60",
    "sts-train.csv": "12b17760e7795fee35aeeabc290d5651de02622a",
}
TIMEOUT = 30.0  # seconds


def git_blob_id(content: bytes) -> str:
    """Return the id that git gives a file with this content: 40 hexadecimal digits."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _download(url: str, name: str) -> bytes:
    """Return the bytes behind a URL, with a progress bar. Raises UserError if they cannot be fetched."""
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            style = bar_style()
            with tqdm(total=answer.length, desc=name, unit="B", unit_scale=True, leave=False, **style) as progress:
                while chunk := answer.read(1 << 16):
                    content += chunk
                    progress.update(len(chunk))
            if answer.length:  # bytes that are still missing
                raise http.client.IncompleteRead(bytes(content), answer.length)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{name}: cannot be fetched from {url} ({error}); check the network and run this again, "
            "or copy the file there by hand"
        ) from error
    return bytes(content)


def fetch(out: Path, url: str = COURSE_URL, files: Mapping[str, str] = COURSE_FILES) -> None:
    """Download `files` (name -> git blob id) from the folder `url` into `out`; files already there are verified.

    Each file is written under a temporary name and renamed, so a file with its final name is whole. Raises UserError
    for a failed download, a wrong checksum, another file of the same name, and a folder that cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, blob_id in files.items():
            path = out / name
            if path.exists():
                if git_blob_id(path.read_bytes()) != blob_id:
                    raise UserError(f"{path}: is not the course's file; move it away or give another --out")
                print(f"{path}: already there")
                continue
            content = _download(f"{url}/{name}", name)
            if (found := git_blob_id(content)) != blob_id:
                raise UserError(
                    f"{name}: wrong checksum: fetched {found}, expected {blob_id}; nothing was kept, run this again"
                )
            partial = path.with_name(name + ".part")
            partial.write_bytes(content)
            os.replace(partial, path)
            print(f"{path}: {len(content):,} bytes, verified")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error}); give a folder that can") from error

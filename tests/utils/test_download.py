"""Fetching the course's files from a local server."""

import functools
import http.server
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from processes import Child

from tasks import TASKS
from utils.download import COURSE_FILES, fetch, git_blob_id
from utils.errors import UserError

GOOD = {"a.csv": b"first\n" * 50_000, "b.csv": "zweite é\n".encode()}
IDS = {name: git_blob_id(content) for name, content in GOOD.items()}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL at which a local server offers it."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name, content in GOOD.items():
        (folder / name).write_bytes(content)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def copyfile(self, source: object, outputfile: object) -> None:
            if self.path.endswith("/short.csv"):  # hang up after the headers
                self.close_connection = True
            else:
                super().copyfile(source, outputfile)  # type: ignore[arg-type]

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fetch_and_keep(served: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # as git prints it
    folder, url = served
    out = tmp_path / "new" / "data"
    fetch(out, url, IDS)
    assert contents_of(out) == GOOD
    assert capsys.readouterr().out.count("verified") == 2
    for path in folder.iterdir():
        path.unlink()
    fetch(out, url, IDS)  # asks nothing of the server
    assert contents_of(out) == GOOD
    assert capsys.readouterr().out.count("already there") == 2


def test_a_failed_download_leaves_no_file(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    (folder / "short.csv").write_bytes(b"x" * 100)
    for name in ("none.csv", "short.csv"):
        with pytest.raises(UserError, match=f"^{name}: cannot be fetched from {url}/{name} .*check the network"):
            fetch(tmp_path / "data", url, {name: "0" * 40})
    assert contents_of(tmp_path / "data") == {}
    (folder / "b.csv").write_bytes(GOOD["b.csv"][:-1])
    with pytest.raises(UserError, match="^b.csv: wrong checksum"):
        fetch(tmp_path / "data", url, IDS)
    assert contents_of(tmp_path / "data") == {"a.csv": GOOD["a.csv"]}


def test_a_disk_that_gets_full_leaves_no_file(served: tuple[Path, str], tmp_path: Path) -> None:
    """Otherwise the next attempt would take it for a file of the user."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        fetch(tmp_path / "data", served[1], IDS)

    assert Child(work, tmp_path / "log").wait() == 1
    assert f"UserError: --out {tmp_path / 'data'}: cannot be written" in (tmp_path / "log").read_text()
    assert not (tmp_path / "data" / "a.csv").exists()
    fetch(tmp_path / "data", served[1], IDS)
    assert contents_of(tmp_path / "data") == GOOD


def test_a_file_in_the_way_is_left_alone(served: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"mine")
    with pytest.raises(UserError, match="a.csv: is not the course's file"):
        fetch(tmp_path, served[1], IDS)
    assert (tmp_path / "a.csv").read_bytes() == b"mine"
    with pytest.raises(UserError, match="^--out .*a.csv: cannot be written"):
        fetch(tmp_path / "a.csv", served[1], IDS)


def test_the_script_fetches_every_file_of_the_tasks(tmp_path: Path) -> None:
    """Without a network it says so in one line."""
    assert {name for task in TASKS.values() for name in task.files.values()} <= set(COURSE_FILES)
    environment = {**os.environ, "https_proxy": "http://127.0.0.1:9"}  # nobody listens on this port
    command = [sys.executable, str(ROOT / "datasets.py"), "--out", str(tmp_path / "data")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ids-cfimdb-dev.csv: cannot be fetched") and done.stderr.count("\n") == 1

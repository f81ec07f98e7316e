"""Runs whose terminal, output, disk or folder goes away, and what kills leave: one line, and nothing else is lost."""

import fcntl
import io
import os
import shutil
import signal
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import fill, refusal, small_disk
from processes import Child, kill_myself

import multitask_classifier
from training import commands
from training.run_directory import RunDirectory
from training.trainer import Trainer
from utils.console import run_script


def script_of(words: list[str], prepare: Callable[[], object] = lambda: None) -> Callable[[], None]:
    """Return the work of a process that runs multitask_classifier.py after `prepare`."""
    return lambda: (prepare(), run_script(multitask_classifier.main, words))[1]


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[Trainer], object]) -> None:
    """Let every trainer `do` something before its step after so many batches."""
    original = Trainer.train_step

    def step(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.progress.batches == number:
            do(trainer)
        return original(trainer, *arguments)

    monkeypatch.setattr(Trainer, "train_step", step)


def left_files(folder: Path) -> list[str]:
    """Return the names of the temporary files in a folder."""
    return sorted(path.name for path in folder.rglob(".*.tmp"))


@pytest.fixture
def words(tiny_flags: list[str], tmp_path: Path) -> list[str]:
    """The command line of a run with TensorBoard, which has a point after each step."""
    return [*tiny_flags, "--log_every", "1", "--run_dir", str(tmp_path / "run")]


def error_in(log: Path) -> str:
    """Return the only line about an error in a log, which comes last."""
    text = log.read_text()
    (line,) = [line for line in text.splitlines() if "error" in line.lower()]
    assert "Traceback" not in text and text.splitlines()[-1] == line
    return line


def test_a_terminal_that_goes_away_stops_the_run_as_sigterm_does(words: list[str], tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and from then on nothing can be printed."""
    master, terminal = os.openpty()

    def take_terminal() -> None:
        os.close(master)
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for number in (1, 2):
            os.dup2(terminal, number)
        os.close(terminal)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")

    child = Child(script_of([*words, "--epochs", "100000"], take_terminal), tmp_path / "log")
    os.close(terminal)
    seen = b""
    while b"Epoch 2/" not in seen:
        seen += os.read(master, 4096)
    os.close(master)
    assert child.wait() == 128 + signal.SIGHUP
    assert [path.name for path in RunDirectory(tmp_path / "run").states()] == ["resume.pt", "resume-previous.pt"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_on_a_full_disk_ends_the_run_when_it_is_saved(words: list[str], tmp_path: Path, stream: str) -> None:
    log, prepare = tmp_path / "log", lambda: setattr(sys, stream, os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"))
    assert Child(script_of(words, prepare), log).wait() == 2
    assert error_in(log) == "error: [Errno 28] No space left on device"
    assert (tmp_path / "run" / "resume.pt").exists() or stream == "stdout"  # which fails before training
    if stream == "stderr":
        multitask_classifier.main([*words, "--resume"])
        assert (tmp_path / "run" / "scores.json").exists()


def test_a_full_disk_is_one_line_with_tensorboard(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer has a thread of its own."""
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        more = ("filler", "x" * 10_000)  # than fits into the last block of the file
        at_step(monkeypatch, 5, lambda trainer: (fill(disk), trainer.logger.writer.add_text(*more)))
        assert Child(script_of([*words, "--run_dir", str(disk / "run")]), tmp_path / "log").wait() == 2
        assert error_in(tmp_path / "log") == (
            f"error: {disk}/run: TensorBoard's events cannot be written (no space left on the disk; free some, or "
            "choose another folder)"
        )


@pytest.mark.parametrize("moment", ["step", "evaluate", "report"])
@pytest.mark.parametrize("tensorboard", ["--tensorboard", "--no_tensorboard"])
def test_a_folder_that_is_deleted_is_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensorboard: str, moment: str
) -> None:
    def delete() -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)

    if moment == "step":
        at_step(monkeypatch, 5, lambda _: delete())
    else:
        place, name = (Trainer, "evaluate") if moment == "evaluate" else (commands, "probabilities")
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *arguments: (delete(), original(*arguments))[1])
    assert Child(script_of([*words, tensorboard]), tmp_path / "log").wait() == 2
    deleted = "the folder was deleted while the run went on; start it again"
    assert error_in(tmp_path / "log") == f"error: --run_dir {tmp_path}/run: {deleted}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    ["config.json", "resume.pt", "best.pt", "copy.pt", "sst-dev-output.csv", "sts.csv", "scores.json"],
)
def test_the_next_start_removes_the_file_that_a_kill_cut_short(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    outs = ["--filepath", str(tmp_path / "copy.pt"), "--sts_dev_out", str(tmp_path / "sts.csv")]
    replace = os.replace

    def kill(source: Path, target: Path) -> None:
        if Path(target).name == name:
            kill_myself()
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    assert Child(script_of([*words, *outs]), tmp_path / "log").wait() == -signal.SIGKILL
    monkeypatch.undo()
    assert [left.rsplit(".", 2)[0] for left in left_files(tmp_path)] == [f".{name}"]
    (tmp_path / "run" / ".best.pt.mine.tmp").touch()
    more = ["--resume"] if RunDirectory(tmp_path / "run").states() else ["--overwrite"]
    multitask_classifier.main([*words, *outs, *more])
    assert left_files(tmp_path) == [".best.pt.mine.tmp"]


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_the_next_start_removes_the_states_of_a_finished_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    run = RunDirectory(tmp_path / "run")
    monkeypatch.setattr(RunDirectory, "drop_states", lambda _: kill_myself())
    assert Child(script_of(words), tmp_path / "log").wait() == -signal.SIGKILL
    monkeypatch.undo()
    assert run.states() and (run.path / "scores.json").exists()
    if more == ["--overwrite"]:
        multitask_classifier.main([*words, *more])
    else:
        assert "finished" in refusal(multitask_classifier.main, [*words, *more])
    assert not run.states() and run.best.exists()


def test_a_character_that_standard_output_does_not_have_is_spelled_out(
    words: list[str], small_data: Path, tmp_path: Path
) -> None:
    """As under PYTHONIOENCODING=iso-8859-1."""
    data = shutil.copytree(small_data, tmp_path / "data")
    with (data / "ids-sst-train.csv").open("a", encoding="utf-8") as file:
        file.write("\t99\tA film.\t\U0001f600\n")

    def latin() -> None:
        sys.stdout = io.TextIOWrapper((tmp_path / "out").open("wb"), encoding="iso-8859-1")

    words = [*words, "--data_dir", str(data), "--dry_run"]
    assert Child(script_of(words, latin), tmp_path / "log").wait() == 0
    (line,) = [line for line in (tmp_path / "out").read_text("iso-8859-1").splitlines() if "skipped row" in line]
    assert str(data / "ids-sst-train.csv") in line and "\\U0001f600" in line

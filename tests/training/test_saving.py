"""Files that stay whole: killed while saving, full disks, damage on the disk, and several processes at one time."""

import errno
import fcntl
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, fill, make_trainer, refusal, small_disk
from processes import Child, differences, flipped, in_a_tensor, wait_until

import ensemble
import multitask_classifier
from models.checkpoint import load, save
from training.resume import STATE, newest_state, write_state
from training.run_directory import RunDirectory
from training.trainer import Trainer
from utils.console import run_script
from utils.errors import UserError
from utils.files import lock, probe_folder, write_atomically

DAMAGED = ": not a readable checkpoint, damaged "


def state(number: int, size: int = 200_000) -> dict[str, Any]:
    """Return a state that says which one it is, in every one of its numbers."""
    weights = {"w": torch.full((size,), float(number))}
    return {"format": 1, **dict.fromkeys(STATE, number), "weights": weights, "base_sha256": ""}


def number_of(content: dict[str, Any]) -> int:
    """Return which state this is. It must be whole."""
    assert (content["weights"]["w"] == content["seconds"]).all()
    return int(content["seconds"])


def numbers(run: RunDirectory) -> list[int]:
    """Return which states are in a folder, the newest first."""
    return [number_of(load(path)) for path in run.states()]


@pytest.mark.parametrize("more", [["--resume"], []])
def test_a_run_killed_before_its_first_state_can_only_be_overwritten(
    tiny_flags: list[str], tmp_path: Path, more: list[str]
) -> None:
    """Neither line sends its reader to the other."""
    make_trainer(tiny_flags, tmp_path / "run")  # it has written its config.json, and nothing else
    message = refusal(make_trainer, tiny_flags, tmp_path / "run", *more)
    assert "no state" in message and "--overwrite" in message
    assert "leave --resume out" not in message and "--resume goes on" not in message


def kill_while_saving(folder: Path, seed: int) -> bool:
    """Kill a process that saves one state after the other, at a random moment; return whether it left half a file."""
    run, told = RunDirectory(folder), folder / "told"
    folder.mkdir()

    def work() -> None:
        run.prepare(False, False, 0)
        for number in range(1, 10_000):
            write_state(run, state(number))
            told.write_text(f"{number} ")

    child = Child(work, folder / "log")
    wait_until(lambda: told.exists() and told.read_text() > "", child)
    time.sleep(random.Random(seed).uniform(0, 0.05))
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    last = told.read_text()
    found = number_of(newest_state(run, pytest.fail))  # nothing that is not whole is ever found
    if last.endswith(" "):
        assert found in (int(last), int(last) + 1)
    left_half = any(name.endswith(".tmp") for name in os.listdir(folder))
    run.prepare(False, True, 0)
    assert set(os.listdir(folder)) <= {"told", "log", ".lock", "resume.pt", "resume-previous.pt"}
    return left_half


def test_killed_while_saving(tmp_path: Path) -> None:
    for seed in range(4):
        kill_while_saving(tmp_path / f"run{seed}", seed)


@pytest.mark.long
def test_killed_while_saving_at_50_moments(tmp_path: Path) -> None:
    left_half = sum(kill_while_saving(tmp_path / f"run{seed}", 100 + seed) for seed in range(50))
    assert left_half >= 10  # most moments are those of a write
    print(f"50 kills survived, {left_half} of them in the middle of a file")


@pytest.fixture
def two_states(tmp_path: Path) -> RunDirectory:
    """A folder with state 2 and, before it, state 1."""
    run = RunDirectory(tmp_path / "run")
    for number in (1, 2):
        write_state(run, state(number))
    return run


def test_the_state_before_is_kept(two_states: RunDirectory) -> None:
    write_state(two_states, state(3))
    assert numbers(two_states) == [3, 2]
    two_states.resume.unlink()  # as a kill between the two renames leaves it
    assert number_of(newest_state(two_states, pytest.fail)) == 2
    write_state(two_states, state(4))
    assert numbers(two_states) == [4, 2]


def saving_fails(run: RunDirectory, work: Callable[[], object], log: Path) -> str:
    """Return the one line that a process ends in whose `work` cannot save; both states stand, and nothing else does."""
    before = {path.name: path.read_bytes() for path in run.states()}
    assert Child(lambda: run_script(lambda argv: work(), []), log).wait() == 2
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.name != "filler"} == before
    (line,) = log.read_text().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_state_that_cannot_be_written_leaves_both(two_states: RunDirectory, tmp_path: Path) -> None:
    """The file grows beyond the system's limit in the middle of the writing; the content cannot be serialised."""

    def grow() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        write_state(two_states, state(3))

    assert "resume.pt: cannot be written" in saving_fails(two_states, grow, tmp_path / "log")
    odd = state(3) | {"meters": {"sst": lambda: 0}}
    line = saving_fails(two_states, lambda: write_state(two_states, odd), tmp_path / "other")
    assert "resume.pt: cannot be written (" in line and "pickle" in line


def test_texts_are_utf8_wherever_they_are_written(tmp_path: Path) -> None:
    """Also where the locale knows no letter but ASCII's."""
    code = "import pathlib, sys; from utils import files; files.write_text(pathlib.Path(sys.argv[1]), 'caf\\xe9')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "text")], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "text").read_bytes() == "café".encode()


def test_no_space_is_known_before_training(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    message = refusal(multitask_classifier.main, [*tiny_flags, "--run_dir", str(tmp_path / "run")])
    assert f"--run_dir {tmp_path}/run" in message and "no space" in message and "MB" in message
    assert os.listdir(tmp_path / "run") == [".lock"]


@pytest.mark.parametrize("moment", ["evaluate", "update_best", "save_state"])
def test_a_disk_that_fills_up_while_training_ends_in_one_line(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Something else takes the space: checkpoints, jsonl files and TensorBoard's events all meet it."""
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        original = getattr(Trainer, moment)

        def filling(*arguments: Any) -> Any:
            result = original(*arguments)
            fill(disk)
            return result

        monkeypatch.setattr(Trainer, moment, filling)
        message = refusal(multitask_classifier.main, [*tiny_flags, "--run_dir", str(disk / "run")])
        assert str(disk) in message and "no space" in message


def test_a_full_disk_leaves_every_file_as_it_was(finished_runs: Path, small_data: Path, tmp_path: Path) -> None:
    """States, checkpoints, lines of metrics, exported weights, scores, and the probe of a folder."""
    best = str(finished_runs / "sst" / "best.pt")
    with small_disk(tmp_path / "small", 1 << 16) as disk:  # less than the weights take
        message = refusal(multitask_classifier.main, ["--evaluate", best, "--export", str(disk / "out")])
        assert "model.safetensors: cannot be written (no space left on the disk" in message
        assert not list(disk.rglob("*.safetensors*"))
        fill(disk)
        words = ["--evaluate", best, "--data_dir", str(small_data), "--run_dir", str(disk / "scores")]
        message = refusal(multitask_classifier.main, words)
        assert f"--run_dir {disk}/scores: cannot be written" in message and "No space left" in message
        message = refusal(probe_folder, disk / "new", "--out")
        assert message.startswith(f"--out {disk}/new: cannot be written")
    with small_disk(tmp_path / "disk", 3 << 20) as disk:
        run = RunDirectory(disk)
        for number in (1, 2):
            write_state(run, state(number))
        fill(disk)
        line = saving_fails(run, lambda: write_state(run, state(3)), tmp_path / "log")
        assert "resume.pt: cannot be written (no space left on the disk" in line
        message = refusal(write_atomically, run.resume, lambda path: path.write_bytes(b"x" * 100_000))
        assert "resume.pt: cannot be written (no space left on the disk" in message
        message = refusal(run.append_json, "metrics.jsonl", {"epoch": 1, "filling": "x" * 10_000})
        assert "metrics.jsonl" in message and "no space" in message and numbers(run) == [2, 1]


@pytest.mark.parametrize("name", ["best.pt", "resume.pt"])
def test_damaged_files_are_found(trained: Trainer, tmp_path: Path, name: str) -> None:
    """With a bit flipped at 20 random offsets: an error, or, between the records, no change at all. Cut off: always."""
    whole = trained.checkpointer.run.path / name
    content, wanted = whole.read_bytes(), load(whole)
    path, generator, found = tmp_path / "bad.pt", random.Random(name), 0
    for _ in range(20):
        path.write_bytes(flipped(content, generator.randrange(len(content)), generator.randrange(8)))
        try:
            assert differences(load(path), wanted) == []
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            found += 1
        path.write_bytes(content[: generator.randrange(len(content))])
        assert f"bad.pt{DAMAGED}" in refusal(load, path)
    assert found >= 10
    print(f"{name}: {found} of 20 flipped bits found")


def test_the_bit_that_makes_a_folder_of_a_tensor_is_found(tmp_path: Path) -> None:
    """torch's reader takes such an entry of the archive's directory for empty, and leaves the tensor as memory was."""
    path = tmp_path / "x.pt"
    save(path, {"format": 1, "w": torch.ones(5)})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        at, entries = file.start_dir, file.infolist()
    for _ in entries:
        path.write_bytes(flipped(content, at + 38, 4))  # the external attributes
        assert "has changed since" in refusal(load, path)
        at += 46 + sum(int.from_bytes(content[at + where : at + where + 2], "little") for where in (28, 30, 32))


@pytest.mark.parametrize("how", ["--evaluate", "--init_from", "ensemble.py"])
def test_no_way_to_load_a_model_takes_a_flipped_bit(
    trained: Trainer, tiny_flags: list[str], small_data: Path, tmp_path: Path, how: str
) -> None:
    best, path = trained.checkpointer.run.best, tmp_path / "flipped.pt"
    path.write_bytes(flipped(best.read_bytes(), in_a_tensor(best), 5))
    words = ["--data_dir", str(small_data), "--run_dir", str(tmp_path / "run")]
    if how == "ensemble.py":
        message = refusal(ensemble.main, [str(best), str(path), *words])
    else:
        flags = tiny_flags if how == "--init_from" else []
        message = refusal(multitask_classifier.main, [*flags, how, str(path), *words])
    assert f"flipped.pt{DAMAGED}" in message and "has changed since" in message


def test_a_damaged_state_is_not_kept_in_place_of_a_whole_one(two_states: RunDirectory) -> None:
    content = two_states.resume.read_bytes()
    two_states.resume.write_bytes(flipped(content, in_a_tensor(two_states.resume), 3))
    write_state(two_states, state(9))
    assert numbers(two_states) == [9, 1]


def test_another_file_in_place_of_the_state(two_states: RunDirectory, trained: Trainer) -> None:
    """A best.pt is a checkpoint too, but without optimizers. If the other state is damaged, both are named."""
    two_states.resume.write_bytes(trained.checkpointer.run.best.read_bytes())
    lines: list[str] = []
    assert number_of(newest_state(two_states, lines.append)) == 1
    lacks = f"{two_states.resume}: is no state that this version can go on from, it lacks "
    assert lines[0].startswith(lacks) and numbers(two_states) == [1]
    two_states.previous.write_bytes(two_states.resume.read_bytes()[:-50])
    two_states.resume.write_bytes(trained.checkpointer.run.best.read_bytes())
    message = refusal(newest_state, two_states, pytest.fail)
    assert message.startswith(lacks) and f"resume-previous.pt{DAMAGED}" in message


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("process 123456789 on a machine of a name longer than any other that there is, " * 2)
    holder = Child(lambda: (lock(path, "x"), (tmp_path / "held").touch(), time.sleep(60)), tmp_path / "log")
    wait_until((tmp_path / "held").exists, holder)
    message = refusal(lock, path, "x")
    assert message.startswith(f"x: a run is going on here (process {holder.pid} on {platform.node()});")
    holder.send(signal.SIGKILL)
    holder.wait()
    lock(path, "x")
    lock(path, "x")  # what this process has, it has


def test_a_file_system_without_locks_refuses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some of a network."""

    def lockf(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    for _ in range(2):
        lock(tmp_path / ".lock", "x")


def test_readers_never_see_half_a_checkpoint(tmp_path: Path) -> None:
    path, stop = tmp_path / "best.pt", tmp_path / "stop"
    save(path, state(0))

    def read() -> None:
        count = newest = 0
        while not stop.exists():
            number = number_of(load(path))
            assert number >= newest
            count, newest = count + 1, number
            if count == 10:
                (tmp_path / f"{os.getpid()}.ten").touch()

    readers = [Child(read, tmp_path / "log") for _ in range(2)]
    number = 0
    while number < 79 or len(list(tmp_path.glob("*.ten"))) < len(readers):  # a busy machine lets them begin late
        assert all(reader.running() for reader in readers), (tmp_path / "log").read_text()
        number += 1
        save(path, state(number))
    stop.touch()
    assert [reader.wait() for reader in readers] == [0, 0], (tmp_path / "log").read_text()

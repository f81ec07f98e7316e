"""Files that stay whole: killed while saving, full disks, damage on the disk, and several processes at one time."""

import errno
import fcntl
import os
import platform
import random
import re
import resource
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
from helpers import ROOT, fill, make_trainer, small_disk
from processes import Child, differences, flipped, in_a_tensor, wait_until

import ensemble
import multitask_classifier
from models.checkpoint import load, save
from training.resume import STATE, newest_state, write_state
from training.run_directory import RunDirectory
from utils.console import run_script
from utils.errors import UserError
from utils.files import lock, probe_folder, write_atomically

# ------------------------------------------------------------------------------------------------------- while it saves


def state(number: int, size: int = 200_000) -> dict[str, Any]:
    """A state that says which one it is, in every one of its numbers."""
    return {"format": 1, **dict.fromkeys(STATE, number), "weights": {"w": torch.full((size,), float(number))}}


def number_of(content: dict[str, Any]) -> int:
    """Which state this is; it is whole."""
    assert (content["weights"]["w"] == content["seconds"]).all()
    return int(content["seconds"])


@pytest.mark.parametrize("more", [["--resume"], []])
def test_a_run_killed_before_its_first_state_can_only_be_overwritten(
    tiny_flags: list[str], tmp_path: Path, more: list[str]
) -> None:
    """Neither line sends its reader to the other."""
    make_trainer(tiny_flags, tmp_path / "run")  # it has written its config.json, and nothing else
    with pytest.raises(UserError) as error:
        make_trainer(tiny_flags, tmp_path / "run", *more)
    assert "no state" in str(error.value) and "--overwrite" in str(error.value)
    assert "leave --resume out" not in str(error.value) and "--resume goes on" not in str(error.value)


def kill_while_saving(folder: Path, seed: int) -> bool:
    """Kill a process that saves one state after the other, at a random moment; returns whether it left half a file."""
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


@pytest.mark.parametrize("seed", range(4))
def test_killed_while_saving(tmp_path: Path, seed: int) -> None:
    kill_while_saving(tmp_path / "run", seed)


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
    assert [number_of(load(path)) for path in two_states.states()] == [3, 2]
    two_states.resume.unlink()  # as a kill between the two renames leaves it
    assert number_of(newest_state(two_states, pytest.fail)) == 2
    write_state(two_states, state(4))
    assert [number_of(load(path)) for path in two_states.states()] == [4, 2]


def saving_fails(run: RunDirectory, work: Callable[[], object], log: Path) -> str:
    """The one line that a process ends in whose `work` cannot save; both states stand, and nothing else does."""
    before = {path.name: path.read_bytes() for path in run.states()}
    assert Child(lambda: run_script(lambda argv: work(), []), log).wait() == 2
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.name != "filler"} == before
    lines = log.read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a_file_that_grows_too_large(two_states: RunDirectory, tmp_path: Path) -> None:
    """The system's own limit on a file's size, which comes in the middle of the writing."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        write_state(two_states, state(3))

    assert "resume.pt: cannot be written" in saving_fails(two_states, work, tmp_path / "log")


def test_a_full_disk_leaves_both_states(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 3 << 20) as disk:
        run = RunDirectory(disk)
        for number in (1, 2):
            write_state(run, state(number))
        fill(disk)
        line = saving_fails(run, lambda: write_state(run, state(3)), tmp_path / "log")
        assert "resume.pt: cannot be written (no space left on the disk" in line


def test_a_folder_that_may_not_be_written(two_states: RunDirectory, tmp_path: Path) -> None:
    """By a process that is not root, whom permissions do not stop."""
    two_states.path.chmod(0o555)

    def work() -> None:
        os.chdir(two_states.path)  # so that only this folder's permissions matter
        if os.getuid() == 0:
            os.setuid(65534)
        write_state(RunDirectory(Path(".")), state(3))

    try:
        line = saving_fails(two_states, work, tmp_path / "log")
        assert "resume.pt: cannot be written (" in line and "Permission denied" in line
    finally:
        two_states.path.chmod(0o755)


def test_a_probe_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """On a full disk the file can be made, but nothing can be written into it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(UserError, match=f"^--out {tmp_path}/new: cannot be written .*File too large"):
            probe_folder(tmp_path / "new", "--out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "new") == []


def test_curves_that_cannot_be_closed(tiny_flags: list[str], tmp_path: Path) -> None:
    """After the last state was saved, the disk is full."""

    def work() -> None:
        trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1)
        trainer.config.run.tensorboard = True
        save_state = trainer.save_state

        def then_full() -> None:
            save_state()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))  # the options are larger, the log is not

        trainer.save_state = then_full  # type: ignore[method-assign]
        trainer.fit()

    log = tmp_path / "log"
    assert Child(lambda: run_script(lambda argv: work(), []), log).wait() == 2
    last = log.read_text().splitlines()[-1]
    assert re.match(rf"error: {tmp_path}/run: cannot be written \(.*File too large", last), log.read_text()


def test_what_cannot_be_serialised(two_states: RunDirectory, tmp_path: Path) -> None:
    odd = state(3) | {"meters": {"sst": lambda: 0}}
    line = saving_fails(two_states, lambda: write_state(two_states, odd), tmp_path / "log")
    assert "resume.pt: cannot be written (" in line and "pickle" in line


def test_an_error_without_words_is_told_by_its_name(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        raise MemoryError

    with pytest.raises(UserError, match=r"file: cannot be written \(MemoryError\)$"):
        write_atomically(tmp_path / "file", write)
    assert os.listdir(tmp_path) == []


def test_texts_are_utf8_wherever_they_are_written(tmp_path: Path) -> None:
    """Also where the locale knows no letter but ASCII's."""
    code = "import pathlib, sys; from utils.files import write_text; write_text(pathlib.Path(sys.argv[1]), 'caf\\xe9')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "text")], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "text").read_bytes() == "café".encode()


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """The folder of a run of one epoch, with its states; tests must not change it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    make_trainer(tiny_flags, run, "--epochs", 1, "--save_every", 5).fit()
    return run


def test_torch_itself_sees_no_flipped_bit(tmp_path: Path) -> None:
    """Why there is a check of our own. Where this fails, torch has one too, and ours can go."""
    path = tmp_path / "x.pt"
    save(path, {"format": 1, "w": torch.zeros(1000)})
    content = path.read_bytes()
    path.write_bytes(flipped(content, content.index(b"\0" * 4000) + 2000, 6))
    assert torch.load(path, weights_only=True)["w"].ne(0).sum() == 1
    with pytest.raises(UserError, match=r"x\.pt: not a readable checkpoint, damaged .*has changed since"):
        load(path)


@pytest.mark.parametrize("name", ["best.pt", "resume.pt"])
def test_flipped_bits_are_found(trained: Path, tmp_path: Path, name: str) -> None:
    """At 20 random offsets: an error that names the file, or, between the records, no change at all."""
    content, wanted = (trained / name).read_bytes(), load(trained / name)
    path, generator, found = tmp_path / "bad.pt", random.Random(name), 0
    for _ in range(20):
        path.write_bytes(flipped(content, generator.randrange(len(content)), generator.randrange(8)))
        try:
            assert differences(load(path), wanted) == []
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            found += 1
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
        with pytest.raises(UserError, match=r"x\.pt: not a readable checkpoint, damaged .*has changed since"):
            load(path)
        at += 46 + sum(int.from_bytes(content[at + where : at + where + 2], "little") for where in (28, 30, 32))


def test_a_damaged_state_is_not_kept_in_place_of_a_whole_one(two_states: RunDirectory) -> None:
    before = number_of(load(two_states.previous))
    content = two_states.resume.read_bytes()
    two_states.resume.write_bytes(flipped(content, in_a_tensor(two_states.resume), 3))
    write_state(two_states, state(9))
    assert [number_of(load(path)) for path in two_states.states()] == [9, before]


@pytest.mark.parametrize("name", ["best.pt", "resume.pt"])
def test_truncated_files_are_found(trained: Path, tmp_path: Path, name: str) -> None:
    content, path = (trained / name).read_bytes(), tmp_path / "bad.pt"
    for offset in random.Random(name).sample(range(len(content)), 20):
        path.write_bytes(content[:offset])
        with pytest.raises(UserError, match=r"bad\.pt: not a readable checkpoint, damaged") as error:
            load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["--evaluate", "--init_from", "ensemble.py"])
def test_no_way_to_load_a_model_takes_a_flipped_bit(
    trained: Path, tiny_flags: list[str], small_data: Path, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "flipped.pt"
    path.write_bytes(flipped((trained / "best.pt").read_bytes(), in_a_tensor(trained / "best.pt"), 5))
    data = str(small_data)
    with pytest.raises(UserError, match=r"flipped\.pt: not a readable checkpoint, damaged .*has changed since"):
        if how == "ensemble.py":
            ensemble.main([str(trained / "best.pt"), str(path), "--data_dir", data, "--run_dir", str(tmp_path / "e")])
        elif how == "--evaluate":
            multitask_classifier.main(["--evaluate", str(path), "--data_dir", data])
        else:
            multitask_classifier.main([*tiny_flags, "--init_from", str(path), "--run_dir", str(tmp_path / "run")])


def test_another_file_in_place_of_the_state(two_states: RunDirectory, trained: Path) -> None:
    """A best.pt is a checkpoint too, but without optimizers."""
    two_states.resume.write_bytes((trained / "best.pt").read_bytes())
    lines: list[str] = []
    assert number_of(newest_state(two_states, lines.append)) == 1
    assert lines[0].startswith(f"{two_states.resume}: is no state that this version can go on from, it lacks ")
    assert [number_of(load(path)) for path in two_states.states()] == [1]


def test_two_damaged_states_are_both_named(two_states: RunDirectory) -> None:
    for path in two_states.states():
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"/resume\.pt: .*damaged.*; .*/resume-previous\.pt: .*damaged"):
        newest_state(two_states, pytest.fail)


# -------------------------------------------------------------------------------------------------- several at one time


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("process 123456789 on a machine of a name longer than any other that there is, " * 2)
    holder = Child(lambda: (lock(path, "x"), (tmp_path / "held").touch(), time.sleep(60)), tmp_path / "log")
    wait_until((tmp_path / "held").exists, holder)
    with pytest.raises(UserError, match=rf"x: a run is going on here \(process {holder.pid} on {platform.node()}\);"):
        lock(path, "x")
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

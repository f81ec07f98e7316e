"""Studies that several machines share through an Optuna storage: a trial runs once, and every table has all rows."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_sweep import by_trial, handlers, read_table, run, start  # noqa: F401

import sweep
from studies import shared_study
from studies.shared_study import SharedStudy
from utils.errors import UserError


@pytest.fixture(scope="module")
def flags(tiny_flags: list[str]) -> list[str]:
    """A trial of a second on one of the tasks."""
    return [*tiny_flags, "--train_sst", "--no_tensorboard", "--fine_tune_mode", "last-layer"]


def claim_all(storage: str, names: list[str], number: int) -> None:
    """A machine of its own that runs what it can get."""
    study = SharedStudy(storage, "study")
    for name in names:
        if study.take(name):
            assert study.finish({"trial": name, "machine": number})


@pytest.mark.parametrize("storage", ["{}/journal", "sqlite:///{}/study.db"])
def test_machines_never_claim_the_same_trial(storage: str, tmp_path: Path) -> None:
    place, names = storage.format(tmp_path), [f"seed={i}" for i in range(20)]
    SharedStudy(place, "study")  # so that no time goes into making the database
    context = multiprocessing.get_context("fork")
    machines = [context.Process(target=claim_all, args=(place, names, number)) for number in range(3)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join(60)
    assert [machine.exitcode for machine in machines] == [0] * 3
    rows = SharedStudy(place, "study").rows()
    assert sorted(row["trial"] for row in rows) == sorted(names)
    assert SharedStudy(place, "another").rows() == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that die within half a second."""
    for name, seconds in {"BEAT": 0.05, "GRACE": 0.5, "LOOK": 0.05}.items():
        monkeypatch.setattr(shared_study, name, seconds)


def wait_until(condition: Callable[[], Any], *alive: SharedStudy) -> None:
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        for study in alive:
            study.keep()
        time.sleep(0.02)


def test_a_machine_that_died_frees_its_trial(tmp_path: Path, quick: None) -> None:
    def die() -> None:
        assert SharedStudy(str(tmp_path / "journal"), "study").take("a")
        os.kill(os.getpid(), signal.SIGKILL)

    dying = multiprocessing.get_context("fork").Process(target=die)
    dying.start()
    dying.join(20)
    assert dying.exitcode == -signal.SIGKILL
    study = SharedStudy(str(tmp_path / "journal"), "study")
    assert not study.take("a")
    wait_until(lambda: study.take("a"), study)
    assert study.finish({"trial": "a", "score": 0.5}) and not study.take("a")


def test_a_machine_that_lives_keeps_its_trial(tmp_path: Path, quick: None) -> None:
    one, two = (SharedStudy(str(tmp_path / "journal"), "study") for _ in range(2))
    assert one.take("a") and one.take("a") and not two.take("a")
    ends = time.monotonic() + 1.5
    wait_until(lambda: two.take("a") or time.monotonic() > ends, one, two)
    assert not two.take("a") and one.finish({"trial": "a"})
    assert two.take("b")
    two.release()  # as when it is stopped from the keyboard: nobody needs to wait
    one.look()
    assert one.take("b")


def test_a_machine_that_was_taken_to_be_dead_adds_no_row(tmp_path: Path, quick: None) -> None:
    one, two = (SharedStudy(str(tmp_path / "journal"), "study") for _ in range(2))
    assert one.take("a")
    wait_until(lambda: two.take("a"), two)
    assert not one.finish({"trial": "a", "machine": 1}) and two.finish({"trial": "a", "machine": 2})
    one.look()
    assert [row["machine"] for row in one.rows()] == [2]


def test_a_table_gets_the_rows_of_other_machines(tmp_path: Path, flags: list[str]) -> None:
    storage = ["--storage", str(tmp_path / "disk" / "journal")]
    run(tmp_path / "one" / "ranks", [*flags, "--epochs", "1"], "seed=1")  # before the study was shared
    for machine in ("one", "two"):
        run(tmp_path / machine / "ranks", [*flags, "--epochs", "1", *storage], "seed=1")
    assert read_table(tmp_path / "two" / "ranks") == read_table(tmp_path / "one" / "ranks")
    assert not (tmp_path / "two" / "ranks" / "trials").exists()
    with pytest.raises(UserError, match="there seed=1 is the run of .* and not of .*--epochs 2"):
        run(tmp_path / "three" / "ranks", [*flags, "--epochs", "2", *storage], "seed=1")


@pytest.mark.parametrize("storage", ["{}/journal", "sqlite:///{}/study.db"])
def test_rows_of_a_table_are_shared_as_numbers(storage: str, tmp_path: Path) -> None:
    """A table that is older than the storage gives texts, and no score of a trial that failed."""
    from optuna.trial import TrialState

    study = SharedStudy(storage.format(tmp_path), "study")
    for name, score in (("a", "0.66"), ("b", "")):
        assert study.take(name) and study.finish({"trial": name, "score": score})
    records = study.storage.get_all_trials(study.study)
    assert [(own.state, own.values) for own in records] == [(TrialState.COMPLETE, [0.66]), (TrialState.FAIL, None)]


@pytest.mark.parametrize("storage", ["text", "text/journal", "nosuch://host/study", "sqlite:////nosuch/study.db"])
def test_a_storage_that_cannot_be_used_is_one_line(storage: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("no journal\nat all\n")
    with pytest.raises(UserError, match=f"--storage {storage}: cannot be used [^\n]*; name a file") as error:
        sweep.main(["--out", "study", "--storage", storage, "--grid", "seed=1"])
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_two_machines_share_a_study(tmp_path: Path, flags: list[str]) -> None:
    words = ["--storage", str(tmp_path / "journal"), *flags, "--epochs", "1", "--grid", "seed=1,2,3,4"]
    folders = [tmp_path / machine / "seeds" for machine in ("one", "two")]
    for own, (out, err) in [
        (own, own.communicate(timeout=900)) for own in [start(["--out", str(folder), *words]) for folder in folders]
    ]:
        assert own.returncode == 0, out + err
    trained = [[path.parent.name for path in folder.glob("trials/*/scores.json")] for folder in folders]
    assert trained[0] and trained[1] and sorted(trained[0] + trained[1]) == [f"seed={i}" for i in range(1, 5)]
    rows = [by_trial(folder) for folder in folders]
    assert rows[0] == rows[1] and {row["status"] for row in rows[0].values()} == {"ok"} and len(rows[0]) == 4

"""One study in an Optuna storage, seen by several sweeps: each trial has one of them, until that one dies."""

import multiprocessing
import platform
import time
from datetime import timedelta
from pathlib import Path

import pytest
from optuna.trial import TrialState

from studies import shared_study
from studies.shared_study import SharedStudy, lock_log

NAMES = [f"seed={i}" for i in range(12)]
TRIALS = {name: {"seed": name[5:]} for name in NAMES}


def open_study(folder: Path, place: str = "{}/journal") -> SharedStudy:
    return SharedStudy(place.format(folder), "study", {}, folder / "trials")


def run_all(folder: Path, place: str, number: int) -> None:
    """Run whatever can be had, as one of several machines."""
    study = open_study(folder, place)
    while taken := study.take({name: TRIALS[name] for name in NAMES if name not in study.rows()}, 0):
        trial, log = taken
        time.sleep(0.02)
        assert study.finish(trial, {"trial": trial.user_attrs["trial"], "status": "ok", "score": 0.5, "by": number})
        log.close()


@pytest.mark.parametrize("place", ["{}/journal", "sqlite:///{}/study.db"])
def test_sweeps_never_run_the_same_trial(place: str, tmp_path: Path) -> None:
    open_study(tmp_path, place)  # so that no time goes into making the database
    context = multiprocessing.get_context("fork")
    sweeps = [context.Process(target=run_all, args=(tmp_path, place, number)) for number in range(3)]
    for sweep in sweeps:
        sweep.start()
    for sweep in sweeps:
        sweep.join(120)
    assert [sweep.exitcode for sweep in sweeps] == [0] * 3
    study = open_study(tmp_path, place)
    ended = [record for record in study.records() if "row" in record.user_attrs]
    assert sorted(record.user_attrs["trial"] for record in ended) == sorted(NAMES)
    assert len({record.user_attrs["row"]["by"] for record in ended}) > 1
    assert {(record.state, record.value) for record in ended} == {(TrialState.COMPLETE, 0.5)}
    assert ended[0].user_attrs["flags"] == TRIALS[ended[0].user_attrs["trial"]]
    assert SharedStudy(place.format(tmp_path), "another", {}, tmp_path).rows() == {}


def test_a_trial_is_free_again_when_its_process_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, trials = open_study(tmp_path), open_study(tmp_path), {"a": {"seed": "1"}}
    taken = one.take(trials, 0)
    assert taken is not None
    two.free_dead()
    assert two.take(trials, 0) is None and two.hosts() == platform.node()
    taken[1].close()
    two.free_dead()
    again = two.take(trials, 0)
    assert again is not None and again[0].user_attrs["flags"] == {"seed": "1"}
    assert not one.finish(taken[0], {"trial": "a", "status": "ok", "by": 1})
    assert two.finish(again[0], {"trial": "a", "status": "ok", "by": 2}) and one.rows()["a"]["by"] == 2


def test_a_trial_of_a_process_that_nobody_knows_waits_for_its_end(tmp_path: Path) -> None:
    """As after a kill, where the storage was deleted while trials were running."""
    study = open_study(tmp_path)
    log = lock_log(tmp_path / "trials" / "a" / "log.txt")
    assert log is not None and study.take({"a": {}}, 0) is None
    study.free_dead()
    assert study.take({"a": {}}, 0) is None
    log.close()
    study.free_dead()
    assert study.take({"a": {}}, 0) is not None


def test_a_sweep_that_died_as_it_took_a_trial_frees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(tmp_path)
    study.study.enqueue_trial({}, user_attrs={"trial": "a", "flags": {}})
    study.study.ask()
    study.free_dead()
    assert study.take({"a": {}}, 0) is None  # it may be about to write down who it is
    monkeypatch.setattr(shared_study, "CLAIM", timedelta(0))
    study.free_dead()
    assert study.take({"a": {}}, 0) is not None


@pytest.mark.parametrize(
    ("status", "state"),
    [("refused", TrialState.PRUNED), ("out of memory", TrialState.PRUNED), ("failed", TrialState.FAIL)],
)
def test_a_search_learns_from_all_but_crashes(status: str, state: TrialState, tmp_path: Path) -> None:
    study = open_study(tmp_path)
    taken = study.take({"a": {}}, 0)
    assert taken is not None and study.finish(taken[0], {"trial": "a", "status": status})
    assert [record.state for record in study.records()] == [state]

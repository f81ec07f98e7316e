"""A study in an Optuna storage: which trials there are, who runs them, and the rows of those that have ended.

A sweep that has room for a trial adds it to Optuna's queue and takes the next one from the queue. Taking is atomic, so
that several sweeps, on several machines, may do this at once. A trial may have several records: one whose process has
died is marked as failed and has no row, and a new record with the same name and parameters replaces it.
"""

import fcntl
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO
from zlib import crc32

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from utils.errors import UserError
from utils.schema import STUDY_RECORD, check
from utils.untrusted import open_regular

Row = Mapping[str, Any]
# A search learns from all trials but those that crashed. Those that were refused or had too little memory are PRUNED,
# without a value, which ranks last.
STATES = {"ok": TrialState.COMPLETE, "failed": TrialState.FAIL}
CLAIM = timedelta(seconds=10)  # more than a sweep needs to write down where it runs the trial that it has taken


def open_storage(place: str) -> BaseStorage:
    """Return the database at a URL, or else a journal file, which is made if need be."""
    if "://" in place:
        return RDBStorage(place)
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    # Optuna's default lock, a symbolic link, never expires where another machine sees the file under another path.
    return JournalStorage(JournalFileBackend(place, JournalFileOpenLock(place)))


def lock_log(path: Path) -> TextIO | None:
    """Return the log of a trial, open and locked; None where another process has the lock.

    The trial's process inherits the lock, which shows that the trial is running even if its sweep was killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a", encoding="utf-8")
    with suppress(BlockingIOError):
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return log
    return None


def is_locked(log: Path) -> bool:
    """Return whether a process has the lock of a log. Another sweep names the file, so nothing is written there."""
    try:
        with open_regular(log) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        pass
    return False


def is_dead(record: FrozenTrial, dead_host: str) -> bool:
    """Return whether the process of a trial that should be running is gone, as far as this host can tell."""
    worker = record.user_attrs.get("worker")
    if worker is None:
        return record.datetime_start is None or datetime.now() - record.datetime_start > CLAIM
    if worker["host"] == platform.node():
        return not is_locked(Path(worker["log"]))
    return bool(worker["host"] == dead_host)


class SharedStudy:
    """The trials of one study that all sweeps see, those of a search over `ranges` or of a grid, and their `logs`."""

    def __init__(self, place: str, name: str, ranges: Mapping[str, BaseDistribution], logs: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        optuna.logging.disable_default_handler()  # ours leaves out the password of a URL
        optuna.logging.enable_propagation()
        storage = open_storage(place)
        self.study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        self.place, self.ranges, self.logs = place, dict(ranges), logs

    def records(self) -> list[FrozenTrial]:
        """Return all records of trials, the oldest first. Raises UserError if one is not what a sweep writes."""
        records = [record for record in self.study.get_trials(deepcopy=False) if "trial" in record.user_attrs]
        for record in records:
            try:
                check(record.user_attrs, STUDY_RECORD, "it")
            except ValueError as error:
                what = f"--storage {self.place}: trial {record.number} of {self.study.study_name}"
                raise UserError(f"{what} is not what a sweep writes ({error}); name another file or database") from None
        return records

    def standing(self) -> dict[str, FrozenTrial]:
        """Return the record that counts of each trial: the first that waits, runs or has a row."""
        found: dict[str, FrozenTrial] = {}
        for record in self.records():
            if "row" in record.user_attrs or not record.state.is_finished():
                found.setdefault(record.user_attrs["trial"], record)
        return found

    def rows(self) -> dict[str, Row]:
        """Return the rows of the trials that have ended, by name."""
        rows = {name: record.user_attrs.get("row") for name, record in self.standing().items()}
        return {name: row for name, row in rows.items() if row is not None}

    def hosts(self) -> str:
        """Return the names of the machines that run trials."""
        workers = [record.user_attrs.get("worker") for record in self.records() if record.state == TrialState.RUNNING]
        return ", ".join(sorted({worker["host"] for worker in workers if worker is not None}))

    def take(self, trials: Mapping[str, Mapping[str, str]], seed: int) -> tuple[optuna.Trial, TextIO] | None:
        """Return the next of `trials` (flags by name), now ours, and its locked log; None where others have them all.

        Two sweeps may add the same trial at the same moment; the first record counts, and the other one is dropped.
        A search samples the parameters here. Its random numbers depend on the seed and the trial alone.
        """
        while True:
            standing = self.standing()
            waiting = [name for name, record in standing.items() if record.state == TrialState.WAITING]
            name = next(iter([*waiting, *(name for name in trials if name not in standing)]), None)
            if name is None:
                return None
            if not waiting:
                flags = dict(trials[name])
                begun = (found.params for found in self.records() if found.user_attrs["trial"] == name and found.params)
                self.study.enqueue_trial(next(begun, flags), user_attrs={"trial": name, "flags": flags})
            self.study.sampler = optuna.samplers.TPESampler(seed=(seed + crc32(name.encode())) % 2**32)
            trial = self.study.ask(self.ranges)
            first = self.standing().get(trial.user_attrs.get("trial", ""))
            if first is None or first.number != trial.number or first.user_attrs["trial"] not in trials:
                self.close(trial.number)
                continue
            path = self.logs / first.user_attrs["trial"] / "log.txt"
            log = lock_log(path)
            with suppress(UpdateFinishedTrialError):  # another sweep took us for dead
                trial.set_user_attr("worker", {"host": platform.node(), "log": str(path.resolve())})
                if log is not None:  # else a process of an earlier sweep runs it, and it is free when that has ended
                    return trial, log

    def finish(self, trial: optuna.Trial, row: Row) -> bool:
        """Record the row of a trial that we run; return False where another sweep has taken the trial over."""
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr("row", row)
            self.close(trial.number, row)
            return True
        return False

    def close(self, number: int, row: Row | None = None) -> None:
        """End a record. Without a row its trial may be run again."""
        state = TrialState.FAIL if row is None else STATES.get(row["status"], TrialState.PRUNED)
        value = row.get("score", 0.0) if row is not None and state == TrialState.COMPLETE else None
        with suppress(UpdateFinishedTrialError):
            self.study.tell(number, value, state, skip_if_finished=True)

    def free_dead(self, dead_host: str = "") -> None:
        """End the records of trials that run no more, and of all that `dead_host` was running."""
        for record in self.records():
            if record.state == TrialState.RUNNING and is_dead(record, dead_host):
                self.close(record.number, record.user_attrs.get("row"))

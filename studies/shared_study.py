"""Several machines on one study: who runs which trial, agreed through an Optuna storage, and the rows of all.

A claim is a record of Optuna's, with our trial's name. The storage numbers records one after the other, so that all
machines agree on the first of a name: it has the trial, and the others withdraw. A claim that shows no sign of life
for GRACE seconds, by the clock of the one who looks, falls: its machine is taken to be dead, and the trial is free.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, first_line

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

BEAT = 10.0  # seconds between a claim's signs of life
GRACE = 60.0  # seconds without one after which it falls
LOOK = 2.0  # seconds between looks at what the others do
Row = Mapping[str, Any]


class OwnStudy:
    """A study of this machine alone: every trial is ours to run."""

    def take(self, name: str) -> bool:
        """Claim a trial; whether it is ours."""
        return True

    def keep(self) -> None:
        """Show that we live, and see who does not; to be called every few seconds."""

    def finish(self, row: Row) -> bool:
        """End our trial of that name; whether it was ours to the end, so that the row counts."""
        return True

    def rows(self) -> list[Row]:
        """The rows of all trials that have ended, on whatever machine."""
        return []

    def release(self) -> None:
        """Give back what we have not finished."""


class SharedStudy(OwnStudy):
    """A study in an Optuna storage: a journal file that all machines see, or the URL of a database."""

    def __init__(self, storage: str, name: str) -> None:
        """Raises UserError where the storage cannot be used."""
        try:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self.storage: BaseStorage = open_storage(storage)
            optuna.create_study(storage=self.storage, study_name=name, direction="maximize", load_if_exists=True)
        except Exception as error:  # of the file system, of the database's driver, or of a journal that is none
            raise UserError(
                f"--storage {storage}: cannot be used ({first_line(error)}); name a file that all "
                "machines see, or the URL of a database"
            ) from error
        self.study = self.storage.get_study_id_from_name(name)
        self.ours: dict[str, int] = {}  # name -> the record's id
        self.seen: dict[int, tuple[Any, float]] = {}  # number of another's record -> its last sign of life, and when
        self.looked = self.beaten = 0.0
        self.look()

    def look(self) -> None:
        """Read the records anew: for each trial the first one that stands."""
        self.looked = time.monotonic()
        self.standing: dict[str, FrozenTrial] = {}
        for record in self.storage.get_all_trials(self.study, deepcopy=False):
            about = record.user_attrs
            if "trial" in about and ("row" in about or not record.state.is_finished()):
                self.standing.setdefault(about["trial"], record)

    def take(self, name: str) -> bool:
        """Claim a trial; whether it is ours."""
        from optuna.trial import TrialState, create_trial

        if name not in self.ours and name not in self.standing:
            claim = create_trial(state=TrialState.RUNNING, user_attrs={"trial": name, "beat": 0})
            record = self.storage.create_new_trial(self.study, claim)
            self.look()
            if self.id_of(self.standing[name]) == record:
                self.ours[name] = record
            else:
                self.end(record)
        return name in self.ours

    def keep(self) -> None:
        """Show that we live, and end the claims of those who do not."""
        now = time.monotonic()
        if now - self.beaten >= BEAT:
            self.beaten = now
            for name, record in list(self.ours.items()):
                if not self.write(record, "beat", now):
                    del self.ours[name]  # another machine took us to be dead
        if now - self.looked >= LOOK:
            self.look()
            self.end_the_dead(now)

    def end_the_dead(self, now: float) -> None:
        """End the claims of others that show no sign of life."""
        for name, record in self.standing.items():
            if name in self.ours or "row" in record.user_attrs:
                continue
            sign = record.user_attrs["beat"]
            before, since = self.seen.setdefault(record.number, (sign, now))
            if sign != before:
                self.seen[record.number] = sign, now
            elif now - since > GRACE:
                self.end(self.id_of(record))

    def finish(self, row: Row) -> bool:
        """End our trial of that name; whether it was ours to the end, so that the row counts."""
        record = self.ours.pop(row["trial"], None)
        if record is None or not self.write(record, "row", dict(row)):
            return False
        score = row.get("score", "")  # as a table has it: a text, which is empty for a trial that failed
        self.end(record, None if score == "" else float(score))
        return True

    def rows(self) -> list[Row]:
        """The rows of all trials that have ended, on whatever machine."""
        return [record.user_attrs["row"] for record in self.standing.values() if "row" in record.user_attrs]

    def release(self) -> None:
        """Give back what we have not finished."""
        while self.ours:
            _, record = self.ours.popitem()
            self.end(record)

    def id_of(self, record: "FrozenTrial") -> int:
        """The id by which the storage knows a record."""
        return self.storage.get_trial_id_from_study_id_trial_number(self.study, record.number)

    def write(self, record: int, key: str, value: Any) -> bool:
        """Write into a record; whether it still stands."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            self.storage.set_trial_user_attr(record, key, value)
        except UpdateFinishedTrialError:
            return False
        return True

    def end(self, record: int, score: float | None = None) -> None:
        """Mark a record as complete, or without a score as failed, unless it has ended already."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        state, values = (TrialState.FAIL, None) if score is None else (TrialState.COMPLETE, [score])
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(record, state, values)


def open_storage(storage: str) -> "BaseStorage":
    """A database by its URL, or else a journal file, which is made if need be."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" in storage:
        return RDBStorage(storage)
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(storage))

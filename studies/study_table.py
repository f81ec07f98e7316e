"""A report's table as a study runs it: table.json in the study's folder, which report.py reads."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from utils.errors import UserError, first_line
from utils.files import write_json
from utils.schema import STUDY_TABLE, check
from utils.untrusted import read_json, shown

FILE = "table.json"


def label_of(name: str, split: str) -> str:
    """Return the name of a row, with the split where that is not dev and the name does not say so."""
    return name if split in ("dev", *name.split()) else f"{name}, {split}"


@dataclass(frozen=True)
class StudyRow:
    """A row: the figures that the report prints, and the trials that give ours, one for each seed.

    A row that cannot be run has no trials. `because` is why, or in what our system differs.
    """

    id: str
    name: str
    split: str
    reported: dict[str, float]
    because: str
    trials: Sequence[str]


@dataclass(frozen=True)
class StudyTable:
    """The table of a study, in the report's own order."""

    report: str
    id: str
    label: str
    title: str
    columns: Sequence[str]
    rows: Sequence[StudyRow]

    def save(self, folder: Path) -> None:
        """Write table.json, with the trials that earlier sweeps with other seeds have put there.

        Raises UserError if the folder holds another table.
        """
        earlier: dict[str, Sequence[str]] = {}
        if (folder / FILE).exists():
            before = read_study_table(folder)
            if (before.report, before.id) != (self.report, self.id):
                raise UserError(f"--out {folder}: holds {before.label} of {before.report}; choose another folder")
            earlier = {row.id: row.trials for row in before.rows}
        rows = [replace(row, trials=list(dict.fromkeys([*earlier.get(row.id, ()), *row.trials]))) for row in self.rows]
        write_json(folder / FILE, asdict(replace(self, rows=rows)))


def read_study_table(folder: Path) -> StudyTable:
    """Return the table of the study in a folder. Raises UserError if table.json is damaged."""
    path = folder / FILE
    try:
        content = check(read_json(path), STUDY_TABLE, "it")
        rows = [StudyRow(**{key: shown_if_text(value) for key, value in row.items()}) for row in content.pop("rows")]
        return StudyTable(**{key: shown_if_text(value) for key, value in content.items()}, rows=rows)
    except (OSError, ValueError, TypeError) as error:  # TypeError: a key that it cannot have
        cause = first_line(error)
        raise UserError(f"{path}: cannot be read ({cause}); delete it and start the sweep again") from error


def shown_if_text(value: Any) -> Any:
    """Return a value as a report may show it."""
    return shown(value) if isinstance(value, str) else value

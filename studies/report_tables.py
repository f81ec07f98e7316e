"""The tables of the reports, as recipes/rN/tables.toml lists them, and docs/reports.md, which this module prints."""

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from studies.study_table import label_of
from tasks import TASKS
from utils.console import run_script, say
from utils.errors import UserError, first_line

RECIPES = Path(__file__).parent.with_name("recipes")
VERDICTS = {  # verdict -> its words in docs/reports.md
    "reproduced": "reproduced by this command",
    "differs": "differs:",
    "impossible": "cannot be reproduced:",
}
FIGURES = (
    *(f"{name}_{metric}" for name, task in TASKS.items() for metric in task.metrics), "score", "score_raw_r",
    "seconds_per_epoch", "minutes", "minutes_without_evaluation", "peak_memory_gb", "gpu_utilization",
    "trainable_parameters",
    "score_gain_percent", "time_saved_percent", "memory_saved_percent",  # against the first row of the table
)  # fmt: skip
# What a report prints and results.csv does not have.
OTHER_FIGURES = (
    "trainable_percent", "true_label", "dora_label", "best_label",
    *(f"sts_{error}{kind}" for error in ("mse", "rmse", "mae", "r2") for kind in ("", "_std")),
    *(f"para_{truth}_{label}_rate" for truth in ("true", "false") for label in ("positive", "negative")),
)  # fmt: skip
TIMES = (  # as the reports print them: 1:41:34, 44:13, 10.18h, 6h 25m, 16m 5s
    re.compile(r"(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d\d)"),
    re.compile(r"(?=\d)(?:(?P<h>[\d.]+)h)? ?(?:(?P<m>[\d.]+)m)? ?(?:(?P<s>[\d.]+)s)?"),
)
Reported = int | Decimal | str  # a string is a time; a Decimal has the digits that the report prints


@dataclass(frozen=True)
class System:
    """What is trained: a recipe with more flags after its own, and the recipes that are trained before, in order."""

    recipe: str = ""
    flags: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Member(System):
    """A member of an ensemble, with its votes."""

    votes: int = 1


@dataclass(frozen=True)
class Row:
    """A row of a report's table: a system, or an ensemble of members, and the figures that the report prints.

    A row that cannot be run has neither. `reported` may lack columns that the report leaves empty.
    """

    id: str
    name: str
    reported: Mapping[str, Reported]
    verdict: str
    because: str = ""
    split: str = "dev"
    system: System | None = None
    members: tuple[Member, ...] = ()
    ensemble_flags: tuple[str, ...] = ()

    @property
    def systems(self) -> tuple[System, ...]:
        """What has to be trained for this row."""
        return self.members if self.system is None else (self.system,)


@dataclass(frozen=True)
class ReportTable:
    """A table of a report, or a figure that shows numbers, in the report's own order."""

    file: Path
    id: str
    label: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def report(self) -> str:
        """The name of the report, such as R1."""
        return self.file.parent.name.upper()

    @property
    def command(self) -> str:
        """The command that trains and shows the table."""
        out = f"runs/{self.file.parent.name}-{self.id if self.id.startswith('figure') else f'table-{self.id}'}"
        words = ["--tables", f"recipes/{self.file.parent.name}/{self.file.name}", "--table", self.id, "--out", out]
        return shlex.join(["python", "sweep.py", *words])

    def recipe(self, name: str) -> Path:
        """Return the file of a recipe that a row names."""
        return self.file.parent / f"{name}.args"


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of the file with its lists as tuples. Raises TypeError for a list that is none."""
    for key in ("flags", "stages", "members", "ensemble_flags"):
        if not isinstance(values.get(key, []), list):
            raise TypeError(f"{key} is no list")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def read_row(entry: Mapping[str, Any]) -> Row:
    """Return a row from its entry in the file. Raises TypeError for what a row cannot have."""
    values = with_tuples(entry)
    system = {key: values.pop(key) for key in ("recipe", "flags", "stages") if key in values}
    members = tuple(Member(**with_tuples(member)) for member in values.pop("members", ()))
    return Row(**values, members=members, system=System(**system) if system else None)


def problem_of(row: Row, table: ReportTable) -> str | None:
    """Return what is wrong with a row, or None."""
    recipes = [name for system in row.systems for name in (*system.stages, system.recipe)]
    missing = [name or "(none)" for name in recipes if not name or not table.recipe(name).is_file()]
    unknown = [name for name in row.reported if name not in table.columns]
    if [other.id for other in table.rows].count(row.id) > 1:
        return "another row has the same id; change one of them"
    if not re.fullmatch(r"[\w.+-]+", row.id):
        return "its id is no file name; write letters, digits and . + - _ only"
    if row.system is not None and row.members:
        return "it has a recipe, stages or flags beside members; leave one of the two out"
    if missing:
        return f"there is no recipe {table.recipe(missing[0])}; add it or name another"
    if any(member.votes < 1 for member in row.members):
        return "a member has less than one vote; leave the member out"
    if row.split not in ("dev", "test"):
        return f"its split is {row.split}; write dev or test"
    if row.verdict not in VERDICTS:
        return f"its verdict is {row.verdict}; choose from {', '.join(VERDICTS)}"
    if (row.verdict == "impossible") == bool(row.systems):
        return f"its verdict is {row.verdict}, and it has {'a' if row.systems else 'no'} recipe; change one of the two"
    if (row.verdict == "reproduced") == bool(row.because):
        return f"its verdict is {row.verdict}; because is for the other verdicts, which need it"
    if unknown:
        return f"it reports {unknown[0]}, which is no column of the table"
    try:
        list(map(number_of, row.reported.values()))
    except ValueError as error:
        return f"it reports something else than numbers ({error}); mend it"
    return None


def read_table(file: Path, values: Mapping[str, Any]) -> ReportTable:
    """Return a table from its entry in the file. Raises UserError that names file, table and row."""
    place = f"{file}: table {values.get('id', '(without id)')}"
    rows = []
    try:
        for entry in values["row"]:
            where = f"{place}, row {entry.get('id', '(without id)')}"
            rows.append(read_row(entry))
        where, columns = place, tuple(values["columns"])
        others = {key: value for key, value in values.items() if key not in ("row", "columns")}
        table = ReportTable(file, **others, columns=columns, rows=tuple(rows))
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{where}: cannot be read ({first_line(error)}); compare it with another one") from error
    known = (*FIGURES, *OTHER_FIGURES)
    if strange := [name for name in columns if name not in known]:
        raise UserError(f"{place}: has the column {strange[0]}; choose from {', '.join(known)}")
    for row in rows:
        if problem := problem_of(row, table):
            raise UserError(f"{place}, row {row.id}: {problem}")
    return table


def read_tables(file: Path) -> list[ReportTable]:
    """Return the tables of a report. Raises UserError that names the file, and where it can, the table and the row."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"), parse_float=Decimal)
        entries = content["table"]
        if list(content) != ["table"] or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("it has something else than tables")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: cannot be read as a list of tables ({first_line(error)}); mend it") from error
    tables = [read_table(file, entry) for entry in entries]
    ids = [table.id for table in tables]
    if twice := [name for name in ids if ids.count(name) > 1]:
        raise UserError(f"{file}: has two tables {twice[0]}; change one of the ids")
    return tables


def all_tables(recipes: Path = RECIPES) -> list[ReportTable]:
    """Return the tables of all reports."""
    return [table for file in sorted(recipes.glob("*/tables.toml")) for table in read_tables(file)]


def number_of(reported: Reported) -> float:
    """Return a reported figure as a number; a time in minutes. Raises ValueError for a string that is no time."""
    if not isinstance(reported, str):
        return float(reported)
    found = TIMES[0].fullmatch(reported) or TIMES[1].fullmatch(reported)
    if found is None:
        raise ValueError(f"{reported!r} is no time such as 1:41:34, 10.18h or 16m 5s")
    return 60 * float(found["h"] or 0) + float(found["m"] or 0) + float(found["s"] or 0) / 60


def list_tables(tables: Sequence[ReportTable]) -> Iterator[str]:
    """Yield two lines for each table: what it is, and the command that trains it."""
    for table in tables:
        runnable = sum(bool(row.systems) for row in table.rows)
        count = f"{len(table.rows)} row{'s' * (len(table.rows) != 1)}, {runnable} can be run"
        yield f"{table.report} {table.label}: {table.title} ({count})"
        yield f"    {table.command}"


def markdown(tables: Sequence[ReportTable]) -> str:
    """Return docs/reports.md: every row of every table with its verdict."""
    lines = [
        "# The reports' tables",
        "",
        "`python -m studies.report_tables > docs/reports.md` makes this page from the files recipes/rN/tables.toml.",
        "It has every result table of the reports and every figure that shows numbers, in the reports' order. Each row",
        "has one verdict. A row is reproduced if its command trains the system that the report describes; whether its",
        "figures come out the same is what `report.py` shows beside them.",
    ]
    report = ""
    for table in tables:
        if table.report != report:
            report = table.report
            lines += ["", f"## {report}"]
        lines += ["", f"### {table.label}: {table.title}", "", f"`{table.command}`", ""]
        header = ["row", *(name.replace("_", " ") for name in table.columns), "verdict"]
        lines += [f"| {' | '.join(header)} |", "|" + "-|" * len(header)]
        for row in table.rows:
            verdict = f"{VERDICTS[row.verdict]} {row.because}".strip()
            reported = [row.reported.get(name, "") for name in table.columns]
            figures = [value if isinstance(value, str) else f"{value:,}" for value in reported]
            cells = [label_of(row.name, row.split), *figures, verdict]
            lines.append(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(lambda argv: say(markdown(all_tables()).rstrip()))

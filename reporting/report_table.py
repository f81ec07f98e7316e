"""A report's table as a study ran it: the reported figures, ours and the differences, in the report's own order."""

from collections.abc import Mapping, Sequence

from reporting.figures import report_figure
from reporting.measures import mean_and_deviation
from reporting.page import ReportItem
from reporting.sources import Study
from reporting.tables import Column, Table, Value
from reporting.trials import source_of
from studies.study_table import StudyRow, StudyTable, label_of
from tasks import TASKS
from utils.console import format_table

COLUMNS = {  # figure -> column, of the figures that are neither a task's nor a score
    "seconds_per_epoch": Column("training time (s per epoch)", ",.1f"),
    "minutes": Column("training time (min)", ",.1f"),
    "minutes_without_evaluation": Column("training time without evaluation (min)", ",.1f"),
    "peak_memory_gb": Column("peak memory (GB)", ".2f"),
    "gpu_utilization": Column("GPU utilization (%)", ",.1f"),
    "trainable_parameters": Column("trainable parameters", ",.0f"),
    "score_gain_percent": Column("gain of score (%)", ".1f"),
    "time_saved_percent": Column("time saved (%)", ".1f"),
    "memory_saved_percent": Column("memory saved (%)", ".1f"),
}
AGAINST_FIRST = {  # a percentage against the table's first row -> the figure that is compared, and the sign
    "score_gain_percent": ("score", 100),
    "time_saved_percent": ("seconds_per_epoch", -100),
    "memory_saved_percent": ("peak_memory_gb", -100),
}
NOTE = "note"


Rows = Mapping[str, Mapping[str, str]]  # trial -> its row in results.csv


def figure_of(row: Mapping[str, str], name: str) -> float | None:
    """Return a figure of a trial from its row in results.csv, or None if it has none."""
    if name == "seconds_per_epoch":
        seconds = [float(value) for task in TASKS if (value := row.get(f"{task}_seconds_per_epoch"))]
        return sum(seconds) if seconds else None
    value = row.get("peak_memory_bytes" if name == "peak_memory_gb" else name)
    return float(value) / (1e9 if name == "peak_memory_gb" else 1) if value else None


def our_figures(row: StudyRow, name: str, trials: Rows, first: StudyRow) -> list[float]:
    """Return a figure of a row with each seed. There is none on test, whose labels are not public.

    `first` is the table's first row, which some figures compare with.
    """
    if name in AGAINST_FIRST:
        compared, sign = AGAINST_FIRST[name]
        reference, _ = mean_and_deviation(our_figures(first, compared, trials, first))
        values = our_figures(row, compared, trials, first)
        return [sign * (value / reference - 1) for value in values] if reference else []
    finished = [trials[trial] for trial in row.trials if trial in trials and trials[trial]["status"] == "ok"]
    figures = [figure_of(trial, name) for trial in finished if row.split == "dev"]
    return [figure for figure in figures if figure is not None]


def note_of(row: StudyRow, trials: Rows) -> str:
    """Return why a row differs, cannot be run, or lacks seeds."""
    notes = [row.because] if row.because else []
    missing = [trial for trial in row.trials if trial not in trials]
    if missing:
        notes.append(f"{len(missing)} of {len(row.trials)} trials have not run yet")
    causes = [trials[trial] for trial in row.trials if trial in trials and trials[trial]["status"] != "ok"]
    notes += dict.fromkeys(f"{trial['status']}: {trial['cause']}" for trial in causes)
    if row.split == "test" and row.trials:
        notes.append("the labels of test are not public")
    return "; ".join(notes)


def lines_of(row: StudyRow, ours: Mapping[str, Sequence[float]], note: str) -> list[list[Value]]:
    """Return a row as lines of a table: reported, ours, deviation and difference, without those that are empty.

    `ours` has the values of each column over the seeds.
    """
    columns = list(ours)
    means = {name: mean_and_deviation(values) for name, values in ours.items()}
    reported = [row.reported.get(name) for name in columns]
    averages = [means[name][0] for name in columns]
    differences = [
        None if average is None or printed is None else average - printed
        for average, printed in zip(averages, reported, strict=True)
    ]
    seeds = max(map(len, ours.values()))
    lines = {
        "reported": reported,
        f"ours ({seeds} seed{'s' * (seeds > 1)})": averages,
        "deviation": [means[name][1] for name in columns],
        "difference": differences,
    }
    kept = {kind: values for kind, values in lines.items() if kind == "reported" or any(v is not None for v in values)}
    notes = [note, *[""] * (len(kept) - 1)]
    label = label_of(row.name, row.split)
    return [[label, kind, *kept[kind], note] for kind, note in zip(kept, notes, strict=True)]


def column_of(name: str) -> Column:
    """Return the column of a figure."""
    return COLUMNS.get(name) or Column(name.replace("_", " "), ".3f")


def report_table_item(study: Study, table: StudyTable) -> ReportItem:
    """Return a report's table with its figures beside ours, and a figure of those that have both."""
    trials = {row["trial"]: row for row in study.rows}
    ours = [{name: our_figures(row, name, trials, table.rows[0]) for name in table.columns} for row in table.rows]
    both = list(zip(table.rows, ours, strict=True))
    columns = [Column("row"), Column(""), *map(column_of, table.columns), Column(NOTE)]
    whole = Table(columns, [line for row, values in both for line in lines_of(row, values, note_of(row, trials))])
    drawn = [(row, values) for row, values in both if any(values[name] for name in row.reported)]
    panels = {
        column_of(name).name: [(row.reported.get(name), values[name]) for row, values in drawn]
        for name in table.columns
        if any(name in row.reported and values[name] for row, values in drawn)
    }
    names = [row.name for row, _ in drawn]
    figure = report_figure(names, panels) if panels else None
    title = f"{table.report} {table.label}: {table.title}"
    text = "Ours is the mean over the seeds, with their sample standard deviation. Difference is ours less reported."
    return ReportItem(f"{study.name}-table", title, text, whole, figure, source_of(study.trials), printed(title, whole))


def printed(title: str, table: Table) -> str:
    """Return the table as plain text, with the notes below it."""
    header, *rows = table.cells()
    labels: dict[str, list[str]] = {}  # of the rows with a note
    for row in rows:
        if row[-1]:
            labels.setdefault(row[-1], []).append(row[0])
    notes = [f"{name}{f' and {len(others)} more' * bool(others)}: {note}" for note, (name, *others) in labels.items()]
    return "\n".join(["", title, format_table(header[:-1], [row[:-1] for row in rows]), *notes, ""])

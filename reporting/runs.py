"""What single runs show: learning curves, and their predictions of the dev sets beside the labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Config, DataOptions, TaskOptions
from datasets import BadRows, Examples, load_split
from evaluation.metrics import confusion, correlation, linear_fit
from evaluation.prediction_files import prediction_file
from reporting.figures import confusion_figure, curves_figure, residuals_figure, scatter_figure, scores_figure
from reporting.measures import RESAMPLES, errors_and_deviations, fitted, metric_of, rates
from reporting.page import Piece, Section
from reporting.sources import Run, trial_of_run
from reporting.tables import Column, Table, Value
from reporting.titles import titles_of
from reporting.trials import commits_of, shared_command, small_print
from tasks import TASKS, Task
from training.logger import class_names
from utils.errors import UserError, first_line

CURVES = 8  # runs in one figure, as many as there are colours


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


@dataclass(frozen=True)
class Outcome:
    """A run's predictions of a task's dev set: decided labels or similarities [N], and the true ones [N]."""

    task: Task
    decided: np.ndarray
    labels: np.ndarray


class DevSets:
    """The dev sets that runs were scored on, each file read once.

    `data` and `files` are what the command line says, None and empty where it says nothing: then a run's own options
    name the file. `problems` hears of files that cannot be read.
    """

    def __init__(self, data: DataOptions | None, files: Mapping[str, TaskOptions], problems: list[str]) -> None:
        self.data, self.files, self.problems = data, files, problems
        self.read: dict[tuple[str, str, str | None], Examples | None] = {}

    def of(self, config: Config | None, task: Task) -> Examples | None:
        """The dev examples of a task that a run with these options was scored on; None where they cannot be read."""
        own = None if config is None or self.data is not None else config.tasks.get(task.name)
        options = self.files.get(task.name) or own or TaskOptions()
        data = self.data or (DataOptions() if config is None else config.data)
        key = (task.name, data.data_dir, options.dev)
        if key not in self.read:
            self.read[key] = self.load(data, options, task)
        return self.read[key]

    def load(self, data: DataOptions, options: TaskOptions, task: Task) -> Examples | None:
        """Read a dev set; None, and a line in `problems`, where that fails."""
        try:
            rows = BadRows(data.max_bad_rows, lambda line: self.problems.append(f"skipped row {line}"))
            return load_split(data, options, task, "dev", rows)
        except UserError as error:
            self.problems.append(f"no figures of predictions of {task.title}, for want of labels: {error}")
            return None


def read_predictions(path: Path, task: Task) -> dict[str, float]:
    """The label for each id in a file that `evaluation.write_predictions` wrote. Raises UserError for a damaged one."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        pairs = [line.rsplit(" , ", 1) for line in lines]
        found = {example: float(label) for example, label in pairs}
        low, high = (-np.inf, np.inf) if task.kind == "similarity" else task.label_range
        wrong = [value for value in found.values() if not (low <= value <= high and np.isfinite(value))]
        if task.prediction_column not in header or wrong or not found or len(found) < len(lines):
            raise ValueError("not the predictions of this task" if found else "no predictions")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error):.80})") from error
    return found


def outcome_of(run: Run, task: Task, dev_sets: DevSets) -> Outcome | str | None:
    """A run's predictions of a task's dev set beside the labels, or why they cannot be had.

    None where the labels cannot be read, which `dev_sets` has said already.
    """
    path = prediction_file(run.path, task.name, "dev")
    if not path.exists():
        return f"{run.name}: no predictions of {task.title}, since {path.name} is missing"
    try:
        predicted = read_predictions(path, task)
    except UserError as error:
        return str(error)
    dev = dev_sets.of(run.config, task)
    if dev is None or dev.labels is None:
        return None
    if set(predicted) != set(dev.ids):
        return f"{run.name}: {dev.path} is not the dev file of {task.title} that it predicted; name it with --data_dir"
    values = np.array([predicted[example] for example in dev.ids])
    outcome = Outcome(task, values if task.kind == "similarity" else values.astype(np.int64), dev.labels)
    saved = (run.scores or {}).get(task.name, {}).get(task.metric)
    if saved is not None and abs(score_of(outcome) - saved) > 1e-3:
        return (
            f"{run.name}: on {dev.path} its {task.title} has {task.metric} {score_of(outcome):.3f} and not {saved:.3f} "
            "as scores.json says; name the dev file that it was scored on with --data_dir"
        )
    return outcome


def score_of(outcome: Outcome) -> float:
    """The task's own metric."""
    return metric_of(outcome.task)(outcome.decided, outcome.labels)


# ----------------------------------------------------------------------------------------------------------------------
# All runs


def runs_piece(runs: Sequence[Run]) -> Piece:
    """A row for each finished run."""
    columns = [Column("run"), Column("configuration"), Column("epochs"), Column("epoch kept")]
    columns += [Column("dev score", ".4f"), Column("with r itself", ".4f")]
    metrics = [(name, metric) for name, task in TASKS.items() for metric in task.metrics]
    columns += [Column(f"{name} {metric}", ".4f") for name, metric in metrics]
    columns += [Column("training time (s per epoch)", ",.1f"), Column("peak memory (GB)", ".3f")]
    columns += [Column("trainable parameters", ",d")]
    rows: list[list[Value]] = []
    trials = [trial_of_run(run) for run in runs]
    titles = iter(titles_of([trial.config for trial in trials if trial is not None]))
    for run, trial in zip(runs, trials, strict=True):
        scores = run.scores or {}
        rows.append(
            [run.name, None if trial is None else next(titles), len(run.metrics) or None, run.best_epoch]
            + [scores.get("score"), scores.get("score_raw_r")]
            + [scores.get(name, {}).get(metric) for name, metric in metrics]
            + ([None] * 2 if trial is None else [trial.seconds, trial.memory and trial.memory / 1e9])
            + [run.metrics[-1].get("trainable_parameters") if run.metrics else None]
        )
    return Piece("runs", "All runs", note_of(runs), Table(columns, rows).filled())


def note_of(runs: Sequence[Run]) -> str:
    """The small print of figures of these runs."""
    trials = [trial for run in runs if (trial := trial_of_run(run)) is not None]
    if trials:
        return small_print(trials)
    command = shared_command([run.command for run in runs if run.command])
    return "; ".join([commits_of(runs), command] if command else [commits_of(runs)])


def dev_scores(run: Run) -> dict[int, float]:
    """The dev score of each epoch that has one."""
    return {line["epoch"]: line["dev"]["score"] for line in run.metrics if "score" in line["dev"]}


def scores_piece(runs: Sequence[Run]) -> Piece | str:
    """Dev score over epochs, run by run."""
    curves = {run.name: points for run in runs if len(points := dev_scores(run)) > 1}
    if len(curves) < 2:
        return "no dev scores of runs beside each other, which needs two runs of two evaluated epochs"
    best = sorted(curves, key=lambda name: -max(curves[name].values()))[:CURVES]
    shown = {name: points for name, points in curves.items() if name in best}
    text = f"The {CURVES} best of {len(curves)} runs." if len(shown) < len(curves) else ""
    figure = scores_figure(shown, note_of([run for run in runs if run.name in shown]))
    rows: list[list[Value]] = [
        [name, epoch, score] for name, points in curves.items() for epoch, score in points.items()
    ]
    return Piece(
        "scores",
        "Dev score over epochs",
        text,
        Table([Column("run"), Column("epoch"), Column("dev score", ".4f")], rows),
        figure,
    )


def errors_piece(task: Task, outcomes: Mapping[str, Outcome]) -> Piece:
    """Errors of similarities with bootstrap deviations (R1, appendix H)."""
    columns = [Column("run"), Column("predictions"), Column("examples"), Column("pearson", ".4f")]
    for name in ("MSE", "RMSE", "MAE", "R2"):
        columns += [Column(name, ".3f"), Column(f"deviation of {name}", ".3f")]
    rows: list[list[Value]] = []
    for run, own in outcomes.items():
        for fit, kind in ((False, "as they are"), (True, "after the best line")):
            found = errors_and_deviations(own.decided, own.labels, fit)
            figures = [figure for pair in found.values() for figure in pair]
            rows.append([run, kind, len(own.labels), correlation(own.decided, own.labels), *figures])
    text = (
        f"Deviations are over {RESAMPLES:,} bootstrap samples of the dev set. A head trained with the Pearson loss has "
        "no scale: of its errors only those after the best line from predictions to labels mean something."
    )
    return Piece(f"{task.name}-errors", f"{task.title}: errors", text, Table(columns, rows))


def rates_piece(task: Task, outcomes: Mapping[str, Outcome]) -> Piece:
    """True and false positives and negatives of a binary task (R4, figure 9)."""
    found = {run: rates(task, own.decided, own.labels) for run, own in outcomes.items()}
    columns = [Column("run"), Column("examples"), *(Column(name, ".3f") for name in next(iter(found.values())))]
    rows: list[list[Value]] = [[run, len(outcomes[run].labels), *own.values()] for run, own in found.items()]
    text = f"Shares of the examples whose true label is {class_names(task)[1]} (true positive, false negative) or "
    return Piece(f"{task.name}-rates", f"{task.title}: rates", text + f"{class_names(task)[0]}.", Table(columns, rows))


# ----------------------------------------------------------------------------------------------------------------------
# One run


def curves_piece(run: Run) -> Piece | str:
    """Training and dev metric of each task, and training losses, over epochs (R3, appendix A)."""
    if len(run.metrics) < 2:
        return "no learning curves, which need two epochs"
    train: dict[str, dict[int, float]] = {}
    dev: dict[str, dict[int, float]] = {}
    losses: dict[str, dict[int, float]] = {}
    for name, task in TASKS.items():
        for curves, part, metric in (
            (losses, "train", "loss"),
            (train, "train", task.metric),
            (dev, "dev", task.metric),
        ):
            found = [(line["epoch"], line[part].get(name, {})) for line in run.metrics]
            points = {epoch: figures[metric] for epoch, figures in found if metric in figures}
            if points:
                curves[task.title] = points
    kinds = {task.metric: None for task in TASKS.values() if task.title in {**train, **dev}}
    axis = " or ".join({"accuracy": "accuracy", "pearson": "Pearson r"}[metric] for metric in kinds)
    rows: list[list[Value]] = [
        [name, epoch, losses[name][epoch], train.get(name, {}).get(epoch), dev.get(name, {}).get(epoch)]
        for name in losses
        for epoch in losses[name]
    ]
    columns = [
        Column("task"),
        Column("epoch"),
        Column("training loss", ".4f"),
        Column("training", ".4f"),
        Column("dev", ".4f"),
    ]
    figure = curves_figure(train, dev, losses, axis, run.best_epoch, note_of([run]))
    text = "Training figures are those of the passes that trained, with dropout."
    return Piece(f"{run.name}-curves", "Learning curves", text, Table(columns, rows).filled(), figure)


def confusion_piece(run: Run, outcome: Outcome) -> Piece:
    """The confusion matrix of a task of classes."""
    task, names = outcome.task, class_names(outcome.task)
    counts = confusion(task, outcome.decided, outcome.labels)
    columns = [Column("true"), *(Column(f"predicted {name}", "d") for name in names)]
    rows: list[list[Value]] = [[name, *map(int, row)] for name, row in zip(names, counts, strict=True)]
    figure = confusion_figure(counts, names, note_of([run]))
    text = f"Dev: accuracy {score_of(outcome):.3f} of {len(outcome.labels):,} examples. Shares are of each true label."
    return Piece(
        f"{run.name}-{task.name}-confusion", f"{task.title}: confusion matrix", text, Table(columns, rows), figure
    )


def scatter_piece(run: Run, outcome: Outcome) -> Piece:
    """Predicted over true similarities, with their best line (R4, figure 10)."""
    line = linear_fit(outcome.labels, outcome.decided)
    names = (truth_axis(outcome.task), "predicted similarity (own scale)")
    figure = scatter_figure(outcome.labels, outcome.decided, line, names, note_of([run]))
    text = f"Dev: Pearson r {score_of(outcome):.3f} of {len(outcome.labels):,} pairs."
    return Piece(f"{run.name}-{outcome.task.name}-scatter", f"{outcome.task.title}: predictions", text, figure=figure)


def truth_axis(task: Task) -> str:
    """What an axis of true similarities is called."""
    return f"true similarity ({task.label_range[0]:g} to {task.label_range[1]:g})"


def residuals_piece(run: Run, outcome: Outcome) -> Piece:
    """Residuals after the best line from predictions to labels, over true similarity (R1, figure 2)."""
    residuals = fitted(outcome.decided, outcome.labels) - outcome.labels
    figure = residuals_figure(outcome.labels, residuals, truth_axis(outcome.task), note_of([run]))
    far = float((np.abs(residuals) >= 3).mean())
    text = (
        f"Predictions are mapped to labels by least squares first. Standard deviation {residuals.std():.2f}; "
        f"{far:.1%} are off by 3 or more."
    )
    return Piece(f"{run.name}-{outcome.task.name}-residuals", f"{outcome.task.title}: residuals", text, figure=figure)


PIECES: dict[str, tuple[Callable[[Run, Outcome], Piece], ...]] = {
    "classes": (confusion_piece,),
    "binary": (confusion_piece,),
    "similarity": (scatter_piece, residuals_piece),
}


def run_sections(runs: Sequence[Run], dev_sets: DevSets) -> tuple[Section, list[Section]]:
    """What all runs show together, and a section for each."""
    together, sections = Section("Runs"), []
    outcomes: dict[str, dict[str, Outcome]] = {name: {} for name in TASKS}
    if any(run.scores for run in runs):
        together.add(runs_piece([run for run in runs if run.scores]))
    if len(runs) > 1:
        together.add(scores_piece(runs))
    for run in runs:
        section = Section(run.name)
        section.add(curves_piece(run))
        for name, task in TASKS.items():
            if not run.scores or name not in run.scores:
                continue
            outcome = outcome_of(run, task, dev_sets)
            if isinstance(outcome, str):
                section.left_out.append(outcome)
            elif outcome is not None:
                outcomes[name][run.name] = outcome
                section.pieces += [piece(run, outcome) for piece in PIECES[task.kind]]
        sections.append(section)
    for name, task in TASKS.items():
        if outcomes[name] and task.kind == "binary":
            together.add(rates_piece(task, outcomes[name]))
        elif outcomes[name] and task.kind == "similarity":
            together.add(errors_piece(task, outcomes[name]))
    return together, sections

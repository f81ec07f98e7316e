"""Tables and figures of run directories: scores, learning curves and dev predictions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from evaluation.metrics import confusion, correlation, linear_fit
from reporting.figures import Curves, confusion_figure, curves_figure, runs_figure, scatter_figure
from reporting.measures import RESAMPLES, binary_rates, errors_with_deviations, fit_to_labels
from reporting.page import ReportItem, Section
from reporting.predictions import DevSets, Predictions, load_predictions
from reporting.profiles import memory_item
from reporting.sources import Run, with_single_lora_options
from reporting.tables import Column, Table, Value
from reporting.titles import dev_set_marks, dev_sets_note, titles_of
from reporting.trials import COSTS, source_of_runs
from tasks import TASKS, Task
from training.logger import class_names
from utils.errors import UserError

MOST_CURVES = 8  # runs in one figure, one for each colour
METRIC_NAMES = {"accuracy": "accuracy", "pearson": "Pearson r"}


def with_labels(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each with a label that distinguishes it: the options in which several trained runs differ.

    The seed and the name follow where the options are the same, and the sizes of dev sets where they are not.
    """
    configs = {run.name: with_single_lora_options(run.config) for run in runs if run.config is not None}
    if len(configs) < 2:
        configs = {}
    labels = {run.name: run.name for run in runs} | dict(zip(configs, titles_of(list(configs.values())), strict=True))
    seeds = {name: f"seed {config.train.seed}" for name, config in configs.items()}
    for details in (seeds, {name: name for name in configs}):
        counts = Counter(labels.values())
        labels |= {name: f"{labels[name]}, {more}" for name, more in details.items() if counts[labels[name]] > 1}
    marks = dev_set_marks([run.dev_examples for run in runs])
    return [replace(run, label=labels[run.name] + mark) for run, mark in zip(runs, marks, strict=True)]


def runs_item(runs: Sequence[Run]) -> ReportItem:
    """Return a table with a row for each finished run."""
    metrics = [(name, metric) for name, task in TASKS.items() for metric in task.metrics]
    columns = [
        Column("run"),
        Column("configuration"),
        Column("epochs"),
        Column("best epoch"),
        Column("dev score", ".4f"),
        Column("score with raw r", ".4f"),
        *(Column(f"{name} {metric}", ".4f") for name, metric in metrics),
        *(Column(cost.name, cost.format) for cost in COSTS),
        Column("trainable parameters", ",d"),
    ]
    rows: list[list[Value]] = []
    for run in runs:
        scores, trial = run.scores or {}, run.trial
        label = None if run.title == run.name else run.title
        row: list[Value] = [run.name, label, len(run.metrics) or None, run.best_epoch]
        row += [scores.get("score"), scores.get("score_raw_r")]
        row += [scores.get(name, {}).get(metric) for name, metric in metrics]
        row += [None if trial is None else cost.read(trial) for cost in COSTS]
        row.append(run.metrics[-1].get("trainable_parameters") if run.metrics else None)
        rows.append(row)
    table = Table(columns, rows).without_empty_columns()
    note = dev_sets_note([run.dev_examples for run in runs])
    return ReportItem("runs", "All runs", note, table, source=source_of_runs(runs))


def scores_item(runs: Sequence[Run]) -> ReportItem | str:
    """Return the dev scores of all runs over epochs."""
    curves: dict[str, dict[int, float]] = {}
    for run in runs:
        scores = {line["epoch"]: line["dev"]["score"] for line in run.metrics if "score" in line["dev"]}
        if len(scores) > 1:
            curves[run.title] = scores
    if len(curves) < 2:
        return "no dev scores of several runs, which need two runs with two evaluated epochs"
    shown, text = best_curves(curves)
    rows: list[list[Value]] = [
        [name, epoch, score] for name, scores in curves.items() for epoch, score in scores.items()
    ]
    table = Table([Column("run"), Column("epoch"), Column("dev score", ".4f")], rows)
    source = source_of_runs([run for run in runs if run.title in shown])
    return ReportItem("scores", "Dev score over epochs", text, table, runs_figure({"dev score": shown}), source)


def best_curves(curves: Curves) -> tuple[Curves, str]:
    """Return the curves that rise highest, as many as a figure shows, and a sentence if there are more."""
    best = sorted(curves, key=lambda name: -max(curves[name].values()))[:MOST_CURVES]
    text = f"The {MOST_CURVES} best of {len(curves)} runs." if len(best) < len(curves) else ""
    return {name: points for name, points in curves.items() if name in best}, text


def task_curves_item(task: Task, runs: Sequence[Run]) -> ReportItem | str:
    """Return one task's dev metric and training loss over epochs, with a line for each run (R0, figures 4 to 19)."""
    axis = f"dev {METRIC_NAMES[task.metric]}"
    dev, losses = (
        {run.title: points for run in runs for points in metric_curves(run, part, {task.name: metric}).values()}
        for part, metric in (("dev", task.metric), ("train", "loss"))
    )
    dev, losses = ({name: points for name, points in curves.items() if len(points) > 1} for curves in (dev, losses))
    if len(dev) < 2:
        return f"no curves of several runs on {task.title}, which need two runs with two evaluated epochs"
    shown, text = best_curves(dev)
    panels = {axis: shown, "training loss": {name: points for name, points in losses.items() if name in shown}}
    figure = runs_figure({name: curves for name, curves in panels.items() if curves})
    source = source_of_runs([run for run in runs if run.title in shown])
    rows: list[list[Value]] = [
        [name, epoch, losses.get(name, {}).get(epoch), dev[name].get(epoch)]
        for name in dev
        for epoch in sorted({*dev[name], *losses.get(name, {})})
    ]
    columns = [Column("run"), Column("epoch"), Column("training loss", ".4f"), Column(axis, ".4f")]
    table = Table(columns, rows).without_empty_columns()
    return ReportItem(f"runs-{task.name}-curves", f"{task.title}: curves of all runs", text, table, figure, source)


def errors_item(task: Task, by_run: Mapping[str, Predictions]) -> ReportItem:
    """Return the errors of similarities with bootstrap deviations (R1, appendix H)."""
    columns = [Column("run"), Column("predictions"), Column("examples"), Column("pearson", ".4f")]
    for name in ("MSE", "RMSE", "MAE", "R2"):
        columns += [Column(name, ".3f"), Column(f"deviation of {name}", ".3f")]
    rows: list[list[Value]] = []
    for run, predictions in by_run.items():
        values, labels = predictions.predicted, predictions.labels
        for fit, kind in ((False, "as they are"), (True, "fitted to the labels")):
            errors = errors_with_deviations(values, labels, fit)
            figures = [figure for pair in errors.values() for figure in pair]
            rows.append([run, kind, len(labels), correlation(values, labels), *figures])
    text = (
        f"Deviations are over {RESAMPLES:,} bootstrap samples of the dev set. Fitted predictions are mapped to the "
        "labels by least squares first. After the Pearson loss, predictions have no scale, and only these errors are "
        "meaningful."
    )
    return ReportItem(f"{task.name}-errors", f"{task.title}: errors", text, Table(columns, rows))


def rates_item(task: Task, by_run: Mapping[str, Predictions]) -> ReportItem:
    """Return true and false positive and negative rates of a binary task (R4, figure 9)."""
    rates = {run: binary_rates(task, predictions.predicted, predictions.labels) for run, predictions in by_run.items()}
    columns = [Column("run"), Column("examples"), *(Column(name, ".3f") for name in next(iter(rates.values())))]
    rows: list[list[Value]] = [[run, len(by_run[run].labels), *values.values()] for run, values in rates.items()]
    negative, positive = class_names(task)
    text = (
        f"True positives and false negatives are shares of the examples with the true label {positive}, false "
        f"positives and true negatives of those with {negative}."
    )
    return ReportItem(f"{task.name}-rates", f"{task.title}: rates", text, Table(columns, rows))


def metric_curves(run: Run, part: str, metrics: Mapping[str, str]) -> dict[str, dict[int, float]]:
    """Return a metric of each task over epochs, by the task's title. `part` is train or dev."""
    curves = {}
    for name, metric in metrics.items():
        figures = {line["epoch"]: line[part].get(name, {}) for line in run.metrics}
        points = {epoch: values[metric] for epoch, values in figures.items() if metric in values}
        if points:
            curves[TASKS[name].title] = points
    return curves


def curves_item(run: Run) -> ReportItem | str:
    """Return training and dev metric of each task, and training losses, over epochs (R3, appendix A)."""
    if len(run.metrics) < 2:
        return "no learning curves, which need two epochs"
    metrics = {name: task.metric for name, task in TASKS.items()}
    train, dev = metric_curves(run, "train", metrics), metric_curves(run, "dev", metrics)
    losses = metric_curves(run, "train", dict.fromkeys(TASKS, "loss"))
    shown = dict.fromkeys(task.metric for task in TASKS.values() if task.title in {**train, **dev})
    axis = " or ".join(METRIC_NAMES[metric] for metric in shown)
    figure = curves_figure(train, dev, losses, axis, run.best_epoch)
    columns = [Column("task"), Column("epoch")]
    columns += [Column(name, ".4f") for name in ("training loss", "training", "dev")]
    rows: list[list[Value]] = [
        [task, epoch, loss, train.get(task, {}).get(epoch), dev.get(task, {}).get(epoch)]
        for task, points in losses.items()
        for epoch, loss in points.items()
    ]
    table = Table(columns, rows).without_empty_columns()
    text = "Training figures are measured while training, with dropout."
    return ReportItem(f"{run.name}-curves", "Learning curves", text, table, figure, source_of_runs([run]))


def confusion_item(run: Run, predictions: Predictions) -> ReportItem:
    """Return the confusion matrix of a task with classes."""
    task, names = predictions.task, class_names(predictions.task)
    counts = confusion(task, predictions.predicted, predictions.labels)
    columns = [Column("true"), *(Column(f"predicted {name}", "d") for name in names)]
    rows: list[list[Value]] = [[name, *map(int, row)] for name, row in zip(names, counts, strict=True)]
    text = f"Dev: accuracy {predictions.score:.3f} of {len(predictions.labels):,} examples. "
    text += "Percentages are of each true label."
    name, title = f"{run.name}-{task.name}-confusion", f"{task.title}: confusion matrix"
    figure = confusion_figure(counts, names)
    return ReportItem(name, title, text, Table(columns, rows), figure, source_of_runs([run]))


def scatter_item(run: Run, predictions: Predictions) -> ReportItem:
    """Return predicted over true similarities, with the line of least squares (R4, figure 10)."""
    task, labels, predicted = predictions.task, predictions.labels, predictions.predicted
    axes = (true_axis(task), "predicted similarity (own scale)")
    figure = scatter_figure(labels, predicted, axes, linear_fit(labels, predicted))
    text = f"Dev: Pearson r {predictions.score:.3f} of {len(labels):,} pairs."
    name, title = f"{run.name}-{task.name}-scatter", f"{task.title}: predictions"
    return ReportItem(name, title, text, figure=figure, source=source_of_runs([run]))


def true_axis(task: Task) -> str:
    """Return the name of an axis of true similarities."""
    return f"true similarity ({task.label_range[0]:g} to {task.label_range[1]:g})"


def residuals_item(run: Run, predictions: Predictions) -> ReportItem:
    """Return residuals of predictions fitted to the labels, over true similarity (R1, figure 2)."""
    task, labels = predictions.task, predictions.labels
    residuals = fit_to_labels(predictions.predicted, labels) - labels
    figure = scatter_figure(labels, residuals, (true_axis(task), "fitted prediction - true"))
    text = (
        f"Predictions are first mapped to labels by least squares. The standard deviation is {residuals.std():.2f}. "
        f"{float((np.abs(residuals) >= 3).mean()):.1%} of the predictions are off by 3 or more."
    )
    name, title = f"{run.name}-{task.name}-residuals", f"{task.title}: residuals"
    return ReportItem(name, title, text, figure=figure, source=source_of_runs([run]))


def run_section(run: Run, dev_sets: DevSets) -> tuple[Section, dict[str, Predictions]]:
    """Return the section of one run, and its predictions by task."""
    section = Section(run.name if run.title == run.name else f"{run.name}: {run.title}")
    section.add(curves_item(run))
    try:
        if (memory := memory_item(run)) is not None:
            section.add(memory)
    except UserError as error:
        section.left_out.append(str(error))
    by_task = {}
    for name, task in TASKS.items():
        if name not in (run.scores or {}):
            continue
        try:
            predictions = load_predictions(run, task, dev_sets)
        except UserError as error:
            section.left_out.append(str(error))
            continue
        if predictions is not None:
            by_task[name] = predictions
            makers = (scatter_item, residuals_item) if task.kind == "similarity" else (confusion_item,)
            section.items += [make_item(run, predictions) for make_item in makers]
    return section, by_task


def run_sections(runs: Sequence[Run], dev_sets: DevSets) -> tuple[Section, list[Section]]:
    """Return the section that compares all runs, and a section for each run."""
    summary, sections = Section("Runs"), []
    by_task: dict[str, dict[str, Predictions]] = {name: {} for name in TASKS}
    runs = with_labels(runs)
    for run in runs:
        section, predictions = run_section(run, dev_sets)
        sections.append(section)
        for name in predictions:
            by_task[name][run.title] = predictions[name]
    if finished := [run for run in runs if run.scores]:
        summary.add(runs_item(finished))
    if len(runs) > 1:
        summary.add(scores_item(runs))
        evaluated = {name for run in runs for line in run.metrics for name in line["dev"]}
        for task in (task for name, task in TASKS.items() if name in evaluated):
            summary.add(task_curves_item(task, runs))
    for name, by_run in by_task.items():
        if by_run and TASKS[name].kind == "binary":
            summary.add(rates_item(TASKS[name], by_run))
        elif by_run and TASKS[name].kind == "similarity":
            summary.add(errors_item(TASKS[name], by_run))
    return summary, sections

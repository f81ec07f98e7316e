"""Two checkpoints on the same dev sets: where they disagree, by how much, and whether one of them is better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli.commands import command_of, shared_command
from config import ComputeOptions, DataOptions, TaskOptions
from datasets import Examples, load_splits, tokenise
from evaluation.metrics import confusion, correlation, decide, linear_fit, probabilities
from evaluation.predict import predict
from models.checkpoint import load, load_model, trained_tasks
from reporting.figures import confusion_figure, scatter_figure
from reporting.measures import fit_to_labels, mcnemar, metric_of, paired_bootstrap
from reporting.page import Report, ReportItem, Section
from reporting.tables import Column, Table, Value
from tasks import TASKS, Task
from training.logger import class_names
from utils.console import say
from utils.device import Device, device_of
from utils.errors import UserError
from utils.untrusted import shown

SHOWN_EXAMPLES = 15  # in a table of the largest disagreements


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and its dev predictions by task: probabilities [N(, classes)] or similarities [N]."""

    commit: str
    command: str
    predictions: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PairedPredictions:
    """Two checkpoints' predicted labels [N] or similarities [N] of one task's dev set, beside the true ones [N].

    `on_label_scale` has the same predictions, with similarities mapped to the labels' scale, because models may use
    different ones. `disagreement` [N] orders the examples by how much the checkpoints disagree.
    """

    task: Task
    texts: Sequence[Sequence[str]]
    labels: np.ndarray
    a: np.ndarray
    b: np.ndarray
    on_label_scale: tuple[np.ndarray, np.ndarray]
    disagreement: np.ndarray


def shared_tasks(paths: Sequence[Path]) -> dict[str, Task]:
    """Return the tasks that both checkpoints were trained on. Raise UserError if there is none."""
    first, second = (set(trained_tasks(load(path, mmap=True), path)) for path in paths)
    for name, task in TASKS.items():
        if name in first ^ second:
            say(f"{task.title}: left out, because only one of the two was trained on it")
    tasks = {name: task for name, task in TASKS.items() if name in first & second}
    if not tasks:
        raise UserError(f"--compare {paths[0]} {paths[1]}: have no task in common; name checkpoints that share one")
    return tasks


def predict_dev(
    path: Path, dev: Mapping[str, Examples], device: Device, batch_size: int, pretrained: str | None
) -> Checkpoint:
    """Load a checkpoint and predict the dev sets of its tasks."""
    model, tokenizer, config = load_model(path, spare_base=pretrained)
    model.to(device.device)
    batches = tokenise({"dev": dev}, tokenizer, model.pair_encodings(), config.data.extra_clean, say)["dev"]
    predictions = {
        name: probabilities(TASKS[name], predict(model, data, device.device, batch_size, device.amp))
        for name, data in batches.items()
    }
    commit = load(path, mmap=True).get("git_commit") or ""
    return Checkpoint(shown(commit), shown(command_of(config)), predictions)


def pair_predictions(examples: Examples, a: np.ndarray, b: np.ndarray) -> PairedPredictions:
    """Pair two checkpoints' probabilities [N(, classes)] or similarities [N] of the same examples.

    Similarities disagree by their distance on the labels' scale. Labels disagree by the number of classes between
    them, and then by the total variation distance of the probabilities.
    """
    task, texts, labels = examples.task, examples.texts, examples.labels
    assert labels is not None  # dev sets have them
    if task.kind == "similarity":
        fitted = fit_to_labels(a, labels), fit_to_labels(b, labels)
        return PairedPredictions(task, texts, labels, a, b, fitted, np.abs(fitted[0] - fitted[1]))
    distance = np.abs(a - b).sum(axis=1) / 2 if task.kind == "classes" else np.abs(a - b)
    a, b = decide(task, a), decide(task, b)
    return PairedPredictions(task, texts, labels, a, b, (a, b), np.abs(a - b) * (1 + distance))


def scores_item(pairs: Sequence[PairedPredictions]) -> ReportItem:
    """Return each task's metric for both, the interval of their difference, and its test."""
    columns = [Column("task"), Column("examples"), Column("metric"), Column("A", ".4f"), Column("B", ".4f")]
    columns += [Column(name, "+.4f") for name in ("B - A", "95% from", "to")]
    columns += [Column("p", ".3g"), Column("test")]
    rows: list[list[Value]] = []
    for pair in pairs:
        metric = metric_of(pair.task)
        a, b = metric(pair.a, pair.labels), metric(pair.b, pair.labels)
        low, high, p = paired_bootstrap(metric, pair.a, pair.b, pair.labels)
        test = "paired bootstrap"
        if pair.task.kind != "similarity":
            p, test = mcnemar(pair.a == pair.labels, pair.b == pair.labels), "McNemar, exact"
        rows.append([pair.task.title, len(pair.labels), pair.task.metric, a, b, b - a, low, high, p, test])
    text = "Intervals are of a paired bootstrap over the dev examples. They do not cover other seeds."
    return ReportItem("comparison-scores", "Scores", text, Table(columns, rows))


def decisions_item(pairs: Sequence[PairedPredictions]) -> ReportItem:
    """Return how often predicted labels differ, and by how much."""
    columns = [Column("task"), Column("they differ", ".1%"), Column("of these off by one class", ".1%")]
    columns += [Column(name, ".1%") for name in ("both right", "only A right", "only B right", "both wrong")]
    columns.append(Column("of B's errors at most one class from A", ".1%"))
    rows: list[list[Value]] = []
    for pair in pairs:
        distance, right_a, right_b = np.abs(pair.a - pair.b), pair.a == pair.labels, pair.b == pair.labels
        has_order = pair.task.kind == "classes"
        outcomes = (right_a & right_b, right_a & ~right_b, right_b & ~right_a, ~right_a & ~right_b)
        rows.append(
            [pair.task.title, share(distance > 0), share(distance[distance > 0] == 1) if has_order else None]
            + [share(outcome) for outcome in outcomes]
            + [share(distance[~right_b] <= 1) if has_order else None]
        )
    return ReportItem("comparison-decisions", "Where decisions differ", "", Table(columns, rows))


def share(values: np.ndarray) -> float | None:
    """Return the share of true values. It is None if there are no values."""
    return float(values.mean()) if len(values) else None


def similarities_item(pairs: Sequence[PairedPredictions]) -> ReportItem:
    """Return how much predicted similarities differ."""
    columns = [Column("task"), Column("mean difference", ".3f"), Column("more than 0.5 apart", ".1%")]
    columns += [Column("more than 1 apart", ".1%"), Column("r of A and B", ".4f")]
    rows: list[list[Value]] = []
    for pair in pairs:
        distance = pair.disagreement
        shares = [share(distance > 0.5), share(distance > 1)]
        rows.append([pair.task.title, float(distance.mean()), *shares, correlation(pair.a, pair.b)])
    text = "Each model's similarities are first mapped to the labels' scale by least squares."
    return ReportItem("comparison-similarities", "How far similarities differ", text, Table(columns, rows))


def disagreements_item(pair: PairedPredictions) -> ReportItem | str:
    """Return the examples on which the two differ most (R0, table 3)."""
    order = np.argsort(-pair.disagreement, kind="stable")[:SHOWN_EXAMPLES]
    order = order[pair.disagreement[order] > 0]
    if not len(order):
        return f"no examples of {pair.task.title}: A and B agree on all of them"
    number = ".2f" if pair.task.kind == "similarity" else "d"
    columns = [Column(name) for name in pair.task.text_columns]
    columns += [Column("true", "g"), Column("A", number), Column("B", number)]
    numbers = (pair.labels, *pair.on_label_scale)
    rows: list[list[Value]] = [
        [*(column[i] for column in pair.texts), *(array[i].item() for array in numbers)] for i in order
    ]
    title = f"{pair.task.title}: the examples on which they differ most"
    return ReportItem(f"comparison-{pair.task.name}-worst", title, "", Table(columns, rows))


def figure_item(pair: PairedPredictions, source: str) -> ReportItem:
    """Return a figure of B's predictions over A's."""
    task = pair.task
    name, title = f"comparison-{task.name}", f"{task.title}: A and B"
    if task.kind == "similarity":
        a, b = pair.on_label_scale
        axes = ("similarity by A (fitted)", "similarity by B (fitted)")
        return ReportItem(name, title, figure=scatter_figure(a, b, axes, linear_fit(a, b)), source=source)
    counts = confusion(task, pair.b, pair.a)
    figure = confusion_figure(counts, class_names(task), x="decided by B", y="decided by A")
    return ReportItem(name, title, "Percentages are of each decision of A.", figure=figure, source=source)


def compare_checkpoints(
    paths: Sequence[Path],
    data: DataOptions,
    files: Mapping[str, TaskOptions],
    compute: ComputeOptions,
    pretrained: str | None = None,
) -> Report:
    """Return the report on two checkpoints. `pretrained` names base weights of adapters that are not found otherwise.

    Raise UserError if a file is not a checkpoint, if the two have no task in common, or if a dev file is missing.
    """
    tasks = shared_tasks(paths)
    dev = load_splits(data, files, tasks, ["dev"], say)["dev"]
    device = device_of(compute, say)
    a, b = (predict_dev(path, dev, device, compute.eval_batch_size, pretrained) for path in paths)
    pairs = [pair_predictions(dev[name], a.predictions[name], b.predictions[name]) for name in tasks]
    decided = [pair for pair in pairs if pair.task.kind != "similarity"]
    similar = [pair for pair in pairs if pair.task.kind == "similarity"]
    summary = Section("Both on dev", [scores_item(pairs)])
    if decided:
        summary.add(decisions_item(decided))
    if similar:
        summary.add(similarities_item(similar))
    commits = ", ".join(dict.fromkeys(checkpoint.commit[:12] or "not recorded" for checkpoint in (a, b)))
    source = f"A {paths[0]}, B {paths[1]}; commit {commits}; {shared_command([a.command, b.command])}"
    sections = [summary]
    for pair in pairs:
        sections.append(Section(pair.task.title, [figure_item(pair, source)]))
        sections[-1].add(disagreements_item(pair))
    about = f"A is {paths[0]} ({a.command}), B is {paths[1]} ({b.command}); dev files in {data.data_dir}."
    return Report("Two checkpoints", about, sections)

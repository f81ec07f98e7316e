"""Two checkpoints on the same dev sets: where they disagree, by how much, and whether one of them is better."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from config import ComputeOptions, DataOptions, TaskOptions
from datasets import Examples, load_splits, tokenise
from evaluation.metrics import confusion, correlation, decide, linear_fit, probabilities
from evaluation.predict import predict
from models.checkpoint import load, load_model, trained_tasks
from reporting.figures import confusion_figure, scatter_figure
from reporting.measures import fitted, mcnemar, metric_of, paired_bootstrap
from reporting.page import Piece, Report, Section
from reporting.sources import command_of
from reporting.tables import Column, Table, Value
from reporting.trials import shared_command
from tasks import TASKS, Task
from training.logger import class_names
from utils.device import Device, choose_device
from utils.errors import UserError

WORST = 15  # examples in a table


@dataclass(frozen=True)
class Model:
    """A checkpoint and its dev predictions by task: probabilities [N(, classes)] or similarities [N]."""

    path: Path
    commit: str
    command: str
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pair:
    """What two models say of one task's dev set: decided labels [N], or similarities [N] as they were predicted.

    `far` [N] orders the examples by how much the models disagree on them.
    """

    examples: Examples
    a: np.ndarray
    b: np.ndarray
    far: np.ndarray

    @property
    def task(self) -> Task:
        """The row of the task table."""
        return self.examples.task

    @property
    def labels(self) -> np.ndarray:
        """The true labels [N]."""
        assert self.examples.labels is not None
        return self.examples.labels

    def on_one_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Decided labels, or similarities [N] mapped to the labels' scale, since each model may have its own."""
        if self.task.kind != "similarity":
            return self.a, self.b
        return fitted(self.a, self.labels), fitted(self.b, self.labels)


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


def shared_tasks(paths: tuple[Path, Path], say: Callable[[str], None]) -> dict[str, Task]:
    """The tasks that both checkpoints know. Raises UserError where there is none."""
    known = [set(trained_tasks(load(path, mmap=True), path)) for path in paths]
    for name in TASKS:
        if len([own for own in known if name in own]) == 1:
            say(f"{TASKS[name].title}: left out, since only one of the two was trained on it")
    tasks = {name: task for name, task in TASKS.items() if all(name in own for own in known)}
    if not tasks:
        raise UserError(f"--compare {paths[0]} {paths[1]}: have no task in common; name checkpoints that share one")
    return tasks


def predicted(
    path: Path, dev: Mapping[str, Examples], device: Device, batch_size: int, say: Callable[[str], None]
) -> Model:
    """A checkpoint's predictions of dev sets."""
    model, tokenizer, saved = load_model(path)
    model.to(device.device)
    data = tokenise({"dev": dev}, tokenizer, str(model.options.pair_encoding), saved.data.extra_clean, say)["dev"]
    values = {
        name: probabilities(TASKS[name], predict(model, own, device.device, batch_size, device.amp))
        for name, own in data.items()
    }
    return Model(path, load(path, mmap=True).get("git_commit") or "", command_of(saved), values)


def pair_of(examples: Examples, a: np.ndarray, b: np.ndarray) -> Pair:
    """Two models' probabilities or similarities for the same examples."""
    task = examples.task
    if task.kind == "similarity":
        pair = Pair(examples, a, b, np.zeros(len(a)))
        return replace(pair, far=np.abs(np.subtract(*pair.on_one_scale())))
    own_a, own_b = decide(task, a), decide(task, b)
    apart = np.abs(a - b)
    apart = apart.sum(axis=1) / 2 if task.kind == "classes" else apart  # total variation distance
    return Pair(examples, own_a, own_b, np.abs(own_a - own_b) * (1 + apart))


# ----------------------------------------------------------------------------------------------------------------------
# Tables and figures


def scores_piece(pairs: list[Pair]) -> Piece:
    """Each task's metric for both, their difference with its interval, and the test of it."""
    columns = [Column("task"), Column("examples"), Column("metric"), Column("A", ".4f"), Column("B", ".4f")]
    columns += [
        Column("B - A", "+.4f"),
        Column("95% from", "+.4f"),
        Column("to", "+.4f"),
        Column("p", ".3g"),
        Column("test"),
    ]
    rows: list[list[Value]] = []
    for pair in pairs:
        similarity = pair.task.kind == "similarity"
        metric = metric_of(pair.task)
        a, b = metric(pair.a, pair.labels), metric(pair.b, pair.labels)
        low, high, p = paired_bootstrap(metric, pair.a, pair.b, pair.labels)
        if not similarity:
            p = mcnemar(pair.a == pair.labels, pair.b == pair.labels)
        test = "paired bootstrap" if similarity else "McNemar, exact"
        rows.append([pair.task.title, len(pair.labels), pair.task.metric, a, b, b - a, low, high, p, test])
    text = "Intervals are of a paired bootstrap over the dev examples; they say nothing of other seeds."
    return Piece("comparison-scores", "Scores", text, Table(columns, rows))


def classes_piece(pairs: list[Pair]) -> Piece:
    """How often decisions differ, and by how much."""
    columns = [Column("task"), Column("they differ", ".1%"), Column("of these off by one class", ".1%")]
    columns += [Column(name, ".1%") for name in ("both right", "only A right", "only B right", "both wrong")]
    columns.append(Column("of B's errors at most one class from A", ".1%"))
    rows: list[list[Value]] = []
    for pair in pairs:
        gap, right_a, right_b = np.abs(pair.a - pair.b), pair.a == pair.labels, pair.b == pair.labels
        several = pair.task.kind == "classes"
        rows.append(
            [pair.task.title, share(gap > 0), share(gap[gap > 0] == 1) if several else None]
            + [share(own) for own in (right_a & right_b, right_a & ~right_b, right_b & ~right_a, ~right_a & ~right_b)]
            + [share(gap[~right_b] <= 1) if several else None]
        )
    return Piece("comparison-decisions", "Where decisions differ", "", Table(columns, rows))


def share(of: np.ndarray) -> float | None:
    """The share that is true; None of nothing."""
    return float(of.mean()) if len(of) else None


def gaps_piece(pairs: list[Pair]) -> Piece:
    """How far similarities lie apart."""
    columns = [Column("task"), Column("mean difference", ".3f"), Column("more than 0.5 apart", ".1%")]
    columns += [Column("more than 1 apart", ".1%"), Column("r of A and B", ".4f")]
    rows: list[list[Value]] = []
    for pair in pairs:
        agreement = correlation(pair.a, pair.b)
        rows.append([pair.task.title, float(pair.far.mean()), share(pair.far > 0.5), share(pair.far > 1), agreement])
    text = "Each model's similarities are first mapped to the labels' scale by least squares."
    return Piece("comparison-similarities", "How far similarities differ", text, Table(columns, rows))


def worst_piece(pair: Pair) -> Piece | str:
    """The examples on which the two differ most (R0, table 3)."""
    order = np.argsort(-pair.far, kind="stable")[:WORST]
    order = order[pair.far[order] > 0]
    if not len(order):
        return f"no examples of {pair.task.title}: A and B agree on all of them"
    number = ".2f" if pair.task.kind == "similarity" else "d"
    columns = [Column(name) for name in pair.task.text_columns]
    columns += [Column("true", "g"), Column("A", number), Column("B", number)]
    rows: list[list[Value]] = [
        [
            *(column[i] for column in pair.examples.texts),
            *(own[i].item() for own in (pair.labels, *pair.on_one_scale())),
        ]
        for i in order
    ]
    title = f"{pair.task.title}: the examples on which they differ most"
    return Piece(f"comparison-{pair.task.name}-worst", title, "", Table(columns, rows))


def figure_piece(pair: Pair, note: str) -> Piece:
    """What B says over what A says."""
    task = pair.task
    if task.kind == "similarity":
        a, b = pair.on_one_scale()
        figure = scatter_figure(a, b, linear_fit(a, b), ("similarity by A (fitted)", "similarity by B (fitted)"), note)
        return Piece(f"comparison-{task.name}", f"{task.title}: A and B", figure=figure)
    counts = confusion(task, pair.b, pair.a)
    figure = confusion_figure(counts, class_names(task), note, x="decided by B", y="decided by A")
    return Piece(
        f"comparison-{task.name}", f"{task.title}: A and B", "Shares are of each decision of A.", figure=figure
    )


def compare(
    paths: tuple[Path, Path],
    data: DataOptions,
    files: Mapping[str, TaskOptions],
    compute: ComputeOptions,
    say: Callable[[str], None],
) -> Report:
    """The report on two checkpoints.

    Raises UserError for a file that is no checkpoint, for two without a common task, and for missing dev files.
    """
    tasks = shared_tasks(paths, say)
    dev: dict[str, Any] = load_splits(data, files, tasks, ["dev"], say)["dev"]
    device = choose_device(compute.use_gpu, compute.amp, compute.threads, say)
    a, b = (predicted(path, dev, device, compute.eval_batch_size, say) for path in paths)
    pairs = [pair_of(dev[name], a.values[name], b.values[name]) for name in tasks]
    decided = [pair for pair in pairs if pair.task.kind != "similarity"]
    similar = [pair for pair in pairs if pair.task.kind == "similarity"]
    commits = ", ".join(dict.fromkeys(model.commit[:12] or "not recorded" for model in (a, b)))
    note = f"A {a.path}, B {b.path}; commit {commits}; {shared_command([a.command, b.command])}"
    summary = Section("Both on dev", [scores_piece(pairs)])
    if decided:
        summary.add(classes_piece(decided))
    if similar:
        summary.add(gaps_piece(similar))
    sections = [summary]
    for pair in pairs:
        section = Section(pair.task.title, [figure_piece(pair, note)])
        section.add(worst_piece(pair))
        sections.append(section)
    about = f"A is {a.path} ({a.command}), B is {b.path} ({b.command}); dev files in {data.data_dir}."
    return Report("Two checkpoints", about, sections)

"""Turn raw outputs into probabilities, labels, scores and a table of scores."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tasks import Task
from utils.console import format_table

Scores = dict[str, Any]


def probabilities(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Return raw outputs as probabilities [N, classes] or [N] (binary); similarities [N] stay as they are."""
    if task.kind == "classes":
        return torch.from_numpy(outputs).softmax(dim=1).numpy()
    if task.kind == "binary":
        return torch.from_numpy(outputs).sigmoid().numpy()
    return outputs


def decide(task: Task, values: np.ndarray) -> np.ndarray:
    """Return labels [N] from probabilities: the likeliest class, or 1 from one half on; similarities stay."""
    if task.kind == "classes":
        return values.argmax(axis=1)
    if task.kind == "binary":
        return (values >= 0.5).astype(np.int64)
    return values


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Pearson correlation in float64, or 0 if one side is constant, since nothing was predicted."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def confusion(task: Task, decided: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how often each true label (row) was decided as each label (column): counts [K, K]."""
    count = int(task.label_range[1]) + 1
    cells = labels.astype(np.int64) * count + decided.astype(np.int64)
    return np.bincount(cells, minlength=count**2).reshape(count, -1)


def linear_fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept, in float64, of the least-squares line through y over x; slope 0 if x is constant."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    spread = x - x.mean()
    slope = float(spread @ (y - y.mean()) / (spread @ spread)) if spread.any() else 0.0
    return slope, float(y.mean() - slope * x.mean())


def similarity_lines(
    tasks: Mapping[str, Task], dev: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, tuple[float, float]]:
    """Return slope and intercept of each similarity's labels over its predictions; `dev` holds (values, labels).

    A head trained with the Pearson loss has no scale. The line gives it that of the labels.
    """
    return {name: linear_fit(*pair) for name, pair in dev.items() if tasks[name].kind == "similarity"}


def on_label_scale(task: Task, values: np.ndarray, line: tuple[float, float]) -> np.ndarray:
    """Return similarities [N] moved by `line`, which is slope and intercept, and cut to the range of the labels."""
    slope, intercept = line
    return (slope * values + intercept).clip(*task.label_range).astype(np.float32)


def score_task(task: Task, values: np.ndarray, labels: np.ndarray | None) -> Scores:
    """Return the metrics of one task from probabilities or similarities [N(, classes)] and labels [N].

    Classes and binary labels have accuracy and f1 (macro for classes); similarities have pearson and spearman.
    """
    assert labels is not None, f"{task.name}: cannot be scored without labels"
    decided = decide(task, values)
    if task.kind == "similarity":
        from scipy.stats import rankdata

        return {"pearson": correlation(decided, labels), "spearman": correlation(rankdata(decided), rankdata(labels))}
    from sklearn.metrics import f1_score

    average = "macro" if task.kind == "classes" else "binary"
    f1 = f1_score(labels, decided, average=average, zero_division=0.0)
    return {"accuracy": float((decided == labels).mean()), "f1": float(f1)}


def primary(task: Task, scores: Scores) -> float:
    """Return the main metric of a task: accuracy, or Pearson correlation."""
    return float(scores[task.metric])


def overall(tasks: Mapping[str, Task], by_task: Mapping[str, Scores]) -> Scores:
    """Return the scores of the tasks with `score`, the mean of accuracies and (1+r)/2, and `score_raw_r` with r.

    `score` is that of the course's leaderboard and chooses the best checkpoint. R2 (tables 6 to 8) and R3 print
    `score_raw_r`.
    """
    raw = [primary(tasks[name], scores) for name, scores in by_task.items()]
    kinds = [tasks[name].kind for name in by_task]
    normalised = [(1 + value) / 2 if kind == "similarity" else value for kind, value in zip(kinds, raw, strict=True)]
    return {**by_task, "score": float(np.mean(normalised)), "score_raw_r": float(np.mean(raw))}


def score_table(tasks: Mapping[str, Task], rows: Mapping[str, Scores], more: Sequence[str] = ()) -> str:
    """Return a table of scores: a row for each name in `rows`, a column for each task and one for each of `more`.

    Figures over all tasks are left out of a row that lacks a task, since they could not be compared.
    """
    figures = {"score": "score", "score_raw_r": "score with raw r", **{key: key.replace("_", " ") for key in more}}
    header = ["", *(task.title for task in tasks.values()), *figures.values()]
    body = [
        [name, *(f"{primary(task, scores[key]):.3f}" if key in scores else "-" for key, task in tasks.items())]
        + [f"{scores[key]:.4f}" if tasks.keys() <= scores.keys() else "-" for key in figures]
        for name, scores in rows.items()
    ]
    return format_table(header, body)

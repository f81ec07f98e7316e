"""Predict, score and write predictions: the same code for training, evaluation and ensembles."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config import UserError, bar_style, first_line, speaks
from datasets import Batches, Examples
from kernels.linear import ran_out_of_memory
from lora import merged
from tasks import TASKS, Task
from utils.files import write_text

Scores = dict[str, Any]
T = TypeVar("T")


def progress(items: Sequence[T], description: str, unit: str, leave: bool = True, done: int = 0) -> "tqdm[T]":
    """A progress bar with the time left; in a file or a pipe, a line every half minute for bars that stay.

    So many items were `done` before these.
    """
    return tqdm(
        items,
        desc=description,
        unit=unit,
        leave=leave,
        initial=done,
        total=done + len(items),
        disable=(not leave and not sys.stderr.isatty()) or not speaks(),
        **bar_style(),
    )


def halving(run: Callable[[np.ndarray], T], rows: np.ndarray) -> list[T]:
    """What `run(rows)` returns; of halves, one after the other, where it does not fit into memory."""
    try:
        return [run(rows)]
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error) or len(rows) == 1:
            raise
    middle = len(rows) // 2  # out here, where the error no longer holds the tensors of the failed pass
    return halving(run, rows[:middle]) + halving(run, rows[middle:])


def predict(
    model: nn.Module,
    data: Batches,
    device: torch.device,
    batch_size: int,
    amp: torch.dtype | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """The model's raw outputs for every example of `data`, or for these `rows` [N], in that order.

    [N, classes] or [N], float32. Batches are made of examples of similar length; the model is in evaluation mode, its
    adapters merged, and left as it was. Raises UserError where an output is not finite.
    """
    training = model.training
    model.eval()
    outputs: list[torch.Tensor] = []
    rows = np.arange(len(data)) if rows is None else rows
    by_length = np.argsort(-data.lengths[rows], kind="stable")
    task = data.examples.task
    blocks = [rows[by_length[i : i + batch_size]] for i in range(0, len(rows), batch_size)]
    autocast = torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None)
    with merged(model), torch.inference_mode(), autocast:
        for block in progress(blocks, f"{task.name} {data.examples.split}", "batch", leave=False):
            outputs += halving(lambda own: model(task.name, data.batch(own).to(device)).float(), block)
    model.train(training)
    joined = torch.cat(outputs).cpu().numpy()
    if not np.isfinite(joined).all():
        raise UserError(
            f"{task.title}: an output on {data.examples.split} is not finite any more; lower --lr or set --clip, or "
            "use an earlier checkpoint (the best.pt of an earlier epoch, if there is one, stands unharmed)"
        )
    restored = np.empty_like(joined)
    restored[by_length] = joined
    return restored


def probabilities(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Raw outputs as probabilities [N, classes] (classes) or [N] (binary); similarities stay as they are."""
    if task.kind == "classes":
        return torch.from_numpy(outputs).softmax(dim=1).numpy()
    if task.kind == "binary":
        return torch.from_numpy(outputs).sigmoid().numpy()
    return outputs


def decide(task: Task, values: np.ndarray) -> np.ndarray:
    """Labels from probabilities (or similarities): the likeliest class, 1 from one half on, or the value itself."""
    if task.kind == "classes":
        return values.argmax(axis=1)
    if task.kind == "binary":
        return (values >= 0.5).astype(np.int64)
    return values


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation in float64; 0 where one side is constant, since nothing was predicted."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def confusion(task: Task, decided: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How often each true label (rows) was decided as each label (columns): counts [K, K]."""
    count = int(task.label_range[1]) + 1
    return np.bincount(labels.astype(np.int64) * count + decided.astype(np.int64), minlength=count**2).reshape(
        count, -1
    )


def linear_fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the least-squares line through y over x, in float64; the mean where x is constant."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    spread = x - x.mean()
    slope = float(spread @ (y - y.mean()) / (spread @ spread)) if spread.any() else 0.0
    return slope, float(y.mean() - slope * x.mean())


def score_task(task: Task, values: np.ndarray, labels: np.ndarray | None) -> Scores:
    """Metrics of one task from probabilities or similarities [N(, classes)] and labels [N], which must be there.

    classes and binary: accuracy and f1 (macro for classes); similarity: pearson and spearman.
    """
    assert labels is not None, f"{task.name}: cannot be scored without labels"
    decided = decide(task, values)
    if task.kind == "similarity":
        from scipy.stats import rankdata

        return {
            "pearson": correlation(decided, labels),
            "spearman": correlation(rankdata(decided), rankdata(labels)),
        }
    from sklearn.metrics import f1_score

    average = "macro" if task.kind == "classes" else "binary"
    f1 = f1_score(labels, decided, average=average, zero_division=0.0)
    return {"accuracy": float((decided == labels).mean()), "f1": float(f1)}


def primary(task: Task, scores: Scores) -> float:
    """The one figure a task is compared by: accuracy, or Pearson correlation."""
    return float(scores[task.metric])


def overall(tasks: Mapping[str, Task], by_task: Mapping[str, Scores]) -> Scores:
    """The tasks' scores with `score`, the mean of accuracies and (1+r)/2, and `score_raw_r`, which averages r itself.

    The first is the course leaderboard's and chooses the best checkpoint; R2 (tables 6 to 8) and R3 print the second.
    """
    raw = [primary(tasks[name], scores) for name, scores in by_task.items()]
    normalised = [
        (1 + value) / 2 if tasks[name].kind == "similarity" else value for name, value in zip(by_task, raw, strict=True)
    ]
    return {**by_task, "score": float(np.mean(normalised)), "score_raw_r": float(np.mean(raw))}


def prediction_file(folder: Path, task: str, split: str) -> Path:
    """Where a run in `folder` has its predictions of a split of a task."""
    return folder / "predictions" / f"{task}-{split}-output.csv"


def remove_predictions(folder: Path) -> None:
    """Remove a run's predictions from `folder`, and nothing else. Raises UserError where they cannot be."""
    try:
        for task in TASKS:
            for split in ("dev", "test"):
                prediction_file(folder, task, split).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder / 'predictions'}: cannot be written ({first_line(error)}); choose another") from error


def score_and_write(
    tasks: Mapping[str, Task],
    values: Mapping[tuple[str, str], np.ndarray],
    splits: Mapping[str, Mapping[str, Examples]],
    folder: Path,
) -> Scores:
    """Write predictions/TASK-SPLIT-output.csv into `folder` for all `values` (split, task); returns the dev scores.

    Predictions of an earlier run in the same folder are removed, lest they be taken for this one's.
    """
    remove_predictions(folder)
    scores: dict[str, Scores] = {}
    for (split, name), own in values.items():
        examples = splits[split][name]
        write_predictions(prediction_file(folder, name, split), tasks[name], examples.ids, own)
        if split == "dev":
            scores[name] = score_task(tasks[name], own, examples.labels)
    return overall(tasks, scores)


def write_predictions(path: Path, task: Task, ids: list[str], values: np.ndarray) -> None:
    """Write labels for `ids` in the course's format: a header `id \\t NAME \\n`, then rows `id , label \\n`.

    Raises UserError where the file cannot be written.
    """
    rows = [f"{example} , {label} \n" for example, label in zip(ids, decide(task, values).tolist(), strict=True)]
    write_text(path, f"id \t {task.prediction_column} \n" + "".join(rows))

"""Write prediction files in the course's format."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from datasets import Examples
from evaluation.metrics import Scores, decide, overall, score_task
from tasks import TASKS, Task
from utils.errors import UserError, first_line
from utils.files import probe_folder, write_text


def refuse_training_run(folder: Path) -> None:
    """Raise UserError if `folder`, given by --run_dir, holds a training run or cannot be written.

    Scores and predictions of trained models would replace those of the run.
    """
    if (folder / "config.json").exists():
        raise UserError(
            f"--run_dir {folder}: holds a training run, whose scores and predictions would be lost; "
            "choose another folder"
        )
    probe_folder(folder, "--run_dir")


def prediction_file(folder: Path, task: str, split: str) -> Path:
    """Return the file for the predictions of a split of a task by a run in `folder`."""
    return folder / "predictions" / f"{task}-{split}-output.csv"


def remove_predictions(folder: Path) -> None:
    """Remove the predictions of a run from `folder`, and nothing else. Raises UserError if that fails."""
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
    """Write predictions/TASK-SPLIT-output.csv into `folder` for all `values` (split, task), and return the dev scores.

    Older predictions in the folder are removed, so that nobody takes them for these. Raises UserError if a file cannot
    be written.
    """
    remove_predictions(folder)
    scores: dict[str, Scores] = {}
    for (split, name), task_values in values.items():
        examples = splits[split][name]
        write_predictions(prediction_file(folder, name, split), tasks[name], examples.ids, task_values)
        if split == "dev":
            scores[name] = score_task(tasks[name], task_values, examples.labels)
    return overall(tasks, scores)


def write_predictions(path: Path, task: Task, ids: list[str], values: np.ndarray) -> None:
    """Write the labels of `ids` in the course's format: a header `id \\t NAME \\n`, then rows `id , label \\n`.

    Raises UserError if the file cannot be written.
    """
    rows = [f"{example} , {label} \n" for example, label in zip(ids, decide(task, values).tolist(), strict=True)]
    write_text(path, f"id \t {task.prediction_column} \n" + "".join(rows))

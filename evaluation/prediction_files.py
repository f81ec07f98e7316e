"""Write prediction files in the course's format."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from config import TaskOptions
from datasets import Examples
from evaluation.metrics import Scores, decide, overall, score_task
from models.checkpoint import copy
from tasks import TASKS, Task
from utils.errors import UserError, first_line
from utils.files import probe_file, probe_folder, write_text


def refuse_training_run(folder: Path) -> None:
    """Raise UserError if `folder`, given by --run_dir, holds a training run or cannot be written."""
    if (folder / "config.json").exists():
        raise UserError(f"--run_dir {folder}: holds a training run, whose scores would be lost; choose another folder")
    probe_folder(folder, "--run_dir")


def prediction_file(folder: Path, task: str, split: str) -> Path:
    """Return the file for the predictions of a split of a task by a run in `folder`."""
    return folder / "predictions" / f"{task}-{split}-output.csv"


def prediction_files(folder: Path) -> list[Path]:
    """Return the files of all predictions that a run in `folder` may write."""
    return [prediction_file(folder, task, split) for task in TASKS for split in ("dev", "test")]


def requested_files(options: Mapping[str, TaskOptions]) -> Iterator[tuple[str, str, Path]]:
    """Yield task, split and file for each --NAME_dev_out and --NAME_test_out."""
    for task, of_task in options.items():
        for split, file in (("dev", of_task.dev_out), ("test", of_task.test_out)):
            if file is not None:
                yield task, split, Path(file)


def probe_requested_files(options: Mapping[str, TaskOptions]) -> None:
    """Raise UserError if a file of --NAME_dev_out or --NAME_test_out cannot be written."""
    for task, split, file in requested_files(options):
        probe_file(file, f"--{task}_{split}_out")


def copy_predictions(folder: Path, options: Mapping[str, TaskOptions]) -> None:
    """Copy the predictions of a run in `folder` to the files of --NAME_dev_out and --NAME_test_out.

    Raises UserError if a file cannot be written.
    """
    for task, split, file in requested_files(options):
        source = prediction_file(folder, task, split)
        if source.exists():  # not if the task has no test file
            copy(source, file)


def remove_predictions(folder: Path) -> None:
    """Remove the predictions of a run from `folder`, and nothing else. Raises UserError if that fails."""
    try:
        for path in prediction_files(folder):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder / 'predictions'}: cannot be written ({first_line(error)}); choose another") from error


def score_and_write(
    tasks: Mapping[str, Task],
    values: Mapping[tuple[str, str], np.ndarray],
    splits: Mapping[str, Mapping[str, Examples]],
    folder: Path,
) -> Scores:
    """Write predictions/TASK-SPLIT-output.csv into `folder` for all `values` (split, task), and return the dev scores.

    Older predictions in the folder are removed. Raises UserError if a file cannot be written.
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

"""The dev predictions that a run saved, beside the true labels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import Config, DataOptions, TaskOptions
from datasets import BadRows, Examples, load_split
from evaluation.prediction_files import prediction_file
from models.run_records import recorded
from reporting.measures import metric_of
from reporting.sources import Run
from tasks import Task
from utils.errors import UserError
from utils.untrusted import read_text

UNKNOWN = ""  # the folder of data that only a foreign file names


@dataclass(frozen=True)
class Predictions:
    """A run's predictions of a task's dev set: predicted labels or similarities [N], and the true ones [N]."""

    task: Task
    predicted: np.ndarray
    labels: np.ndarray

    @property
    def score(self) -> float:
        """The task's metric."""
        return metric_of(self.task)(self.predicted, self.labels)


class DevSets:
    """The dev sets of the runs. Each file is read once.

    `data` and `files` are the options of the command line. Without them (None, empty) the options of a run name its
    file. A file that cannot be read adds a line to `problems`.
    """

    def __init__(self, data: DataOptions | None, files: Mapping[str, TaskOptions], problems: list[str]) -> None:
        self.data, self.files, self.problems = data, files, problems
        self.read: dict[tuple[str, str, str | None, tuple[str, ...] | None], Examples | None] = {}

    def examples(self, config: Config | None, task: Task) -> Examples | None:
        """Return the dev examples of a task for a run with these options. Return None if they cannot be read."""
        data, options = self.places(config, task)
        key = (task.name, data.data_dir, options.dev, options.columns)
        if key not in self.read:
            bad_rows = BadRows(data.max_bad_rows, lambda line: self.problems.append(f"skipped row {line}"))
            try:
                if data.data_dir == UNKNOWN and options.dev is None:
                    raise UserError(
                        f"only the run's config.json names the dev file, and no such run began here; name it with "
                        f"--{task.name}_dev, or its folder with --data_dir"
                    )
                self.read[key] = load_split(data, options, task, "dev", bad_rows)
            except UserError as error:
                self.read[key] = None
                what = f"no figures of predictions of {task.title}, which need the labels: "
                self.problems.append(f"{what}{error}")
        return self.read[key]

    def places(self, config: Config | None, task: Task) -> tuple[DataOptions, TaskOptions]:
        """Return the options that say where the dev file of a task is.

        A run of somebody else may name any file of ours. So it is this user's cache that says where a run's files are.
        """
        saved = None if config is None or self.data is not None else config.tasks.get(task.name)
        options = self.files.get(task.name) or saved or TaskOptions()
        if self.data is not None or config is None:
            return self.data or DataOptions(), options
        found = recorded(config) or {"data_dir": UNKNOWN, "dev": {}}
        if task.name not in self.files:
            options = replace(options, dev=found["dev"].get(task.name))
        return replace(config.data, data_dir=found["data_dir"]), options


def read_prediction_file(path: Path, task: Task) -> dict[str, float]:
    """Return the predicted label of each id. Raise UserError if the file is damaged or of another task."""
    try:
        header, *lines = read_text(path).rstrip("\n").split("\n")
        pairs = [line.rsplit(" , ", 1) for line in lines]
        predictions = {example: float(label) for example, label in pairs}
        low, high = (-np.inf, np.inf) if task.kind == "similarity" else task.label_range
        valid = all(low <= value <= high and np.isfinite(value) for value in predictions.values())
        if not predictions:
            raise ValueError("no predictions")
        if task.prediction_column not in header or not valid or len(predictions) < len(lines):
            raise ValueError("not the predictions of this task")
    except (OSError, ValueError) as error:  # whose text may quote the file, which may be a link to any other
        raise UserError(f"{path}: is damaged, or not the predictions of this task") from error
    return predictions


def load_predictions(run: Run, task: Task, dev_sets: DevSets) -> Predictions | None:
    """Return a run's predictions of a task's dev set. Return None if `dev_sets` cannot read the labels.

    Raise UserError if the predictions are missing or damaged, or if they do not match the dev set or the run's scores.
    """
    path = prediction_file(run.path, task.name, "dev")
    if not path.exists():
        raise UserError(f"{run.name}: no predictions of {task.title}, because {path.name} is missing")
    by_id = read_prediction_file(path, task)
    dev = dev_sets.examples(run.config, task)
    if dev is None or dev.labels is None:
        return None
    if set(by_id) != set(dev.ids):
        raise UserError(
            f"{run.name}: {dev.path} is not the dev file of {task.title} that it predicted; name that with --data_dir"
        )
    values = np.array([by_id[example] for example in dev.ids])
    predictions = Predictions(task, values if task.kind == "similarity" else values.astype(np.int64), dev.labels)
    saved = (run.scores or {}).get(task.name, {}).get(task.metric)
    if saved is not None and abs(predictions.score - saved) > 1e-3:
        raise UserError(
            f"{run.name}: {task.title} has {task.metric} {predictions.score:.3f} on {dev.path} but {saved:.3f} in "
            "scores.json; name the dev file that it was scored on with --data_dir"
        )
    return predictions

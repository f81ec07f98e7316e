"""Knowledge distillation (Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", section 2, at
temperature 1): one model learns what an ensemble of trained models says of the training texts, beside their labels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from config import Config, EnsembleOptions
from datasets import Examples, TaskData
from evaluation.ensembling import vote_all
from evaluation.members import Member, Predictor
from evaluation.metrics import linear_fit
from tasks import TASKS
from utils.console import say
from utils.device import Device
from utils.errors import UserError


def add_teacher_labels(
    config: Config, teachers: Sequence[Member], train: Mapping[str, TaskData], device: Device
) -> None:
    """Give the training data of each task the mean prediction of the teachers that know it, by their votes.

    These are probabilities [N, classes] or [N], or similarities [N] on the labels' scale. Raises UserError if a
    checkpoint is damaged, or if no task of the run is known.
    """
    predictor = Predictor(
        Path(EnsembleOptions().cache), device, config.compute.eval_batch_size, config.model.pretrained
    )
    splits = {"train": {name: data.examples for name, data in train.items()}}
    outputs = [predictor.outputs(teacher, splits) for teacher in teachers]
    means = vote_all(outputs, [teacher.votes for teacher in teachers], "probabilities")
    if not means:
        raise UserError(f"--distill {','.join(config.train.distill or ())}: knows no task of this run; choose another")
    for (_, name), mean in means.items():
        train[name].teacher_labels = on_label_scale(train[name].examples, mean).astype(np.float32)
        say(f"{TASKS[name].title}: {sum(name in teacher.tasks for teacher in teachers)} teachers")


def on_label_scale(examples: Examples, mean: np.ndarray) -> np.ndarray:
    """Return similarities [N], which have no scale in a mean of teachers, on that of the labels; others as they are."""
    if examples.task.kind != "similarity":
        return mean
    assert examples.labels is not None
    slope, intercept = linear_fit(mean, examples.labels)
    return slope * mean + intercept

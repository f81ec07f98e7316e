"""Knowledge distillation (Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", section 2, at
temperature 1): one model learns what an ensemble of trained models says of the training texts, beside their labels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from config import Config, EnsembleOptions
from datasets import TaskData
from evaluation.ensembling import vote
from evaluation.members import Member, Predictor
from evaluation.metrics import linear_fit
from utils.console import say
from utils.device import Device
from utils.errors import UserError


def add_teacher_labels(
    config: Config, teachers: Sequence[Member], train: Mapping[str, TaskData], device: Device
) -> None:
    """Give the training data of each task the mean prediction of the teachers that know it.

    These are probabilities [N, classes] or [N], or similarities [N] on the labels' scale. Raises UserError if a
    checkpoint is damaged, or if no task of the run is known.
    """
    predictor = Predictor(
        Path(EnsembleOptions().cache), device, config.compute.eval_batch_size, config.model.pretrained
    )
    splits = {"train": {name: data.examples for name, data in train.items()}}
    outputs = [predictor.outputs(teacher, splits) for teacher in teachers]
    for name, data in train.items():
        known = [values["train", name] for values in outputs if ("train", name) in values]
        if known:
            data.teacher_labels = mean_prediction(data, known)
            say(f"{data.examples.task.title}: {len(known)} teachers")
    if all(data.teacher_labels is None for data in train.values()):
        raise UserError(f"--distill {','.join(config.train.distill or ())}: knows no task of this run; choose another")


def mean_prediction(data: TaskData, outputs: list[np.ndarray]) -> np.ndarray:
    """Return the mean of the teachers' predictions for a training set, as float32."""
    task, labels = data.examples.task, data.examples.labels
    mean = vote(task, outputs, [1] * len(outputs), "probabilities")
    if task.kind == "similarity":
        assert labels is not None
        slope, intercept = linear_fit(mean, labels)
        mean = slope * mean + intercept  # similarities of teachers have no common scale
    return mean.astype(np.float32)

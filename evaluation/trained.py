"""Use a trained model from Python: load a checkpoint, label texts and embed them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import ComputeOptions, Config
from datasets import Examples, TaskData, tokenise
from evaluation.metrics import decide, on_label_scale, probabilities
from evaluation.predict import outputs_in_batches, predict
from models.checkpoint import load as load_content
from models.checkpoint import load_model, saved_lines, trained_tasks
from models.multitask_bert import MultitaskBERT
from tasks import Task, task_by_alias
from text.tokenizer import Tokenizer
from utils.device import Device
from utils.errors import UserError

Texts = Sequence[str] | Sequence[tuple[str, ...]]  # texts, or pairs of them


class Prediction(NamedTuple):
    """The label of one text or pair: its number, its name and its probability.

    A similarity is a number without a name and without a probability.
    """

    label: float
    name: str = ""
    probability: float | None = None


@dataclass(frozen=True)
class TrainedModel:
    """The model of a checkpoint on a device. It reads any number of texts and keeps their order."""

    path: Path
    model: MultitaskBERT
    tokenizer: Tokenizer
    config: Config
    device: Device
    batch_size: int
    lines: Mapping[str, tuple[float, float]]  # of each similarity: slope and intercept that give it the labels' scale

    def predict(self, task: str, texts: Texts) -> list[Prediction]:
        """Return a prediction for each text, or for each pair of texts if the task compares two.

        Raises UserError for a task that the model does not know, and for texts that do not suit the task.
        """
        row = self.task(task)
        values = self.probabilities(task, texts)
        return [make_prediction(row, label, value) for label, value in zip(decide(row, values), values, strict=True)]

    def probabilities(self, task: str, texts: Texts) -> np.ndarray:
        """Return the probability of each class [N, classes], of the label 1 [N], or the similarity [N].

        A similarity has the scale of the labels, by the line that was fitted on dev when the checkpoint was saved. An
        older checkpoint has no line; the similarity is then the raw output. Raises UserError as `predict` does.
        """
        row = self.task(task)
        data = self._tokenised(row, text_columns(row, texts), self.model.pair_encodings()[row.name])
        if not len(data):
            return np.empty((0, row.num_outputs)[: 2 if row.kind == "classes" else 1], np.float32)
        outputs = predict(self.model, data, self.device.device, self.batch_size, self.device.amp)
        if row.name in self.lines:
            return on_label_scale(row, outputs, self.lines[row.name])
        return probabilities(row, outputs)

    def embed(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        """Return the sentence embeddings [N, H], float32, that the head of `task` gets.

        Without `task`, they are those of the first task that compares similarities, or else of the first task. Raises
        UserError for a task that the model does not know, and for pairs instead of texts.
        """
        row = embedding_task(list(self.model.tasks.values())) if task is None else self.task(task)
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("embed needs a list of texts, such as ['a fine film']")
        data = self._tokenised(row, (list(texts),), "siamese")  # so that a text of a pair stands alone
        if not len(data):
            return np.empty((0, self.model.bert_config.hidden_size), np.float32)
        embed = partial(self.model.embed, row.name)
        return outputs_in_batches(self.model, embed, data, self.device.device, self.batch_size, self.device.amp)

    def task(self, name: str) -> Task:
        """Return the row of the task table. Raises UserError for a task that the model does not know."""
        known = task_by_alias(self.model.tasks)
        if name not in known:
            raise UserError(
                f"task {name}: {self.path} was not trained on it; choose from {', '.join(self.model.tasks)}"
            )
        return self.model.tasks[known[name]]

    def _tokenised(self, task: Task, columns: tuple[list[str], ...], pair_encoding: str) -> TaskData:
        ids = [str(i) for i in range(len(columns[0]))]
        examples = Examples(task, "predict", self.path, ids, columns, None)
        warn = partial(print, file=sys.stderr)  # not among the labels, which may go into a pipe
        splits, clean = {"predict": {task.name: examples}}, self.config.data.extra_clean
        return tokenise(splits, self.tokenizer, {task.name: pair_encoding}, clean, warn)["predict"][task.name]


def embedding_task(tasks: Sequence[Task]) -> Task:
    """Return the task whose embeddings serve others best: the first with similarities, or else the first."""
    return next((task for task in tasks if task.kind == "similarity"), tasks[0])


def make_prediction(task: Task, label: float, value: np.ndarray) -> Prediction:
    """Return a label with its name and probability; `value` holds the probabilities or the similarity."""
    if task.kind == "similarity":
        return Prediction(float(label))
    probability = value.max() if task.kind == "classes" else max(value, 1 - value)
    name = task.label_names[int(label)] if task.label_names else str(label)
    return Prediction(int(label), name, float(probability))


def text_columns(task: Task, texts: Texts) -> tuple[list[str], ...]:
    """Return the texts column by column. Raises UserError if they are not what the task needs."""
    rows: list[tuple[str, ...]] = []
    for item in () if isinstance(texts, str) else texts:
        rows.append(tuple(item) if isinstance(item, (tuple, list)) else (item,))
    if isinstance(texts, str) or any(
        len(row) != len(task.text_columns) or not all(isinstance(text, str) for text in row) for row in rows
    ):
        wanted = "pairs, such as [('a cat', 'a dog')]" if task.is_pair else "texts, such as ['a fine film']"
        raise UserError(f"{task.title} needs a list of {wanted}")
    return tuple([row[i] for row in rows] for i in range(len(task.text_columns)))


def load_trained(path: Path, device: Device, batch_size: int, base: str | None = None) -> TrainedModel:
    """Return the model of a checkpoint on `device`. Raises UserError as `load` does, and if --mlm has made the file."""
    content = load_content(path)
    trained_tasks(content, path)
    model, tokenizer, config = load_model(path, content, base)
    lines = saved_lines(content)
    return TrainedModel(path, model.to(device.device), tokenizer, config, device, batch_size, lines)


def load(
    checkpoint: str | Path,
    device: str | None = None,
    batch_size: int = ComputeOptions.eval_batch_size,
    pretrained: str | None = None,
) -> TrainedModel:
    """Return the model of a best.pt, ready to predict and embed.

    `device` is a name of torch's, such as "cuda:1"; by default it is a GPU if there is one, else the CPU. `pretrained`
    is the new place of the base weights of a checkpoint with adapters, if they have moved. Raises UserError for a file
    that is missing, damaged or no trained model.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return load_trained(Path(checkpoint), Device(chosen), batch_size, pretrained)

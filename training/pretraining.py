"""--mlm: further pre-training on the tasks' own texts (Gururangan et al. 2020, "Don't stop pretraining", section 4)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics import Scores
from models.mlm import Masking
from tasks import Task
from text.packing import PackedBatch, to_device
from training.logger import Epoch
from training.meters import TaskMeter
from training.task_sampling import Step
from training.trainer import Trainer


class WordMeter(TaskMeter):
    """One task's figures over an epoch: the mean loss of its masked words."""

    def scores(self, task: Task) -> Scores:
        """None, since no label was predicted."""
        return {}


class Pretrainer(Trainer):
    """A Trainer whose loss is that of masked words. Labels are not looked at, and there is no dev data.

    Nothing says which epoch is the best, so best.pt has the weights of the last one.
    """

    meter = WordMeter

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.masking = Masking(self.tokenizer)
        self.feed.ahead = False  # `forward` makes its own batches

    def passed(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` returns, without its history; the gradients are added to those at hand."""
        loss, losses, words = self.forward(step)
        self.backward(loss, step)
        return loss.detach(), losses.detach(), words

    def forward(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss of a batch's masked words in nats, the loss of each of them [M], and the words [M]."""
        # addressed by seed and step, so that a resumed run masks as an uninterrupted one
        generator = np.random.default_rng([self.config.train.seed, *b"mlm", self.step])
        whole, device = self.train_data[step.task].batch(step.indices), self.device.device
        assert isinstance(whole, PackedBatch)
        batch, *chosen = self.masking(whole, generator)
        rows, words = (to_device(own, device) for own in chosen)
        with self.device.autocast():
            logits = self.model.masked_words(step.task, batch.to(device), rows)
        losses = F.cross_entropy(logits.float(), words, reduction="none")
        mean = losses.sum() / max(len(losses), 1)  # of no words it is 0
        return self.config.tasks[step.task].weight * mean, losses, words

    def due(self) -> list[str]:
        """No task is evaluated."""
        return []

    def judge(self, record: Epoch, dev: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Save the model."""
        self.save_best({})

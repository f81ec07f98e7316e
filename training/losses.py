"""Losses: functions of a batch's outputs and labels, found by the names that the task table lists."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [B, C] against classes [B]."""
    return F.cross_entropy(logits, labels)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy in nats: logits [B] against 0/1, or [B, C] against one-hot classes (R0, F.2)."""
    targets = labels if logits.dim() == 1 else F.one_hot(labels, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def mean_squared_error(predictions: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of predictions [B], in squared label units."""
    return F.mse_loss(predictions, labels.to(predictions.dtype))


def pearson(predictions: Tensor, labels: Tensor, eps: float = 1e-6) -> Tensor:
    """1 - Pearson correlation of predictions [B] and labels [B] (R0, F.1), in fp32; 1 where either is constant."""
    x, y = predictions.float(), labels.float()
    x, y = x - x.mean(), y - y.mean()
    # sqrt has an infinite slope at 0, which a constant batch would turn into NaN
    norm = torch.sqrt((x.square().sum() * y.square().sum()).clamp_min(eps**2))
    return 1 - (x * y).sum() / norm


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "bce": binary_cross_entropy,
    "mse": mean_squared_error,
    "pearson": pearson,
}

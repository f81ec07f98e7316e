"""Losses: functions of a batch's outputs and labels.

To add one, write the function, name it in `LOSSES`, and list the name in the `losses` of the tasks that offer it
(tasks.py); it is then a choice of --NAME_loss. Losses that look at embeddings are in training/auxiliary_losses.py.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from config import TaskOptions

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of logits [B, C] against classes [B]."""
    return F.cross_entropy(logits, labels)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean binary cross-entropy in nats: logits [B] against 0/1, or [B, C] against one-hot (R0, F.2)."""
    targets = labels if logits.dim() == 1 else F.one_hot(labels, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def mean_squared_error(predictions: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared error of predictions [B], in squared label units."""
    return F.mse_loss(predictions, labels.to(predictions.dtype))


def pearson(predictions: Tensor, labels: Tensor, eps: float = 1e-6) -> Tensor:
    """Return 1 - Pearson correlation of predictions [B] and labels [B], in fp32; 1 if either is constant (R0, F.1)."""
    x, y = predictions.float(), labels.float()
    x, y = x - x.mean(), y - y.mean()
    # sqrt has an infinite slope at 0, which a constant batch would turn into NaN
    norm = torch.sqrt((x.square().sum() * y.square().sum()).clamp_min(eps**2))
    return 1 - (x * y).sum() / norm


def kl_divergence(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean KL divergence in nats of softmax(logits [B, C]) from one-hot classes [B] (R0, F.2): the CE."""
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.kl_div(F.log_softmax(logits, dim=1), targets, reduction="batchmean")


def ordinal_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean binary cross-entropy in nats, in fp32, of P(class <= j) against 1[label <= j] (R0, F.2).

    Logits [B, C], classes [B]; the mean runs over B and j. R0 compares with one-hot targets instead, which is infinite
    where a cumulative probability is 1, as the last one always is.
    """
    z, cuts = logits.float(), range(1, logits.shape[1])
    # The logit of P(class <= j) is a difference of two log-sum-exps; 1 - cumsum(softmax) would round to 0.
    below = torch.stack([z[:, :cut].logsumexp(dim=1) for cut in cuts], dim=1)  # [B, C-1]
    above = torch.stack([z[:, cut:].logsumexp(dim=1) for cut in cuts], dim=1)
    targets = labels[:, None] < torch.arange(1, logits.shape[1], device=labels.device)
    return F.binary_cross_entropy_with_logits(below - above, targets.float())


def log_cosh(predictions: Tensor, labels: Tensor) -> Tensor:
    """Return the mean log(cosh(error)) of predictions [B] in label units (R0, F.2), in fp32; slope tanh(error) / B."""
    error = (predictions.float() - labels.float()).abs()
    return (error + F.softplus(-2 * error) - math.log(2)).mean()  # cosh itself overflows from 90 on


def mixed(outputs: Tensor, labels: Tensor, weight: float | None = None) -> Tensor:
    """Return one of R0's two mixed losses (F.2, listing 4), in fp32; the outputs' dimensions decide which.

    Logits [B, C] against classes [B]: binary cross-entropy + 0.1 x squared error of the expected class, which counts
    from 0 as the labels do (R0's scores count from 1). Predictions [B] against similarities [B]: Pearson loss + 0.5 x
    squared error. `weight` replaces 0.1 and 0.5.
    """
    outputs = outputs.float()
    if outputs.dim() == 1:
        factor = 0.5 if weight is None else weight
        return pearson(outputs, labels) + factor * mean_squared_error(outputs, labels)
    scores = torch.arange(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    expected = (outputs.softmax(dim=1) * scores).sum(dim=1)
    factor = 0.1 if weight is None else weight
    return binary_cross_entropy(outputs, labels) + factor * mean_squared_error(expected, labels)


def contrastive(first: Tensor, second: Tensor, labels: Tensor, margin: float = 1.0, eps: float = 1e-6) -> Tensor:
    """Return the mean contrastive loss of embeddings [B, H] and [B, H] in fp32; labels [B] are 1 for similar, else 0.

    0.5 (y d^2 + (1 - y) max(0, margin - d)^2) with the Euclidean distance d, in its squared units (Hadsell et al. 2006;
    R0, F.2, whose formula has the two labels the wrong way round and sums over the batch).
    """
    y = labels.float()
    squared = (first.float() - second.float()).square().sum(dim=1)  # [B]
    distance = squared.clamp_min(eps**2).sqrt()  # sqrt has an infinite slope at 0
    return 0.5 * (y * squared + (1 - y) * (margin - distance).clamp_min(0).square()).mean()


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of each of the embeddings [B, H] with each of the others [B, H]: [B, B], in fp32."""
    with torch.autocast(first.device.type, enabled=False):  # it would round them
        return F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T


def simcse(first: Tensor, second: Tensor, temperature: float = 0.05) -> Tensor:
    """Return the in-batch cross-entropy in nats of two dropout views [B, H] and [B, H] of the same sentences, in fp32.

    Each first view has to find its second view among all B by cosine / temperature (Gao et al. 2021, equation 4;
    R0, section 4.5).
    """
    similarities = cosines(first, second)
    return F.cross_entropy(similarities / temperature, torch.arange(len(first), device=first.device))


def multiple_negatives_ranking(
    first: Tensor, second: Tensor, positive: Tensor, same: Tensor, scale: float = 20.0
) -> Tensor:
    """Return the in-batch cross-entropy in nats, in fp32, over `positive` [B] pairs of embeddings [B, H] and [B, H].

    Each first embedding has to find its partner among the second ones of all positive pairs by cosine x scale
    (Henderson et al. 2017; R4, section 4.3, whose scale of 1 has a floor of over 2 nats at 64 pairs). `same` [B, B]
    marks pairs with a text in common, which are no negatives of each other. The loss is 0 if no pair is positive.
    """
    partner = torch.eye(len(first), dtype=torch.bool, device=first.device)
    allowed = partner | (positive[None, :] & ~same)
    rows = -(scale * cosines(first, second)).masked_fill(~allowed, -torch.inf).log_softmax(dim=1).diagonal()  # [B]
    return (rows * positive).sum() / positive.sum().clamp_min(1)


def cosine_embedding(first: Tensor, second: Tensor, similar: Tensor, different: Tensor) -> Tensor:
    """Return the mean of 1 - cos over `similar` [B] pairs of embeddings [B, H], and max(0, cos) over `different` ones.

    In fp32 (R4, section 4.3). Other pairs do not count. The loss is 0 if no pair counts.
    """
    cosine = F.cosine_similarity(first.float(), second.float())  # [B]
    each = torch.where(similar, 1 - cosine, torch.where(different, cosine.clamp_min(0), 0.0))
    return each.sum() / (similar | different).sum().clamp_min(1)


# Outputs are logits [B, C] if the task's kind is `classes`, logits [B] if it is `binary`, and similarities [B] else. Of
# these losses, `binary` tasks can have bce only: `mixed` would take their logits for similarities.
LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "bce": binary_cross_entropy,
    "kl": kl_divergence,
    "ordinal": ordinal_cross_entropy,
    "mse": mean_squared_error,
    "pearson": pearson,
    "log-cosh": log_cosh,
    "mixed": mixed,
}


def task_loss(options: TaskOptions) -> Loss:
    """Return the loss that --NAME_loss names. Only `mixed` can have --NAME_mixed_weight."""
    if options.mixed_weight is None:
        return LOSSES[options.loss]
    return partial(mixed, weight=options.mixed_weight)

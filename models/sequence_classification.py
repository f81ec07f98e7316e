"""One task as transformers' BertForSequenceClassification, which has a linear layer on the pooled first token."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bert import Linear
from kernels.dropout import Dropout
from models.heads import AddChannel, BatchNorm, Convolution, PairLayer
from models.multitask_bert import MultitaskBERT
from tasks import Task

CLASS = "BertForSequenceClassification"
LINEAR_IN_EVALUATION = (Dropout, Linear, AddChannel, Convolution, BatchNorm, nn.Flatten)
PROBLEMS = {"classes": "single_label_classification", "binary": "single_label_classification"}


def what_does_not_fit(model: MultitaskBERT, task: str) -> str:
    """Return what a task has that BertForSequenceClassification has no place for, by its flags; "" if it all fits."""
    options = model.options_of[task]
    if task in model.pals:
        return "--pal"
    if model.is_siamese(task):
        return f"--pair_encoding {options.pair_encoding}"
    if model.pooling(task) != "cls":
        return f"--pooling {options.pooling}"
    if model.tasks[task].is_pair and options.pair_layer not in ("none", "linear"):
        return f"--pair_layer {options.pair_layer}"
    if not all(isinstance(layer, LINEAR_IN_EVALUATION) for layer in model.heads[task].children()):
        return f"--clf {options.clf} and an activation in the head"
    return ""


@torch.no_grad()
def linear_head(model: MultitaskBERT, task: str, line: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    """Return the weight [outputs, H] and bias [outputs] of the linear function that the layers of a task's head make.

    The one logit of a binary task becomes two, of which that of the label 0 is always 0. A similarity is moved by
    `line`, its slope and intercept, onto the scale of its labels. `what_does_not_fit` must have found nothing.
    """
    parts = [model.heads[task]] if not model.tasks[task].is_pair else [model.pair_layer, model.heads[task]]
    layers = copy.deepcopy(nn.ModuleList(part for part in parts if part is not None)).double().eval()

    def head(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x, task) if isinstance(layer, PairLayer) else layer(x)
        return x

    hidden = model.bert_config.hidden_size
    bias = head(torch.zeros(1, hidden, dtype=torch.float64))  # [1, outputs]
    weight = head(torch.eye(hidden, dtype=torch.float64)) - bias  # [H, outputs]
    if model.tasks[task].kind == "binary":
        weight, bias = (torch.cat([torch.zeros_like(x), x], dim=1) for x in (weight, bias))
    if line is not None:
        slope, intercept = line
        weight, bias = slope * weight, slope * bias + intercept
    return weight.t().float(), bias[0].float()


def task_settings(task: Task) -> dict[str, Any]:
    """Return what config.json of a BertForSequenceClassification says of a task."""
    count = int(task.label_range[1]) + 1
    names = task.label_names or tuple(map(str, range(count)))
    labels = [task.label_column] if task.kind == "similarity" else names
    return {
        "architectures": [CLASS],
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": PROBLEMS.get(task.kind, "regression"),
    }

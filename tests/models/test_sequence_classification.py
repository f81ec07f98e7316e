"""Heads as one linear layer on the pooled first token, and those that are none."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import TINY, make_model, max_difference

from config import PalOptions
from models.sequence_classification import linear_head, task_settings, what_does_not_fit
from tasks import CFIMDB, DEFAULT_TASKS, SST, STS

CROSS: dict[str, Any] = {"arch": "r1-baseline"}


@pytest.mark.parametrize("task", list(DEFAULT_TASKS))
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pair_layer": "linear"},
        {"clf": "mlp", "head_layers": 0},
        {"clf": "conv", "head_layers": 0},
        {"clf": "conv", "head_layers": 0, "head_batchnorm": True},
    ],
)
def test_a_head_without_activation_is_one_linear_layer(task: str, given: dict[str, Any]) -> None:
    model = make_model(**CROSS, **given).eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.linspace(0.5, 1.5, len(buffer)))
    assert what_does_not_fit(model, task) == ""
    pooled = torch.rand(4, TINY.hidden_size) * 2 - 1
    with torch.no_grad():
        wanted = model.classify(task, pooled)
    weight, bias = linear_head(model, task, None)
    found = pooled @ weight.t() + bias
    if task == "para":
        assert found.shape == (4, 2) and not found[:, 0].any()
        found = found[:, 1:]
    assert max_difference(found, wanted) < 1e-5
    if task == "sts":
        weight, bias = linear_head(model, task, (0.5, 2.0))
        assert max_difference(pooled @ weight.t() + bias, 0.5 * wanted + 2) < 1e-5


@pytest.mark.parametrize(
    ("task", "given", "named"),
    [
        ("sst", {"clf": "mlp", "head_layers": 1}, "--clf mlp and an activation"),
        ("sst", {"clf": "nonlinear"}, "--clf nonlinear and an activation"),
        ("sst", {"pooling": "mean"}, "--pooling mean"),
        ("sts", {"pair_layer": "plain"}, "--pair_layer plain"),
        ("para", {"arch": "v1"}, "--pair_encoding siamese"),
        ("sts", {"arch": "cosine"}, "--pair_encoding siamese"),
    ],
)
def test_what_does_not_fit_is_named(task: str, given: dict[str, Any], named: str) -> None:
    assert named in what_does_not_fit(make_model(**CROSS | given), task)


def test_pals_do_not_fit() -> None:
    model = make_model(**CROSS)
    model.add_pals(PalOptions(pal="low-rank", pal_tasks=("sst",)))
    assert what_does_not_fit(model, "sst") == "--pal" and what_does_not_fit(model, "sts") == ""


def test_labels() -> None:
    assert task_settings(CFIMDB)["id2label"] == {"0": "negative", "1": "positive"}
    assert task_settings(replace(SST, label_names=()))["label2id"] == {str(i): i for i in range(5)}
    assert task_settings(STS)["problem_type"] == "regression" and task_settings(STS)["id2label"] == {"0": "similarity"}

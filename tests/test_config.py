"""Options as dataclasses: what an arch decides, round trips, and saved values that no command line can give."""

import json
import re
from dataclasses import fields
from typing import Any

import pytest
from helpers import configure, refusal

from config import ARCHS, BertConfig, Config


@pytest.mark.parametrize("arch", list(ARCHS))
def test_an_arch_decides_what_is_left_out(arch: str) -> None:
    config, choices = configure("--arch", arch), ARCHS[arch]
    unused = {"linear": {"head_layers"}, "nonlinear": {"head_layers"}}.get(choices.clf, set())
    for field in fields(choices):
        if field.name != "similarity_loss":
            wanted = None if field.name in unused else getattr(choices, field.name)
            assert getattr(config.model, field.name) == wanted
    assert config.tasks["sts"].loss == choices.similarity_loss
    assert configure("--arch", arch, "--sts_loss", "mse").tasks["sts"].loss == "mse"
    assert configure("--arch", arch, "--clf", "linear", "--no_head_batchnorm").model.clf == "linear"
    assert config.model.resolved() == config.model


def test_archs_whose_reports_train_sts_with_squared_error() -> None:
    """R2, section 4.1 (v1), and R3, section 3.3 (cosine), as R1, R2's v2 and R4 do."""
    losses = {arch: configure("--arch", arch).tasks["sts"].loss for arch in ARCHS}
    assert losses == {arch: "pearson" if arch in ("yin-yang", "duality") else "mse" for arch in ARCHS}


def test_rates_and_stages() -> None:
    assert [configure("--lr_scaling", name, "--batch_size", 256).train.scaled_lr() for name in ("none", "linear")] == [
        1e-4, 4e-4,
    ]  # fmt: skip
    assert configure("--lr_scaling", "sqrt", "--batch_size", 256).train.scaled_lr() == 2e-4
    assert [configure().train.stage(epoch) for epoch in range(3)] == [0, 1, 2]
    assert [configure("--lr_schedule", "cyclic").train.stage(epoch) for epoch in range(4)] == [0, 0, 1, 1]
    assert [configure("--unfreeze_every", 3).train.stage(epoch) for epoch in range(4)] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--arch v2 --clip 1 --train_sst",
        "--pair_features u,v,cos",
        "--pal pal --pal_tasks sst",
        "--sst_extra a.csv,b.csv",
    ],
)
def test_config_round_trip(words: str) -> None:
    config = configure(*words.split())
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.flat()["train.clip"] == config.train.clip
    assert config.flat()["tasks.sst.extra"] == config.tasks["sst"].extra


def test_options_younger_than_a_saved_configuration_have_their_defaults() -> None:
    saved = configure("--epochs", 3).to_dict()
    del saved["pal"], saved["train"]["anneal_factor"]
    assert Config.from_dict(saved) == configure("--epochs", 3)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("train", "lr", 0.0), ("train", "lr", 1e300), ("train", "epochs", True), ("train", "optim", "adam"),
        ("model", "pair_features", "uv"), ("pal", "pal_tasks", 5), ("tasks", "extra", "uv"), ("tasks", "extra", 5),
    ],
)  # fmt: skip
def test_saved_values_that_no_command_line_can_give_are_refused(group: str, name: str, value: Any) -> None:
    saved = configure().to_dict()
    (saved["tasks"]["sst"] if group == "tasks" else saved[group])[name] = value
    with pytest.raises(TypeError, match=f"^{name} {re.escape(repr(value))}$"):
        Config.from_dict(saved)
    saved["train"]["momentum"] = 0.9
    with pytest.raises(TypeError, match="momentum"):
        Config.from_dict(saved)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta', but only 'bert' is supported"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', but only 'gelu'"),
        ({"hidden_size": 0}, "hidden_size is 0, which is impossible"),
        ({"num_hidden_layers": 129}, "num_hidden_layers is 129, which is impossible"),
        ({"vocab_size": True}, "vocab_size is True, which is impossible"),
        ({"hidden_dropout_prob": "much"}, "hidden_dropout_prob is 'much', which is impossible"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 12"),
        ({"pad_token_id": 30522}, "pad_token_id 30522 is beyond vocab_size 30522"),
    ],
)
def test_a_shape_that_is_no_bert_is_refused(values: dict[str, Any], words: str) -> None:
    message = refusal(BertConfig.from_dict, values)
    assert message.startswith(f"config.json: {words}")
    shape = BertConfig(hidden_size=24, num_hidden_layers=1)
    assert BertConfig.from_dict(shape.to_dict()) == shape and shape.to_dict()["model_type"] == "bert"

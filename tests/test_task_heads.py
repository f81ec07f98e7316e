"""Heads and pooling of one task: flags made from the task table, what they build, and runs that use them."""

from pathlib import Path

import pytest
import torch.nn.functional as F
from helpers import TINY, configure, make_batch, max_difference, metrics, model_options, randomise

import multitask_classifier
from bert import Linear
from cli.commands import command_of, config_of
from config import Config
from models.checkpoint import load_model
from models.heads import ResidualHead, pair_features
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS


def model_of(words: str) -> MultitaskBERT:
    """Return the tiny model of these flags with fresh weights."""
    config = configure(*words.split())
    return MultitaskBERT(config.model, TINY, DEFAULT_TASKS, config.tasks)


def build(words: str) -> MultitaskBERT:
    """Return a tiny model of these flags without dropout, whose every parameter is random."""
    model = model_of(f"{words} --hidden_dropout_prob 0").eval()
    randomise(model, 0)
    return model


def widths(model: MultitaskBERT, task: str) -> list[tuple[int, int]]:
    """Return (in, out) of the linear layers of a task's head."""
    return [
        (layer.in_features, layer.out_features) for layer in model.heads[task].modules() if isinstance(layer, Linear)
    ]


def test_heads_of_r3() -> None:
    """One linear layer for SST, two for Quora, one and a cosine for STS; experiment R10 changes the last two."""
    base = "--arch cosine --sst_clf linear"
    model = build(base)
    assert widths(model, "sst") == [(16, 5)] and widths(model, "para") == [(32, 16), (16, 1)]
    assert widths(model, "sts") == [(16, 16)]
    model = build(f"{base} --quora_clf linear --sts_head_layers 3")
    assert widths(model, "para") == [(32, 1)] and widths(model, "sts") == [(16, 16)] * 3
    assert not widths(build(f"{base} --sts_head_layers 0"), "sts")


def test_heads_of_r4() -> None:
    """l_SST, h_SST, l_PARA and h_PARA, which may all differ."""
    model = build("--arch r4 --sst_head_layers 3 --sst_head_width 7 --para_head_width 9")
    assert widths(model, "sst") == [(16, 7), (7, 7), (7, 7), (7, 5)]
    assert widths(model, "para") == [(48, 9), (9, 1)] and not widths(model, "sts")


def test_dropout_and_activation_of_one_task() -> None:
    words = "--arch v2 --sst_hidden_dropout_prob .5 --sts_output_dropout_prob .1 --sts_head_activation gelu"
    heads = model_of(words).heads
    rates = {task: [layer.p for layer in head.modules() if hasattr(layer, "p")] for task, head in heads.items()}
    assert rates == {"sst": [0.5, 0.5], "para": [0.3, 0.3], "sts": [0.3, 0.1]}
    assert [task for task, head in heads.items() if "GELU" in str(head)] == ["sts"]


def test_pooling_of_one_task() -> None:
    """The pooler serves the tasks that take first tokens, and is a parameter of these alone."""
    model = build("--arch v1 --sts_pooling mean")
    for task in DEFAULT_TASKS:
        batch = make_batch(model, task)
        other = "cls" if task == "sts" else "mean"
        backbone = model.backbone(task)
        assert max_difference(model.embed(task, batch), backbone.sentence_embedding(batch, model.pooling(task))) == 0
        assert max_difference(model.embed(task, batch), backbone.sentence_embedding(batch, other)) > 0.01
        reached = {id(parameter) for parameter in model.task_parameters(task)}
        assert (id(backbone.pooler_dense.weight) in reached) == (task != "sts")


@pytest.mark.parametrize(
    "words", ["--arch yin-yang --para_pair_encoding cross", "--arch v2 --sts_pair_encoding siamese"]
)
def test_pair_encoding_of_one_task(words: str) -> None:
    """Quora's pairs are joined and those of STS compared: each head has the outputs of a model with one encoding."""
    of_all = "--pair_layer none --clf mlp --head_layers 1"
    features = "--pair_features u,v,abs"
    model = build(f"{words} {of_all} {features}")
    assert model.pair_encodings()["para"] == "cross" and model.pair_encodings()["sts"] == "siamese"
    assert widths(model, "para") == [(16, 16), (16, 1)] and widths(model, "sts") == [(48, 16), (16, 1)]
    for task, encoding in (("para", "cross"), ("sts", "siamese")):
        alone = build(
            f"{words.split(' --')[0]} {of_all} --pair_encoding {encoding} {features if encoding == 'siamese' else ''}"
        )
        alone.backbone(task).load_state_dict(model.backbone(task).state_dict())
        alone.heads[task].load_state_dict(model.heads[task].state_dict())
        batch = make_batch(model, task)
        assert batch.num_sequences == (6 if encoding == "cross" else 12)
        assert max_difference(model(task, batch), alone(task, batch)) == 0


def test_residual_head_starts_as_the_cosine_and_learns_the_rest() -> None:
    model = model_of("--arch yin-yang --sts_head residual").eval()
    randomise(model.backbones, 0)
    batch = make_batch(model, "sts")
    u, v = model.embed("sts", batch).chunk(2)
    assert max_difference(model("sts", batch), 5 * F.cosine_similarity(u, v)) < 1e-6
    head = randomise(model.heads["sts"], 1, std=0.6)
    assert isinstance(head, ResidualHead)
    added = head.regression(pair_features(u, v, ("u", "v", "abs", "mul", "cos")))[:, 0]
    assert added.std() > 0.01
    assert max_difference(model("sts", batch), 5 * F.cosine_similarity(u, v) + added) < 1e-4
    assert model.uses_pair_layer("para") and not model.uses_pair_layer("sts")


def test_what_tasks_leave_out_is_that_of_all_tasks() -> None:
    """And what the arch says of a kind of head that only one task has."""
    config = configure("--clf", "linear", "--sts_clf", "conv", "--sst_clf", "mlp")
    assert (config.tasks["sts"].head_layers, config.tasks["sts"].head_batchnorm) == (1, True)
    assert (config.tasks["sst"].head_layers, config.tasks["sst"].head_batchnorm) == (1, None)
    assert config.tasks["para"].model_options() == {}
    plain = str(MultitaskBERT(model_options(), TINY, DEFAULT_TASKS))
    assert plain == str(model_of("")) == str(model_of("--clf linear --sst_clf conv --para_clf conv --sts_clf conv"))


@pytest.mark.parametrize(
    "words", ["--clf linear --sts_clf conv", "--sst_clf linear --no_sts_head_batchnorm --sts_pooling mean"]
)
def test_configurations_survive_files_and_command_lines(words: str) -> None:
    config = configure(*words.split())
    assert Config.from_dict(config.to_dict()) == config == config_of(command_of(config))
    for options in (saved := config.to_dict())["tasks"].values():
        for name in ("pooling", "clf", "head_layers"):
            del options[name]  # as before there were such options
    assert Config.from_dict(saved).tasks["para"] == config.tasks["para"]


def test_a_run_with_heads_of_each_kind(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that reads a pooling or a head takes the task's own: SMART, joint steps, micro batches, the checkpoint."""
    heads = "--arch cosine --sst_clf linear --pooling cls --sts_pooling mean --sts_head_layers 2 --para_head_layers 0"
    words = [*tiny_flags, *heads.split(), "--routine", "joint", "--pcgrad", "--sts_smart", "1", "--epochs", "1"]
    words += ["--micro_batch_size", "2", "--fine_tune_mode", "full-model", "--no_tensorboard"]
    multitask_classifier.main([*words, "--dry_run"])
    assert (
        "except --sst_clf linear, --para_head_layers 0, --sts_pooling mean, --sts_head_layers 2"
        in capsys.readouterr().out
    )
    multitask_classifier.main([*words, "--run_dir", str(tmp_path / "run")])
    best = tmp_path / "run" / "best.pt"
    model, _, config = load_model(best)
    assert (model.pooling("sst"), model.pooling("sts")) == ("cls", "mean")
    assert [len(widths(model, task)) for task in DEFAULT_TASKS] == [1, 1, 2]
    multitask_classifier.main(
        ["--evaluate", str(best), "--data_dir", config.data.data_dir, "--run_dir", str(tmp_path / "again")]
    )
    score = metrics(tmp_path / "run")[-1]["dev"]["score"]
    assert f"{score:.4f}" in capsys.readouterr().out

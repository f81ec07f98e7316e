"""Checkpoints: what is in them, what comes back, and refusals in one line of what is none or belongs elsewhere."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import changed, configure, copied, make_trainer, metrics, refusal
from torch import Tensor

from config import Config
from evaluation.predict import predict
from models.build import build_model
from models.checkpoint import load, load_model, load_model_state_dict, save
from tasks import DEFAULT_TASKS
from text.tokenizer import load_tokenizer
from training.trainer import Trainer


def types_in(value: Any) -> Iterator[type]:
    """Yield the types inside nested containers."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if parts is None:
        yield type(value)
    else:
        for part in parts:
            yield from types_in(part)


def test_a_checkpoint_holds_tensors_and_plain_containers(trained: Trainer) -> None:
    run = trained.checkpointer.run
    for path in (run.best, run.resume):
        content = torch.load(path, weights_only=True)
        assert set(types_in(content)) <= {str, int, float, bool, type(None), Tensor}
    best = load(run.best)
    assert set(best) == {
        "format", "weights", "config", "bert_config", "tasks", "tokenizer", "tokenizer_sha256", "scores",
        "git_commit", "versions", "seed", "epoch", "step", "base_sha256", "similarity_lines",
    }  # fmt: skip
    assert best["tasks"] == ["sst", "para", "sts"] and best["seed"] == 11711 and best["epoch"] == 1
    assert best["scores"] == metrics(run.path)[0]["dev"] and Config.from_dict(best["config"]) == trained.config
    assert best["git_commit"] is None or len(best["git_commit"].rstrip("+")) == 40
    assert not any(tensor.requires_grad for tensor in best["weights"].values())


def test_load_model_gives_the_same_outputs(trained: Trainer) -> None:
    model, tokenizer, config = load_model(trained.checkpointer.run.best)
    assert config == trained.config and tokenizer.max_length == 64
    assert tokenizer.sha256 == trained.checkpointer.tokenizer.sha256
    for data in trained.loader.dev.values():
        found, wanted = (predict(one, data, torch.device("cpu"), 8) for one in (model, trained.model))
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("arch", ["duality", "v2", "r4"])
def test_a_checkpoint_of_another_arch_is_refused(trained: Trainer, tiny_flags: list[str], arch: str) -> None:
    other, _ = build_model(configure(*tiny_flags, "--arch", arch), DEFAULT_TASKS, print)
    before, best = copied(other), trained.checkpointer.run.best
    message = refusal(load_model_state_dict, other, load(best)["weights"], best, set())
    assert "another arch" in message and "more" in message and str(best) in message and len(message) < 2000
    assert changed(before, copied(other)) == set()


def test_weights_that_do_not_fit_are_listed(trained: Trainer) -> None:
    weights = dict(load(trained.checkpointer.run.best)["weights"])
    weights["heads.mnli.bias"] = weights.pop("heads.para.2.bias")
    weights["pair_layer.dense.bias"] = torch.zeros(3)
    assert refusal(load_model_state_dict, trained.model, weights, Path("mine.pt"), set()) == (
        "mine.pt: the weights do not fit the model, another arch perhaps (1 missing: heads.para.2.bias; "
        "1 left over: heads.mnli.bias; 1 of the wrong shape: pair_layer.dense.bias is [3], not [64])"
    )


def spoil(path: Path, kind: str) -> None:
    """Replace a checkpoint by something that is none."""
    content = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "other tensors":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind != "missing":
        path.write_bytes(
            {
                "empty": b"",
                "first bytes lost": content[100:],
                "text": b"weights\n" * 50,
                "stop only": b".",
                "pickled class": pickle.dumps(Path("x")),
            }[kind]
        )


@pytest.mark.parametrize(
    "kind",
    ["missing", "empty", "first bytes lost", "text", "stop only", "pickled class", "other tensors", "a list",
     "a folder"],
)  # fmt: skip
def test_unreadable_checkpoints_are_refused_in_one_line(trained: Trainer, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.pt"
    shutil.copyfile(trained.checkpointer.run.best, path)
    spoil(path, kind)
    message = refusal(load_model, path)
    assert str(path) in message and "checkpoint" in message


@pytest.mark.parametrize("key", ["weights", "config", "bert_config", "tasks", "tokenizer"])
def test_checkpoints_with_a_part_missing_or_odd_are_refused(trained: Trainer, tmp_path: Path, key: str) -> None:
    content, path = load(trained.checkpointer.run.best), tmp_path / "odd.pt"
    odd = {"weights": {}, "config": {}, "bert_config": {"hidden_size": 31}, "tasks": ["mnli"], "tokenizer": "?"}
    save(path, {name: value for name, value in content.items() if name != key})
    assert "odd.pt" in refusal(load_model, path)
    save(path, {**content, key: odd[key]})
    assert "odd.pt" in refusal(load_model, path)


def test_a_tokenizer_that_does_not_fit_is_named(
    trained: Trainer, tiny_bert: Path, tiny_flags: list[str], tmp_path: Path
) -> None:
    """One with more words than the weights have, and one that is not that of the start weights."""
    content = load(trained.checkpointer.run.best)
    content["bert_config"]["vocab_size"] = 50
    for name, tensor in content["weights"].items():
        if name.endswith("word_embedding.weight"):
            content["weights"][name] = tensor[:50].clone()
    save(tmp_path / "few.pt", content)
    assert "words, its weights only 50" in refusal(load_model, tmp_path / "few.pt")
    cased = shutil.copytree(tiny_bert, tmp_path / "cased")
    (cased / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    flags = ["--pretrained", cased, "--init_from", trained.checkpointer.run.best]
    assert "was trained with another tokenizer" in refusal(make_trainer, tiny_flags, tmp_path / "run", *flags)


@pytest.mark.parametrize("kind", ["vocab.txt", "tokenizer.json"])
def test_adapters_of_before_other_files_counted_still_load(
    tiny_bert: Path, tiny_flags: list[str], tmp_path: Path, kind: str
) -> None:
    """They were trained with the tokens of vocab.txt or tokenizer.json alone."""
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    if kind == "tokenizer.json":
        load_tokenizer(base, 64).save(base)
    flags = ["--pretrained", base, "--lora_mode", "attn", "--epochs", 1, "--train_sst"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    trainer.fit()
    known = int(load_tokenizer(base, 64).encode(["the"]).input_ids[1])
    (base / "added_tokens.json").write_text(json.dumps({"the": known}))
    (base / "tokenizer_config.json").write_text('{"do_lower_case": false}' if kind == "tokenizer.json" else "{}")
    before, now = trainer.checkpointer.tokenizer.sha256, load_tokenizer(base, 64).sha256
    assert load_model(trainer.checkpointer.run.best)[1].sha256 == before != now
    (base / "vocab.txt").write_text((tiny_bert / "vocab.txt").read_text() + "more\n")
    (base / "tokenizer.json").unlink(missing_ok=True)
    assert "was trained with another tokenizer" in refusal(load_model, trainer.checkpointer.run.best)

"""What a model starts from: pretrained weights that fit, or a trained checkpoint (--init_from)."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    changed,
    configure,
    copied,
    hf_model,
    interrupted,
    make_bert,
    make_trainer,
    refusal,
    write_weights,
)

import multitask_classifier
from models.build import build_model
from models.checkpoint import load, load_model
from tasks import TASKS

State = dict[str, torch.Tensor]


def build(tiny_flags: list[str], *more: object) -> State:
    """Return the weights of the model that these flags build, without its data."""
    config = configure(*tiny_flags, *more)
    return build_model(config, {name: TASKS[name] for name in config.tasks}, print)[0].state_dict()


def train(tiny_flags: list[str], run: Path, *more: object) -> State:
    """Train for an epoch; return the weights of best.pt."""
    make_trainer(tiny_flags, run, "--epochs", 1, *more).fit()
    return load(run / "best.pt")["weights"]


def test_joined_pairs_need_two_token_types(tiny_flags: list[str], tmp_path: Path) -> None:
    folder = write_weights(tmp_path, copied(hf_model(config=(one := replace(TINY, type_vocab_size=1)))), one)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    flags = [*tiny_flags, "--pretrained", folder, "--max_length", 8, "--dry_run"]
    message = refusal(multitask_classifier.main, [*map(str, flags), "--pair_encoding", "cross"])
    assert "type_vocab_size 1" in message and "--pair_encoding siamese" in message
    multitask_classifier.main([*map(str, flags), "--pair_encoding", "siamese"])


def test_bad_start_weights_are_refused(tiny_flags: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    """No folder, a vocabulary that is larger than the weights, weights of another shape than config.json says."""
    folder = shutil.copytree(tiny_bert, tmp_path / "spoiled")
    flags = [*tiny_flags, "--pretrained", folder, "--run_dir", tmp_path / "run"]

    def message(*more: object) -> str:
        return refusal(multitask_classifier.main, [str(word) for word in [*flags, *more]])

    for name in (folder / "vocab.txt", "some/where/else", "./nowhere", "/no/where", "~/nowhere/at/all"):
        line = message("--pretrained", name)
        assert f"--pretrained {name}" in line and "folder" in line
    assert "--max_length 65" in message("--max_length", 65) and "64" in message("--max_length", 65)
    with (folder / "vocab.txt").open("a") as file:
        file.write("surplus\n")
    assert "--pretrained" in message() and "only" in message()
    other = make_bert(tmp_path / "other", num_hidden_layers=3, hidden_size=16)
    shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
    line = message()  # lists the first few tensors
    assert "left over" in line and "of the wrong shape" in line and "more" in line and len(line) < 3000
    assert not (tmp_path / "run").exists()


def test_a_trained_model_can_be_the_start_of_another(
    finished_runs: Path, tiny_flags: list[str], tmp_path: Path
) -> None:
    """The weights are taken to the bit, into another fine-tune mode; optimizers are fresh."""
    wanted = load(finished_runs / "yin" / "best.pt")["weights"]
    flags = ["--init_from", finished_runs / "yin" / "best.pt", "--fine_tune_mode", "last-layer"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    found = trainer.model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any(optimizer.state for optimizer in trainer.optimizers.by_name.values())
    trainer.fit()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], wanted[name]) for name in wanted if name.startswith("backbones."))
    assert any(not torch.equal(after[name], wanted[name]) for name in wanted if name.startswith("heads."))


@pytest.mark.parametrize(
    ("flags", "stage", "new"),
    [
        ("--backbones shared --pair_layer none", "--train_sst", "para, sts, whose heads are new"),
        ("--backbones shared", "--train_sst", "para, sts, whose heads and pair layer are new"),
        ("", "--train_sst", "para, sts, whose heads and pair layer are new, and backbone similarity"),
        ("", "--train_para", "sst, sts, whose heads are new, and backbone sentiment"),
        ("", "--train_sts --sts_weight 0 --sts_embedding_loss ranking", "sst, para, whose heads are new, and backbone"),
        (
            "--arch r4",
            "--train_sts --fine_tune_mode full-model",
            "sst, para, whose heads are new, and backbone sst and para",
        ),
    ],
)
def test_a_stage_on_one_task_before_all_of_them(
    tiny_flags: list[str], tmp_path: Path, capsys: Any, flags: str, stage: str, new: str
) -> None:
    """What the stage trained is taken; what the other tasks alone use is as in a run without a stage."""
    trained = train(tiny_flags, tmp_path / "stage", *flags.split(), *stage.split())
    capsys.readouterr()
    found = build(tiny_flags, *flags.split(), "--init_from", tmp_path / "stage" / "best.pt")
    assert f"knows nothing of {new}" in capsys.readouterr().out
    plain = build(tiny_flags, *flags.split())
    assert trained.keys() <= found.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, trained[name] if name in trained else plain[name]), name


def test_a_model_of_one_task_can_be_the_start_of_one_of_another(tiny_flags: list[str], tmp_path: Path) -> None:
    trained = train(tiny_flags, tmp_path / "stage", "--backbones", "shared", "--train_para")
    found = build(
        tiny_flags, "--backbones", "shared", "--train_sts", "--init_from", tmp_path / "stage" / "best.pt"
    )  # fmt: skip
    shared = [name for name in found if name.startswith(("backbones.shared.", "pair_layer.")) and name in trained]
    assert len(shared) > 30 and all(torch.equal(found[name], trained[name]) for name in shared)


def test_adapters_are_merged_into_the_start(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--arch", "v2", "--train_sst", "--fine_tune_mode", "full-model", "--lr", 1e-2]
    saved = train(tiny_flags, tmp_path / "lora", *flags, "--lora_mode", "all-lin", "--lora_rank", 3)
    assert all(tensor.any() for name, tensor in saved.items() if name.endswith("lora_B"))
    again = make_trainer(tiny_flags, tmp_path / "next", *flags, "--init_from", tmp_path / "lora" / "best.pt")
    model, _, _ = load_model(tmp_path / "lora" / "best.pt")
    batch = again.loader.train["sst"].batch(np.arange(9))
    torch.testing.assert_close(again.model.eval()("sst", batch), model.eval()("sst", batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("more", [["--lora_rank", 5], ["--lora_rank", 3, "--dora"], ["--lora_rank", 3]], ids=str)
def test_other_adapters_start_on_merged_ones_and_the_same_go_on(
    tiny_flags: list[str], tmp_path: Path, more: list[object]
) -> None:
    """The model computes what the checkpoint does, with fresh adapters unless it has the same ones."""
    flags = ["--arch", "v2", "--train_sst", "--fine_tune_mode", "full-model", "--lr", 1e-2, "--lora_mode", "all-lin"]
    saved = train(tiny_flags, tmp_path / "lora", *flags, "--lora_rank", 3)
    next_run = make_trainer(tiny_flags, tmp_path / "next", *flags, *more, "--init_from", tmp_path / "lora" / "best.pt")
    model, _, _ = load_model(tmp_path / "lora" / "best.pt")
    batch = next_run.loader.train["sst"].batch(np.arange(9))
    torch.testing.assert_close(next_run.model.eval()("sst", batch), model.eval()("sst", batch), rtol=0, atol=2e-6)
    found = next_run.model.state_dict()
    updates = [name for name in saved if name.endswith("lora_B")]
    if more == ["--lora_rank", 3]:
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    else:
        assert updates and not any(found[name].any() for name in updates)
    interrupted(next_run, 1)
    again = make_trainer(
        tiny_flags, tmp_path / "next", *flags, *more, "--init_from", tmp_path / "lora" / "best.pt", "--resume"
    )
    again.restore()
    assert changed(copied(next_run.model), copied(again.model)) == set()


def test_pals_may_be_new_but_not_left_over(tiny_flags: list[str], finished_runs: Path, tmp_path: Path) -> None:
    """Fresh ones change nothing; without trained ones the model would be another."""
    pal, plain = ["--pal", "low-rank", "--pal_low_rank_size", 6], finished_runs / "yin" / "best.pt"
    found, trained = build(tiny_flags, *pal, "--init_from", plain), load(plain)["weights"]
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
    new = {name for name in found if name not in trained}
    assert {name.split(".")[0] for name in new} == {"pals"}
    assert not any(found[name].any() for name in new if ".decoders." in name)
    train(tiny_flags, tmp_path / "pal", *pal)
    message = refusal(build, tiny_flags, "--init_from", tmp_path / "pal" / "best.pt")
    assert "--init_from" in message and " left over: pals.sst." in message


def test_another_arch_is_no_start(tiny_flags: list[str], finished_runs: Path) -> None:
    message = refusal(build, tiny_flags, "--init_from", finished_runs / "cross" / "best.pt")
    assert "--init_from" in message and "another arch" in message

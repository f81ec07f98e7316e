"""LoRA and DoRA through the scripts: what trains, what a checkpoint holds, and what others make of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from test_training import assert_resumes, make_trainer, metrics

import ensemble
import multitask_classifier
from lora import adapter_state_dict, base_state_dict
from models.checkpoint import load, load_model
from utils.errors import UserError

ADAPTERS = ["--lora_rank", "2"]


@pytest.mark.parametrize("mode", ["attn", "attn-only", "all-lin", "all-lin-only"])
@pytest.mark.parametrize("fine_tune_mode", ["last-layer", "full-model", "iterative"])
@pytest.mark.parametrize("dora", [False, True])
def test_only_what_may_train_changes(
    tiny_flags: list[str], tmp_path: Path, mode: str, fine_tune_mode: str, dora: bool
) -> None:
    flags = ["--lora_mode", mode, *ADAPTERS, "--fine_tune_mode", fine_tune_mode, "--epochs", "5", "--no_tensorboard"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, *(["--dora"] if dora else []))
    model = trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.fit()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    frozen = model.frozen_parameter_names(fine_tune_mode)
    assert frozen and not changed & frozen
    assert {name.split(".")[1] for name in changed if name.startswith("heads.")} == set(model.tasks)
    for name, backbone in model.backbones.items():
        assert {f"backbones.{name}.{own}" for own in adapter_state_dict(backbone)} <= changed
        rest = {f"backbones.{name}.{own}" for own in base_state_dict(backbone)} - frozen
        assert bool(rest) == (mode in ("attn", "all-lin") and fine_tune_mode != "last-layer")
        assert not rest or rest & changed


def test_adapters_wait_for_their_layer_under_iterative_unfreezing(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--lora_mode", "attn-only", *ADAPTERS)
    model = trainer.model
    for command, always, layers in (
        ("freezeall", False, set()),
        ("unfreezetop1", False, {"1"}),
        ("unfreezeall", False, {"0", "1"}),
        ("freezeall", True, {"0", "1"}),
    ):
        model.manage_freezing(command, adapters_always=always)
        trained = {n for n, p in model.backbones.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        assert {name.split(".")[2] for name in trained} == layers


@pytest.fixture
def adapted(tiny_flags: list[str], tmp_path: Path) -> Path:
    """best.pt of a finished run with DoRA."""
    run = tmp_path / "adapted"
    flags = ["--lora_dict", '{"mode": "attn-only", "r": 2, "dora": 1}', "--run_dir", str(run), "--epochs", "1"]
    multitask_classifier.main([*tiny_flags, *flags, "--fine_tune_mode", "full-model", "--lr", "1e-2"])
    return run / "best.pt"


def test_a_checkpoint_holds_what_was_trained_and_no_more(adapted: Path) -> None:
    content = load(adapted)
    names = set(content["weights"])
    model, _, _ = load_model(adapted)
    wanted = {f"backbones.{name}.{own}" for name, b in model.backbones.items() for own in adapter_state_dict(b)}
    heads = {name for name in model.state_dict() if not name.startswith("backbones.")}
    assert names == wanted | heads
    assert content["tokenizer"] is None  # it stands beside the base weights, which are needed anyway
    trained = sum(tensor.numel() * tensor.element_size() for tensor in content["weights"].values())
    overhead = 512 * len(names) + 20_000  # names and alignment of the container: much here, nothing beside a real BERT
    assert adapted.stat().st_size <= trained + overhead


@pytest.mark.parametrize("flags", [["--lora_mode", "attn-only"], ["--lora_mode", "all-lin-only", "--dora"]])
def test_an_adapter_checkpoint_is_as_large_as_what_was_trained(
    tiny_flags: list[str], tmp_path: Path, minilm: Path, flags: list[str]
) -> None:
    """Adapters and heads of a real model, to 2%."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--pretrained", minilm, "--lora_rank", 8, *flags)
    trainer.model.manage_freezing("unfreezeall", adapters_always=False)
    trainer.save_best({})
    trained = 4 * sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trained += sum(own.numel() * own.element_size() for own in trainer.model.heads.buffers())  # of the batch norms
    pair_layer = trainer.model.pair_layer
    assert pair_layer is not None
    trained += sum(own.numel() * own.element_size() for own in pair_layer.buffers())
    assert trained <= trainer.run.best.stat().st_size <= 1.02 * trained


def test_another_tokenizer_beside_the_base_weights_is_refused(adapted: Path, tiny_bert: Path) -> None:
    words = tiny_bert / "vocab.txt"
    kept = words.read_text()
    first, second, *rest = kept.splitlines()[5:]
    try:
        words.write_text("\n".join([*kept.splitlines()[:5], second, first, *rest]) + "\n")
        with pytest.raises(UserError, match="another tokenizer"):
            load_model(adapted)
    finally:
        words.write_text(kept)
    load_model(adapted)


def test_evaluation_of_a_checkpoint_gives_the_scores_of_its_run(
    adapted: Path, tiny_flags: list[str], small_data: Path
) -> None:
    multitask_classifier.main(["--evaluate", str(adapted), "--data_dir", str(small_data)])
    found = json.loads((adapted.parent / "best-evaluation" / "scores.json").read_text())["dev"]
    assert found == json.loads((adapted.parent / "scores.json").read_text())["dev"]
    run = adapted.parent / "ensemble"
    cache = ["--cache", str(adapted.parent / "cache")]
    ensemble.main([str(adapted), "--data_dir", str(small_data), "--run_dir", str(run), *cache])
    assert json.loads((run / "scores.json").read_text())["dev"]["score"] == pytest.approx(found["score"])


def test_other_base_weights_are_refused(adapted: Path, tiny_bert: Path) -> None:
    weights = tiny_bert / "model.safetensors"
    kept = weights.read_bytes()
    other = bytearray(kept)
    other[-3] ^= 0x01
    try:
        weights.write_bytes(other)
        with pytest.raises(UserError, match="trained on other base weights"):
            load_model(adapted)
    finally:
        weights.write_bytes(kept)
    load_model(adapted)


def hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """transformers' last hidden state without dropout."""
    with torch.no_grad():
        return model.eval()(ids).last_hidden_state


def test_peft_and_transformers_read_what_is_exported(adapted: Path, tiny_bert: Path) -> None:
    out = adapted.parent / "exported"
    multitask_classifier.main(
        ["--evaluate", str(adapted), "--export", str(out / "merged"), "--export_peft", str(out / "peft")]
    )
    model, _, _ = load_model(adapted)
    ids = torch.randint(5, 90, (3, 9))
    bert: Any = transformers.BertModel
    for name, backbone in model.backbones.items():
        with torch.no_grad():
            wanted = backbone.eval()(ids, torch.ones_like(ids))["last_hidden_state"]
        merged = hidden(bert.from_pretrained(out / "merged" / name), ids)
        torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=0)
        adapters = peft.PeftModel.from_pretrained(bert.from_pretrained(tiny_bert), out / "peft" / name)
        torch.testing.assert_close(hidden(adapters, ids), wanted, atol=1e-5, rtol=0)
        assert (hidden(bert.from_pretrained(tiny_bert), ids) - wanted).abs().max() > 1e-3


def test_a_run_can_start_from_an_adapter_of_peft(tiny_flags: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    """peft itself makes the adapter: what it computes is what our run starts from, and its checkpoint stands alone."""
    bert: Any = transformers.BertModel
    for dora in (False, True):
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"], use_dora=dora)
        theirs = peft.get_peft_model(bert.from_pretrained(tiny_bert), config)
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.3)
        folder = tmp_path / f"peft-{dora}"
        theirs.save_pretrained(folder)
        flags = [*tiny_flags, "--init_peft", str(folder), "--no_tensorboard"]
        trainer = make_trainer(flags, tmp_path / f"run-{dora}")
        ids = torch.randint(5, 90, (3, 9))
        for backbone in trainer.model.eval().backbones.values():
            with torch.no_grad():
                ours = backbone(ids, torch.ones_like(ids))["last_hidden_state"]
            torch.testing.assert_close(ours, hidden(theirs, ids), atol=1e-5, rtol=0)
        trainer.fit()
        multitask_classifier.main([*flags, "--run_dir", str(tmp_path / f"run-{dora}"), "--resume"])  # to its scores
        folder.rename(tmp_path / f"moved-{dora}")
        load_model(tmp_path / f"run-{dora}" / "best.pt")


def test_adapters_are_exported_only_where_nothing_else_trained(tiny_flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--lora_mode", "attn", "--fine_tune_mode", "full-model", "--epochs", "1", "--run_dir", str(run)]
    multitask_classifier.main([*tiny_flags, *flags])
    with pytest.raises(UserError, match="--export_peft.*--export"):
        multitask_classifier.main(["--evaluate", str(run / "best.pt"), "--export_peft", str(tmp_path / "peft")])


def test_resuming_goes_on_bit_for_bit(tiny_flags: list[str], tmp_path: Path) -> None:
    assert_resumes(tiny_flags, tmp_path, "--lora_mode", "all-lin", "--dora", *ADAPTERS, "--epochs", "4", after=2)


def test_a_state_leaves_out_the_weights_that_only_the_start_weights_decide(
    tiny_flags: list[str], tiny_bert: Path, tmp_path: Path
) -> None:
    """It is for the very start weights that the run began with; with others it is refused."""
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    flags = ["--lora_mode", "attn-only", *ADAPTERS, "--pretrained", str(base), "--fine_tune_mode", "full-model"]
    flags += ["--epochs", "2", "--no_tensorboard"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    trainer.out_of_patience = lambda: trainer.epoch >= 1  # type: ignore[method-assign]
    trainer.fit()
    named, saved = dict(trainer.model.named_parameters()), load(tmp_path / "run" / "resume.pt")["weights"]
    trains = {name for name, own in named.items() if own.requires_grad}
    assert {name for name in named if name in saved} == trains and len(trains) < len(named) / 2
    weights = safetensors.torch.load_file(base / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] += 1
    safetensors.torch.save_file(weights, base / "model.safetensors", {"format": "pt"})
    other = make_trainer(tiny_flags, tmp_path / "run", *flags, "--resume")
    with pytest.raises(UserError, match="resume.pt: its adapters were trained on other base weights"):
        other.fit()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "4"], "--lora_rank needs adapters"),
        (["--dora"], "--dora needs adapters"),
        (["--lora_dict", '{"mode": "attn", "r": 1}', "--lora_rank", "4"], "--lora_dict.*--lora_rank"),
        (["--lora_mode", "attn", "--dora_norm", "column"], "--dora_norm.*--dora"),
        (["--lora_dict", "{mode: attn}"], "--lora_dict.*JSON"),
        (["--lora_dict", '{"mode": "attn", "rank": 1}'], "unknown key 'rank'"),
    ],
)
def test_bad_adapter_flags(tiny_flags: list[str], flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        multitask_classifier.main([*tiny_flags, *flags, "--dry_run"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--lora_mode attn-only", ["the heads train", "the heads and the adapters of the top 1 layer train"]),
        ("--lora_mode attn-only --fine_tune_mode full-model", ["the heads and all adapters train"] * 2),
        ("--lora_mode attn --fine_tune_mode last-layer", ["the heads and all adapters train"] * 2),
        (
            "--lora_mode attn --fine_tune_mode full-model",
            ["everything trains, of layers with adapters only those"] * 2,
        ),
        (
            "--lora_mode attn-only --fine_tune_mode last-layer --pal low-rank --pal_low_rank_size 6",
            ["the heads and PALs and all adapters train"] * 2,
        ),
        ("--pal low-rank --pal_low_rank_size 6 --fine_tune_mode last-layer", ["the heads and PALs train"] * 2),
    ],
)
def test_what_trains_is_told(tiny_flags: list[str], tmp_path: Path, flags: str, told: list[str]) -> None:
    make_trainer(tiny_flags, tmp_path / "run", *flags.split(), "--epochs", 2).fit()
    assert [line["trains"] for line in metrics(tmp_path / "run")] == told


def test_the_plan_counts_adapters(tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    multitask_classifier.main(
        [*tiny_flags, "--lora_mode", "attn-only", "--lora_rank", "3", "--fine_tune_mode", "full-model", "--dry_run"]
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = [line for line in lines if line[:2] == ["adapters", "sentiment"]]
    count = 2 * 3 * 3 * (32 + 32)  # layers x (query, key, value) x rank x (in + out)
    assert row[2:] == [f"{count:,}", f"{count:,}", "100.0%"]
    (row,) = [line for line in lines if line[:2] == ["backbone", "sentiment"]]
    assert row[3] == "0"

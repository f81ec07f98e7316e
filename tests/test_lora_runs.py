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
from helpers import refusal

import multitask_classifier
from base_bert import load_weights
from lora import adapter_state_dict, base_state_dict
from models.checkpoint import load, load_model
from training.run_directory import RunDirectory
from utils.errors import UserError


def run(flags: list[str], folder: Path, *more: object) -> Path:
    """Train without TensorBoard and return the checkpoint."""
    multitask_classifier.main([*flags, "--no_tensorboard", "--run_dir", str(folder), *map(str, more)])
    return folder / "best.pt"


@pytest.mark.parametrize("mode", ["attn", "attn-only", "all-lin", "all-lin-only"])
@pytest.mark.parametrize("fine_tune_mode", ["last-layer", "full-model", "iterative"])
def test_only_what_may_train_changes_and_is_saved(
    tiny_flags: list[str], tiny_bert: Path, tmp_path: Path, mode: str, fine_tune_mode: str
) -> None:
    dora = ["--dora"] * (mode == "all-lin")
    more = ["--lora_mode", mode, "--lora_rank", "2", "--fine_tune_mode", fine_tune_mode, "--epochs", "5", *dora]
    best = run(tiny_flags, tmp_path / "run", *more)
    model, _, config = load_model(best)
    content, pretrained = load(best), load_weights(tiny_bert, model.bert_config)
    saved, frozen = set(content["weights"]), model.frozen_parameter_names(config.train)
    assert frozen and saved == model.state_dict().keys() - frozen
    assert content["tokenizer"] is None  # it stands beside the base weights, which are needed anyway
    for name, backbone in model.backbones.items():
        base = base_state_dict(backbone)
        changed = {f"backbones.{name}.{key}" for key in base if not torch.equal(base[key], pretrained[key])}
        assert not changed & frozen
        assert bool(changed) == (mode in ("attn", "all-lin") and fine_tune_mode != "last-layer")
        assert all(tensor.any() for key, tensor in adapter_state_dict(backbone).items() if key.endswith("lora_B"))
    trained = sum(tensor.nbytes for tensor in content["weights"].values())
    assert best.stat().st_size <= trained + 512 * len(saved) + 20_000  # names and alignment


@pytest.fixture
def adapted(tiny_flags: list[str], tiny_bert: Path, tmp_path: Path) -> Path:
    """best.pt of a finished run with DoRA, with its base weights in a folder beside it."""
    shutil.copytree(tiny_bert, tmp_path / "base")
    more = ["--lora_dict", '{"mode": "attn-only", "r": 2, "dora": 1}', "--pretrained", tmp_path / "base"]
    return run(tiny_flags, tmp_path / "run", *more, "--epochs", 1, "--fine_tune_mode", "full-model", "--lr", "1e-2")


def test_other_base_weights_or_another_tokenizer_are_refused(adapted: Path) -> None:
    base = adapted.parent.parent / "base"
    load_model(adapted)
    weights, words = base / "model.safetensors", base / "vocab.txt"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-3] + bytes([kept[-3] ^ 1]) + kept[-2:])
    assert "trained on other base weights" in refusal(load_model, adapted)
    weights.write_bytes(kept)
    *special, first, second = (lines := words.read_text().splitlines())[:7]
    words.write_text("\n".join([*special, second, first, *lines[7:]]) + "\n")
    assert "another tokenizer" in refusal(load_model, adapted)


def test_evaluation_of_a_checkpoint_gives_the_scores_of_its_run(adapted: Path, small_data: Path) -> None:
    multitask_classifier.main(["--evaluate", str(adapted), "--data_dir", str(small_data)])
    found = json.loads((adapted.parent / "best-evaluation" / "scores.json").read_text())["dev"]
    assert found == json.loads((adapted.parent / "scores.json").read_text())["dev"]


def hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the last hidden state without dropout, of our model or transformers'."""
    with torch.no_grad():
        return model.eval()(ids, torch.ones_like(ids))["last_hidden_state"]


def test_peft_and_transformers_read_what_is_exported(adapted: Path) -> None:
    out, base = adapted.parent / "exported", adapted.parent.parent / "base"
    flags = ["--export", str(out / "merged"), "--export_peft", str(out / "peft")]
    multitask_classifier.main(["--evaluate", str(adapted), *flags])
    ids = torch.randint(5, 90, (3, 9))
    bert: Any = transformers.BertModel
    for name, backbone in load_model(adapted)[0].backbones.items():
        wanted = hidden(backbone, ids)
        merged = bert.from_pretrained(out / "merged" / name)
        torch.testing.assert_close(hidden(merged, ids), wanted, atol=1e-5, rtol=0)
        adapters = peft.PeftModel.from_pretrained(bert.from_pretrained(base), out / "peft" / name)
        torch.testing.assert_close(hidden(adapters, ids), wanted, atol=1e-5, rtol=0)
        auto = peft.AutoPeftModelForFeatureExtraction.from_pretrained(out / "peft" / name)  # finds the base by itself
        torch.testing.assert_close(hidden(auto, ids), wanted, atol=1e-5, rtol=0)
        assert (hidden(bert.from_pretrained(base), ids) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_a_run_can_start_from_an_adapter_of_peft(
    tiny_flags: list[str], tiny_bert: Path, tmp_path: Path, dora: bool
) -> None:
    """Its checkpoint needs that adapter no more. The learning rate is so small that it computes the same."""
    bert: Any = transformers.BertModel
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"], use_dora=dora)
    theirs = peft.get_peft_model(bert.from_pretrained(tiny_bert), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.3)
    theirs.save_pretrained(tmp_path / "peft")
    best = run(tiny_flags, tmp_path / "run", "--init_peft", tmp_path / "peft", "--lr", "1e-12", "--epochs", 1)
    shutil.rmtree(tmp_path / "peft")
    ids = torch.randint(5, 90, (3, 9))
    for backbone in load_model(best)[0].backbones.values():
        torch.testing.assert_close(hidden(backbone, ids), hidden(theirs, ids), atol=1e-5, rtol=0)


def test_adapters_are_exported_only_where_nothing_else_trained(tiny_flags: list[str], tmp_path: Path) -> None:
    best = run(tiny_flags, tmp_path / "run", "--lora_mode", "attn", "--fine_tune_mode", "full-model", "--epochs", "1")
    with pytest.raises(UserError, match="--export_peft.*--export"):
        multitask_classifier.main(["--evaluate", str(best), "--export_peft", str(tmp_path / "peft")])


def test_adapters_on_weights_of_another_run(tiny_flags: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    """Nothing is left out of the checkpoint, since no folder has what the adapters are on (R4, figure 6)."""
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    flags = [*tiny_flags, "--pretrained", str(base), "--epochs", "1", "--fine_tune_mode", "full-model"]
    stage = run(flags, tmp_path / "stage", "--lr", "1e-2")
    more = ["--init_from", stage, "--lora_mode", "attn-only", "--lora_rank", 2, "--dora"]
    best = run(flags, tmp_path / "run", *more)
    shutil.rmtree(base)
    stage.unlink()
    model, tokenizer, _ = load_model(best)
    assert load(best)["weights"].keys() == model.state_dict().keys() and tokenizer.max_length == 64
    assert any(tensor.any() for name, tensor in model.state_dict().items() if name.endswith("lora_B"))
    multitask_classifier.main(["--evaluate", str(best), "--export", str(tmp_path / "merged")])
    with pytest.raises(UserError, match="--export_peft.*--init_from.*--export"):
        multitask_classifier.main(["--evaluate", str(best), "--export_peft", str(tmp_path / "peft")])
    assert "--pretrained" in refusal(load_model, best, None, str(base))


def test_a_state_is_for_the_start_weights_that_it_leaves_out(
    tiny_flags: list[str], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_bert, base)
    flags = [*tiny_flags, "--lora_mode", "attn-only", "--pretrained", str(base), "--fine_tune_mode", "full-model"]
    monkeypatch.setattr(RunDirectory, "drop_states", lambda self: None)
    best = run(flags, folder)
    assert load(folder / "resume.pt")["weights"].keys() == load(best)["weights"].keys()
    (folder / "scores.json").unlink()  # as if the run had been stopped
    weights = safetensors.torch.load_file(base / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] += 1
    safetensors.torch.save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert "another content of --pretrained" in refusal(run, flags, folder, "--resume")

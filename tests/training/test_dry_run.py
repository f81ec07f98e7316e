"""--dry_run's estimates, against what a run writes and keeps."""

from pathlib import Path

import pytest
import torch
from conftest import make_bert
from test_training import make_trainer
from torch import Tensor

from training.dry_run import checkpoint_bytes, describe, described_cache, memory_bytes, optimizer_bytes, smart_cost
from utils.device import Device, process_peak

MODES = {
    "everything": ["--fine_tune_mode", "full-model"],
    "one optimizer for all": ["--fine_tune_mode", "full-model", "--routine", "joint"],
    "heads": ["--fine_tune_mode", "last-layer"],
    "up to half of the layers": ["--fine_tune_mode", "iterative", "--epochs", 3],
    "adapters and heads": ["--lora_mode", "attn-only", "--fine_tune_mode", "full-model"],
    "one state for each weight": ["--fine_tune_mode", "full-model", "--optim", "SGD"],
    "two averages": ["--fine_tune_mode", "full-model", "--optim", "SGD", "--average", "ema", "--sts_bregman", 1],
}


@pytest.mark.parametrize("mode", MODES)
def test_what_a_run_saves_and_keeps(tiny_flags: list[str], tmp_path: Path, mode: str) -> None:
    bert = make_bert(tmp_path / "bert", hidden_size=128, num_attention_heads=4, intermediate_size=512)
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--pretrained", bert, *MODES[mode])
    estimates = checkpoint_bytes(trainer.model, trainer.config), optimizer_bytes(trainer.model, trainer.config)
    trainer.fit()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "run").glob("*.pt")}
    assert len(sizes) == 3
    most = sum(sizes.values()) + sizes["resume.pt"]
    assert most < estimates[0] < 1.2 * most + (1 << 20)
    states = [own for one in trainer.optimizers.values() for kept in one.state.values() for own in kept.values()]
    kept = sum(own.nbytes for own in states if isinstance(own, Tensor))
    assert kept <= estimates[1] < 1.1 * kept


def test_what_does_not_train_takes_no_memory(tiny_flags: list[str], tmp_path: Path) -> None:
    """Gradients, states and activations."""
    need = {}
    for mode, flags in MODES.items():
        trainer = make_trainer(tiny_flags, tmp_path / mode, *flags)
        need[mode] = memory_bytes(trainer.model, trainer.config, trainer.train_data)
    weights = 4 * sum(own.numel() for own in trainer.model.parameters())
    assert need["heads"] > weights
    assert need["everything"] > need["up to half of the layers"] > need["heads"]
    assert need["everything"] > need["adapters and heads"] > need["heads"]
    assert need["everything"] > max(need["one optimizer for all"], need["one state for each weight"])
    assert need["two averages"] == pytest.approx(need["one state for each weight"] + 2 * weights, rel=0.01)


@pytest.mark.parametrize("mode", ["last-layer", "iterative"])
def test_what_is_kept_of_frozen_layers_is_counted(tiny_flags: list[str], tmp_path: Path, mode: str) -> None:
    """What the plan says of it in advance is what a run makes room for in its first epoch."""
    flags = ["--cache_frozen", "--fine_tune_mode", mode, "--epochs", 3]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    assert trainer.frozen is not None
    frozen = {"train": trainer.frozen.train, "dev": trainer.frozen.dev}
    splits = {split: {name: own.data for name, own in by_task.items()} for split, by_task in frozen.items()}
    estimate, lines = described_cache(trainer.config, trainer.model, splits, trainer.device)
    text = describe(trainer.config, trainer.model, splits, trainer.device)
    assert len(lines) == 1 and lines[0] in text
    trainer.model.freeze_for_epoch(trainer.config.train, 0)
    trainer.frozen.begin_epoch(trainer.steps_of(0))
    kept = [own.values for data in trainer.frozen.all for own in data.kept.values()]
    assert estimate == sum(own.nbytes for own in kept) > 0
    without = memory_bytes(trainer.model, trainer.config, splits["train"])
    weights = 4 * sum(own.numel() for own in trainer.model.parameters())
    whole = process_peak() - weights + without + estimate  # the program and its libraries too
    assert float(text.split("estimated memory ")[1].split(" GB")[0]) == pytest.approx(whole / 1e9, abs=0.02)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_the_passes_of_smart_are_those_of_a_step(
    tiny_flags: list[str], tmp_path: Path, amp: torch.dtype | None, steps: int
) -> None:
    """Of its own: the loss needs one pass in any case."""
    flags = ["--train_sst", "--sst_smart", 1, "--smart_steps", steps]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, device=Device(torch.device("cpu"), amp))
    calls: list[None] = []
    trainer.model.backbone("sst").bert_layers[0].register_forward_hook(lambda *given: calls.append(None))
    trainer.model.freeze_for_epoch(trainer.config.train, 0)
    trainer.model.train()
    trainer.train_step(trainer.steps_of(0)[0], False)
    [line] = smart_cost(trainer.config, trainer.model, trainer.device)
    assert f": {len(calls) - 1} more passes forward and back a batch" in line


def test_processes_share_a_batch_and_shards_all_of_it(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--fine_tune_mode", "full-model")
    one, four = (memory_bytes(trainer.model, trainer.config, trainer.train_data, number) for number in (1, 4))
    kept = 4 * sum(own.numel() for own in trainer.model.parameters())
    assert kept < four < one < 4 * four
    trainer.config.run.fsdp = True
    assert memory_bytes(trainer.model, trainer.config, trainer.train_data, 4) == pytest.approx(one / 4, abs=1)

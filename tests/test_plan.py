"""--dry_run's estimates, against what a run writes and keeps."""

from pathlib import Path

import pytest
from conftest import make_bert
from test_training import make_trainer
from torch import Tensor

from training.plan import checkpoint_bytes, memory_bytes, optimizer_bytes

MODES = {
    "everything": ["--fine_tune_mode", "full-model"],
    "one optimizer for all": ["--fine_tune_mode", "full-model", "--routine", "joint"],
    "heads": ["--fine_tune_mode", "last-layer"],
    "up to half of the layers": ["--fine_tune_mode", "iterative", "--epochs", 3],
    "adapters and heads": ["--lora_mode", "attn-only", "--fine_tune_mode", "full-model"],
    "one state for each weight": ["--fine_tune_mode", "full-model", "--optim", "SGD"],
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

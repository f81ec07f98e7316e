"""--dry_run's estimates, against what a run writes and keeps."""

from pathlib import Path

import pytest
import torch
from helpers import make_bert, make_ready, make_trainer, steps_of
from torch import Tensor

from datasets import Examples, TaskData
from tasks import DEFAULT_TASKS, SST
from training.dry_run import checkpoint_bytes, describe, memory_bytes, memory_line, optimizer_bytes, smart_cost
from training.trainer import Trainer
from utils.device import Device, process_peak

ONE_OPTIMIZER = ["--optimizers", "one"]
ONE_OPTIMIZER += [f"--{task}_{name}=1" for task in DEFAULT_TASKS for name in ("lr_multiplier", "weight_decay")]
MODES = {
    "everything": ["--fine_tune_mode", "full-model"],
    "joint steps": ["--fine_tune_mode", "full-model", "--routine", "joint"],
    "one optimizer for all": ["--fine_tune_mode", "full-model", *ONE_OPTIMIZER],
    "one task of three": ["--fine_tune_mode", "full-model", "--num_para_trains", 0, "--num_sts_trains", 0],
    "heads": ["--fine_tune_mode", "last-layer"],
    "up to half of the layers": ["--fine_tune_mode", "iterative", "--epochs", 3],
    "adapters and heads": ["--lora_mode", "attn-only", "--fine_tune_mode", "full-model"],
    "one state for each weight": ["--fine_tune_mode", "full-model", "--optim", "SGD"],
    "two averages": ["--fine_tune_mode", "full-model", "--optim", "SGD", "--average", "ema", "--sts_bregman", 1],
}


def weights_of(trainer: Trainer) -> int:
    """Return the bytes of a trainer's weights."""
    return sum(parameter.nbytes for parameter in trainer.model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_what_a_run_saves_and_keeps(tiny_flags: list[str], tmp_path: Path, mode: str) -> None:
    bert = make_bert(tmp_path / "bert", hidden_size=128, num_attention_heads=4, intermediate_size=512)
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--pretrained", bert, *MODES[mode])
    disk, states = checkpoint_bytes(trainer.model, trainer.config), optimizer_bytes(trainer.model, trainer.config)
    trainer.fit()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "run").glob("*.pt")}
    most = sum(sizes.values()) + sizes["resume.pt"]
    assert len(sizes) == 3 and most < disk < 1.2 * most + (1 << 20)
    values = [
        value for o in trainer.optimizers.by_name.values() for state in o.state.values() for value in state.values()
    ]
    kept = sum(value.nbytes for value in values if isinstance(value, Tensor))
    assert kept <= states < 1.1 * kept


def test_what_does_not_train_takes_no_memory(tiny_flags: list[str], tmp_path: Path) -> None:
    """Gradients, states and activations; several processes share activations, and parts of a batch have few."""
    need = {}
    for mode, flags in MODES.items():
        trainer = make_trainer(tiny_flags, tmp_path / mode, *flags)
        need[mode], four = (memory_bytes(trainer.model, trainer.config, trainer.loader.examples, n) for n in (1, 4))
        weights = weights_of(trainer)
        assert weights < four <= need[mode] < 4 * four
    assert need["everything"] > need["up to half of the layers"] > need["heads"]
    assert need["everything"] > need["adapters and heads"] > need["heads"]
    assert need["everything"] > max(need["one optimizer for all"], need["one state for each weight"])
    assert need["joint steps"] == need["one optimizer for all"]
    parts = make_trainer(tiny_flags, tmp_path / "parts", *MODES["everything"], "--micro_batch_size", 2)
    assert memory_bytes(parts.model, parts.config, parts.loader.examples) < need["everything"]
    assert need["two averages"] == pytest.approx(need["one state for each weight"] + 2 * weights, rel=0.01)


def test_memory_is_that_of_the_largest_batch(tiny_flags: list[str], tmp_path: Path) -> None:
    """With as many tokens in all, but in longer texts, a batch of 8 takes more."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", *MODES["everything"], "--train_sst")

    def need(words: list[int]) -> int:
        texts = ["." * n for n in words]
        examples = Examples(SST, "train", Path("x"), texts, (texts,), None)
        data = TaskData(examples, trainer.checkpointer.tokenizer, "siamese")
        assert data.lengths.tolist() == [n + 2 for n in words]
        return memory_bytes(trainer.model, trainer.config, {"sst": data})

    values, scores = 34 * 32 * (21 - 12), 2 * (21**2 - 12**2)  # of a text in one layer, 32 wide with 2 heads
    assert need([1] * 8 + [19] * 8) - need([10] * 16) == 2 * 8 * (4 * values + 5 * scores)


def test_each_further_pass_of_a_batch_takes_memory(tiny_flags: list[str], tmp_path: Path) -> None:
    def activations(*flags: object) -> int:
        trainer = make_trainer(tiny_flags, tmp_path / str(flags), *MODES["everything"], "--train_sst", *flags)
        need = memory_bytes(trainer.model, trainer.config, trainer.loader.examples)
        return need - 2 * weights_of(trainer) - optimizer_bytes(trainer.model, trainer.config)

    one, second = activations(), ["--sst_embedding_loss", "simcse"]
    for flags in (second, ["--sst_rdrop", 1], ["--sst_smart", 1]):
        assert activations(*flags) == pytest.approx(2 * one, abs=2)
    assert activations(*second, "--sst_rdrop", 1, "--sst_smart", 1) == pytest.approx(4 * one, abs=4)


def test_free_memory_stands_beside_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(torch.device("cpu"))
    line = memory_line(10**6, device, 1)
    assert "estimated memory 0.00 GB with the largest batch" in line and line.endswith(" GB")
    monkeypatch.setattr(Device, "free_memory", lambda self: 10**9)
    line = memory_line(20 * 10**12, device, 2)
    assert "20000.00 GB a process" in line and "free on this cpu 1.00 GB, which is less: lower --batch_size" in line


@pytest.mark.parametrize("mode", ["last-layer", "iterative"])
def test_cached_features_are_counted(tiny_flags: list[str], tmp_path: Path, mode: str) -> None:
    """What is said of them in advance is what a run makes room for in its first epoch."""
    flags = ["--cache_frozen", "--fine_tune_mode", mode, "--epochs", 3]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    cache = trainer.loader.feature_cache
    assert cache is not None
    splits = {
        split: {task: cached.data for task, cached in by_task.items()}
        for split, by_task in {"train": cache.train, "dev": cache.dev}.items()
    }
    text = describe(trainer.config, trainer.model, splits, trainer.device)
    estimate = float(text.split("estimated memory ")[1].split(" GB")[0])
    trainer.freeze(0)
    trainer.loader.begin_epoch(steps_of(trainer), 0, 0)
    assert cache.taken() > 0 and cache.describe() in text
    without = memory_bytes(trainer.model, trainer.config, splits["train"])
    whole = process_peak() - weights_of(trainer) + without + cache.taken()  # the program and its libraries too
    assert estimate == pytest.approx(whole / 1e9, abs=0.02)


@pytest.mark.parametrize(("steps", "amp"), [(0, None), (1, None), (3, torch.bfloat16)])
def test_the_passes_of_smart_are_those_of_a_step(
    tiny_flags: list[str], tmp_path: Path, amp: torch.dtype | None, steps: int
) -> None:
    """Beside the one pass that the loss needs in any case."""
    flags = ["--train_sst", "--sst_smart", 1, "--smart_steps", steps]
    trainer = make_ready(tiny_flags, tmp_path / "run", *flags, device=Device(torch.device("cpu"), amp))
    calls: list[None] = []
    trainer.model.backbone("sst").bert_layers[0].register_forward_hook(lambda *_: calls.append(None))
    trainer.train_step(steps_of(trainer)[0])
    [line] = smart_cost(trainer.config, trainer.model, trainer.device)
    assert f": {len(calls) - 1} more passes forward and back a batch" in line

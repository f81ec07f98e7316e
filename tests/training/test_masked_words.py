"""Runs of --mlm: the loss of masked words, what trains, and what fine-tuning takes over."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    changed,
    copied,
    cut,
    load_batch,
    make_ready,
    make_trainer,
    metrics,
    refusal,
    step_of,
)

import ensemble
import multitask_classifier
from models.checkpoint import load, load_model
from tasks import DEFAULT_TASKS
from text.packing import PackedBatch
from training.trainer import Trainer


def texts_alone(folder: Path, label: str | None = None) -> Path:
    """Return small data without any dev or test file; all labels are `label`, if given."""
    cut(folder, 20)
    for path in folder.glob("*.csv"):
        if "train" not in path.name:
            path.unlink()
        elif label is not None:
            header, *rows = path.read_text().splitlines()
            path.write_text("\n".join([header, *(f"{row.rpartition(chr(9))[0]}\t{label}" for row in rows)]) + "\n")
    return folder


def run(flags: list[str], folder: Path, *more: object) -> Path:
    """Pre-train; return the checkpoint."""
    multitask_classifier.main([*flags, "--mlm", "--run_dir", str(folder), *map(str, more)])
    return folder / "best.pt"


@pytest.fixture(scope="module")
def pretrained(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was pre-trained on SST; tests must not change it."""
    return run([*tiny_flags, "--no_tensorboard"], tmp_path_factory.mktemp("mlm") / "run", "--train_sst")


def test_the_loss_is_that_of_the_masked_words_alone(tiny_flags: list[str], tmp_path: Path) -> None:
    """By hand, from the masks up, with dropout off; the weight of the task counts."""
    off = ["--backbone_dropout_prob", 0, "--sst_weight", 0.5]
    trainer = make_ready(tiny_flags, tmp_path / "run", "--mlm", "--arch", "v2", *off)
    loss, losses = trainer.objective(load_batch(trainer, "para", range(7), number=4))
    generator = np.random.default_rng([trainer.config.train.seed, *b"mlm", 4])
    batch = trainer.loader.train["para"].batch(np.arange(7))
    assert trainer.loader.masking is not None and isinstance(batch, PackedBatch)
    masked, rows, words = trainer.loader.masking(batch, generator)
    backbone, head = trainer.model.backbone("para"), trainer.model.mlm["shared"]
    logits = head(backbone.encode(backbone.embed(masked), masked), backbone.word_embedding.weight)[rows]
    expected = torch.logsumexp(logits, dim=1) - logits[torch.arange(len(rows)), words]
    assert len(rows) > 5
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(loss, expected.mean())
    loss, losses = trainer.objective(load_batch(trainer, "sst", range(7)))
    torch.testing.assert_close(loss, losses.mean() / 2)


@pytest.mark.parametrize("more", [[], ["--micro_batch_size", 2]])
def test_a_batch_without_words_has_no_loss_and_no_gradient(
    tiny_flags: list[str], tmp_path: Path, more: list[object]
) -> None:
    trainer, nothing = make_ready(tiny_flags, tmp_path / "run", "--mlm", "--train_sst", *more), torch.arange(0)
    trainer.loader.masking = lambda batch, generator: (batch, nothing, nothing)  # type: ignore[assignment]
    result = trainer.train_step(step_of("sst", range(3)), measure_norm=True)
    assert result.batches[0].loss.item() == 0 and result.norm is not None and result.norm.item() == 0


def test_a_run_reads_training_texts_alone_and_its_loss_falls(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--arch", "yin-yang", "--epochs", 6, "--lr_schedule", "constant", "--data_dir"]
    best = run(tiny_flags, tmp_path / "run", *flags, texts_alone(tmp_path / "data"))
    other = run(tiny_flags, tmp_path / "other", *flags, texts_alone(tmp_path / "other-data", label="1"))
    assert changed(load(best)["weights"], load(other)["weights"]) == set()  # labels make no difference
    lines = metrics(tmp_path / "run")
    assert len(lines) == 6 and all(line["dev"] == {} for line in lines)
    for task in DEFAULT_TASKS:
        assert lines[-1]["train"][task]["loss"] < lines[0]["train"][task]["loss"] - 0.3
        assert set(lines[0]["train"][task]) == {"loss", "lr", "steps"}
    assert lines[0]["trains"] == "the backbones and the heads of masked words train"
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == {
        "dev": {}, "epoch": 6, "checkpoint": "best.pt",
    }  # fmt: skip
    assert sorted(path.name.partition(".out.")[0] for path in (tmp_path / "run").glob("[!.]*")) == [
        "best.pt", "config.json", "events", "inputs.json", "metrics.jsonl", "scores.json", "timing.jsonl",
    ]  # fmt: skip


def test_heads_and_poolers_stay_and_all_else_trains(tiny_flags: list[str], tmp_path: Path) -> None:
    """The checkpoint reads back as the model that trained."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--mlm", "--epochs", 1)
    before = copied(trainer.model)
    trainer.fit()
    names = {name for name, _ in trainer.model.named_parameters()}
    still = {name for name in names if name.startswith(("heads.", "pair_layer.")) or "pooler_dense" in name}
    assert changed(before, copied(trainer.model)) == names - still
    parts = dict(trainer.model.parts())
    assert {"masked words sentiment", "masked words similarity"} <= set(parts)
    again, _, _ = load_model(tmp_path / "run" / "best.pt")
    assert changed(copied(trainer.model), copied(again)) == set()


def test_masked_words_train_the_pals_of_their_task(tiny_flags: list[str], tmp_path: Path) -> None:
    more = ["--pal", "low-rank", "--pal_low_rank_size", 4, "--train_sst", "--epochs", 1, "--no_tensorboard"]
    weights = load(run(tiny_flags, tmp_path / "run", *more))["weights"]
    pals = [tensor for name, tensor in weights.items() if name.startswith("pals.")]
    assert pals and all(tensor.any() for tensor in pals)  # V_D starts as zeros


@pytest.mark.parametrize("more", [[], ["--arch", "duality", "--clf", "mlp"], ["--pal", "pal"]], ids=str)
def test_fine_tuning_starts_from_it(pretrained: Path, tiny_flags: list[str], tmp_path: Path, more: list[str]) -> None:
    """To the bit. All heads, and the backbone that no word was masked for, are those of a run without it."""
    plain = copied(make_trainer(tiny_flags, tmp_path / "plain", *more).model)
    trainer = make_trainer(tiny_flags, tmp_path / "fine", *more, "--init_from", pretrained, "--epochs", 1)
    source, start = load(pretrained)["weights"], copied(trainer.model)
    assert not trainer.model.mlm and list(start) == list(plain)
    for name, tensor in start.items():
        assert torch.equal(tensor, source[name] if name.startswith("backbones.sentiment.") else plain[name]), name
    assert trainer.fit()["score"] > 0


def test_it_goes_on_from_itself_and_from_a_fine_tuned_model(
    pretrained: Path, trained: Trainer, tiny_flags: list[str], tmp_path: Path
) -> None:
    again = make_trainer(tiny_flags, tmp_path / "again", "--mlm", "--train_sst", "--init_from", pretrained).model
    assert changed(load(pretrained)["weights"], copied(again)) == set()
    tuned = trained.checkpointer.run.best
    other = copied(make_trainer(tiny_flags, tmp_path / "other", "--mlm", "--init_from", tuned).model)
    weights = load(tuned)["weights"]
    assert changed(weights, {name: other[name] for name in weights}) == set()


def test_a_checkpoint_without_trained_heads_is_exported_and_not_evaluated(
    pretrained: Path, small_data: Path, tmp_path: Path
) -> None:
    for main, words in (
        (multitask_classifier.main, ["--evaluate", pretrained]),
        (multitask_classifier.main, ["--evaluate", pretrained, "--predict", "-", "--task", "sst"]),
        (ensemble.main, [pretrained, "--data_dir", small_data, "--run_dir", tmp_path / "e"]),
    ):
        message = refusal(main, list(map(str, words)))
        assert "--mlm" in message and "--init_from" in message
    multitask_classifier.main(["--evaluate", str(pretrained), "--export", str(tmp_path / "exported")])
    bert = transformers.BertModel.from_pretrained(tmp_path / "exported" / "sentiment")
    words_of = load(pretrained)["weights"]["backbones.sentiment.word_embedding.weight"]
    assert torch.equal(bert.embeddings.word_embeddings.weight, words_of)


def test_the_plan_says_what_trains(tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    multitask_classifier.main([*tiny_flags, "--mlm", "--train_sst", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("SST sentiment") and line.endswith("masked words") for line in lines)
    assert any(line.split()[:2] == ["head", "sst"] and line.split()[-2:] == ["0", "0.0%"] for line in lines)
    assert any(line.startswith("masked words sentiment") and line.endswith("100.0%") for line in lines)

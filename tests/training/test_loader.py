"""Batches made ahead are those made on demand, and a tail changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_batch
from test_training import copied, make_trainer

from tasks import DEFAULT_TASKS
from text.packing import PackedBatch, bucket
from training.loader import Feed
from training.task_sampling import Step
from training.trainer import Trainer

CPU = torch.device("cpu")


def test_a_batch_made_ahead_is_made_once(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    feed = Feed(trainer.train_data, CPU)
    feed.ahead = True  # as on a GPU
    for name, data in trainer.train_data.items():
        step, other = Step(name, np.arange(3, 9)), Step(name, np.arange(2, 6))
        feed.expect(step)
        assert feed.ready is not None
        prepared = feed.ready[1]
        for taken in (step, other):  # the other one, where what was expected did not come
            batch, labels = feed.take(taken)
            assert (batch is prepared) == (taken is step) and feed.ready is None
            wanted = data.batch(taken.indices)
            assert isinstance(batch, PackedBatch) and isinstance(wanted, PackedBatch)
            assert_same_batch(batch, wanted)
            assert torch.equal(labels, data.labels(taken.indices))
            feed.expect(step)


def test_a_cpu_makes_nothing_ahead(tiny_flags: list[str], tmp_path: Path) -> None:
    feed = make_trainer(tiny_flags, tmp_path / "run").feed
    feed.expect(Step("sst", np.arange(4)))
    assert feed.ready is None and not feed.tails


@pytest.mark.parametrize("more", [["--routine", "interleave"], ["--cache_frozen", "--fine_tune_mode", "last-layer"]])
def test_training_ahead_is_the_same(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    plain = make_trainer(tiny_flags, tmp_path / "plain", *more)
    ahead = make_trainer(tiny_flags, tmp_path / "ahead", *more)
    ahead.feed.ahead = True
    plain.fit(), ahead.fit()
    for name, own in copied(plain.model).items():
        assert torch.equal(copied(ahead.model)[name], own), name


# ---------------------------------------------------------------------------------------------------------------- tails


def gradients(trainer: Trainer, step: Step, tails: bool) -> dict[str, torch.Tensor]:
    """Loss, outputs and every gradient of a step in training mode, and BatchNorm's statistics after it."""
    before = copied(trainer.model)
    batch, labels = Feed(trainer.train_data, CPU, tails).take(step)
    assert isinstance(batch, PackedBatch)
    assert (batch.tail > 0) == tails
    loss, outputs = trainer.passes(step, batch, labels)
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    found |= {"loss": loss, "outputs": outputs}
    found |= {name: own.clone() for name, own in trainer.model.named_buffers()}
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.load_state_dict(before)
    return found


@pytest.mark.parametrize(
    "more",
    [
        ["--arch", "yin-yang"],
        ["--arch", "v2"],
        ["--arch", "cosine"],
        ["--arch", "v1", "--lora_mode", "all-lin", "--lora_rank", 2, "--dora"],
        ["--arch", "v1", "--pal", "pal", "--pal_size", 24, "--pal_heads", 2],
        ["--arch", "v1", "--sts_embedding_loss", "ranking", "--para_embedding_loss", "contrastive"],
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_a_tail_changes_no_loss_and_no_gradient(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    flags = ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0, "--fine_tune_mode", "full-model"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, *more)
    trainer.model.train()
    trainer.model.freeze_for_epoch(trainer.config.train, 0)
    for task in DEFAULT_TASKS:
        for rows in (np.arange(11), np.arange(4, 6), np.array([7])):
            plain, tailed = (gradients(trainer, Step(task, rows), tails) for tails in (False, True))
            assert plain.keys() == tailed.keys()
            for name, own in plain.items():
                scale = max(1.0, float(own.abs().max()))
                torch.testing.assert_close(tailed[name], own, rtol=0, atol=1e-6 * scale, msg=f"{task} {name}")


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 640, 1023, 1024, 1664, 6656, 30_000])
@pytest.mark.parametrize("longest", [1, 17, 64, 300, 512])
def test_buckets_are_larger_by_an_eighth_at_most(tokens: int, longest: int) -> None:
    count, length = bucket(tokens, longest)
    assert tokens < count <= max(tokens + 64, tokens * 9 / 8)
    assert length >= max(longest, count - tokens) and length & (length - 1) == 0


def test_few_buckets_hold_a_task() -> None:
    """64 pairs of some 13 tokens a text: the whole task fits a handful of shapes."""
    generator = np.random.default_rng(0)
    totals = generator.poisson(13, (2000, 128)).sum(axis=1)
    assert len({bucket(int(total), 40)[0] for total in totals}) <= 6

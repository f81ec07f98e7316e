"""Batches that are prefetched are those made on demand, and a tail changes no loss and no gradient."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import State, changed, copied, load_batch, make_ready, make_trainer, metrics, steps_of
from torch import Tensor

from tasks import DEFAULT_TASKS
from text.packing import PackedBatch, bucket
from training.loader import Loader
from training.task_sampling import TaskBatch
from training.trainer import Trainer


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a CPU accept streams and do all work at once; return the numbers of the batches in the order of loading."""
    stream, numbers = SimpleNamespace(wait_stream=lambda other: None), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    load = Loader.load
    monkeypatch.setattr(Loader, "load", lambda self, batch, n: (numbers.append(n), load(self, batch, n))[1])
    return numbers


@pytest.mark.parametrize(
    "more",
    [
        ["--routine", "interleave"],
        ["--routine", "joint", "--mlm"],
        ["--cache_frozen", "--fine_tune_mode", "last-layer"],
    ],
    ids=str,
)
def test_prefetched_training_is_the_same(
    tiny_flags: list[str], tmp_path: Path, loads: list[int], more: list[object]
) -> None:
    """Each batch is made once, and its number, which decides what is masked, is its own."""
    models, made = [], []
    for name in ("plain", "ahead"):
        trainer = make_trainer(tiny_flags, tmp_path / name, *more)
        if name == "ahead":
            trainer.loader.stream = object()  # type: ignore[assignment]
        loads.clear()
        trainer.fit()
        models.append(copied(trainer.model))
        made.append(list(loads))
    assert changed(*models) == set() and metrics(tmp_path / "plain") == metrics(tmp_path / "ahead")
    assert made[0] == made[1] == list(range(18))


def test_what_was_not_expected_is_made_on_demand(tiny_flags: list[str], tmp_path: Path, loads: list[int]) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    loader, steps = trainer.loader, steps_of(trainer)
    loader.begin_epoch(steps, 0, 0)
    loader.prefetch()
    assert loads == []  # a CPU makes nothing ahead
    loader.stream = object()  # type: ignore[assignment]
    loader.prefetch()
    assert loads == [0]
    other = TaskBatch("sst", np.arange(2, 6))
    batch = loader.next(other, 5)
    assert loads == [0, 5] and torch.equal(batch.labels, loader.train["sst"].labels(other.indices))
    loader.begin_epoch(steps, 2, 7)  # as a resumed run does
    loader.prefetch()
    assert loader.next(steps[2].batches[0], 7).number == 7 and loads == [0, 5, 7]


def pass_back(trainer: Trainer, task: str, rows: range, few_shapes: bool) -> State:
    """Return loss, outputs and gradients of a batch in training mode, and BatchNorm's statistics after it."""
    before = copied(trainer.model)
    trainer.loader.few_shapes = few_shapes
    batch = load_batch(trainer, task, rows)
    assert isinstance(batch.inputs, PackedBatch) and bool(batch.inputs.tail) == few_shapes
    loss, outputs = trainer.forward_backward(batch, 1.0)
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    found |= {"loss": loss, "outputs": outputs}
    found |= {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.load_state_dict(before)
    return found


@pytest.mark.parametrize(
    "more",
    [
        ["--arch", "yin-yang"],
        ["--arch", "v2"],
        ["--arch", "v1", "--lora_mode", "all-lin", "--lora_rank", 2, "--dora", "--pal", "pal", "--pal_size", 24,
         "--pal_heads", 2],
        ["--arch", "cosine", "--sts_embedding_loss", "ranking", "--para_embedding_loss", "contrastive"],
    ],
    ids=str,
)  # fmt: skip
def test_a_tail_changes_no_loss_and_no_gradient(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    still = ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0]
    trainer = make_ready(tiny_flags, tmp_path / "run", *still, *more)
    for task in DEFAULT_TASKS:
        for rows in (range(11), range(7, 8)):
            plain, tailed = (pass_back(trainer, task, rows, few_shapes) for few_shapes in (False, True))
            assert plain.keys() == tailed.keys()
            for name, tensor in plain.items():
                scale = max(1.0, float(tensor.abs().max()))
                torch.testing.assert_close(tailed[name], tensor, rtol=0, atol=1e-6 * scale, msg=f"{task} {name}")


def test_few_buckets_hold_a_task() -> None:
    """Larger by an eighth at most; 64 pairs of some 13 tokens a text fit a handful of shapes."""
    for tokens in (1, 63, 64, 65, 640, 1023, 1024, 1664, 6656, 30_000):
        for longest in (1, 17, 512):
            count, _, length = bucket(tokens, longest)
            assert tokens < count <= max(tokens + 64, tokens * 9 / 8) and length >= longest
    totals = np.random.default_rng(0).poisson(13, (2000, 128)).sum(axis=1)
    assert len({bucket(int(total), 40)[0] for total in totals}) <= 6

"""Auxiliary losses in a training step: their gradient, which pairs count, and which texts are equal."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import forward_result, load_batch, make_ready, make_trainer, step_of
from torch import Tensor

from tasks import DEFAULT_TASKS, TASKS
from text.packing import pack_padded, stack_padded_pairs
from training.auxiliary_losses import cosine_loss, ranking_loss, text_hashes
from training.losses import LOSSES, contrastive, cosine_embedding, multiple_negatives_ranking, simcse
from training.trainer import Trainer


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Return and clear the gradients at hand."""
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return found


NUMBERS: dict[str, list[object]] = {
    "contrastive": ["--contrastive_margin", 20],
    "simcse": ["--simcse_temperature", 0.2],
    "ranking": ["--ranking_scale", 3],
    "cosine": [],
}


@pytest.mark.parametrize(
    ("task", "kind"),
    [("sts", "contrastive"), ("para", "contrastive"), ("sst", "simcse"), ("sts", "ranking"), ("para", "ranking"),
     ("sts", "cosine")],
)  # fmt: skip
def test_an_auxiliary_loss_adds_its_weighted_gradient(
    tiny_flags: list[str], tmp_path: Path, task: str, kind: str
) -> None:
    flags = [f"--{task}_embedding_loss", kind, f"--{task}_embedding_weight", 0.25, *NUMBERS[kind]]
    trainer = make_ready(tiny_flags, tmp_path / "run", "--arch", "r4", *flags)
    model, rows = trainer.model, np.array([3, 0, 7, 5, 11, 2, 14, 16, 9, 18, 1, 6, 19, 12])
    batch = load_batch(trainer, task, rows)
    loss_of = LOSSES[trainer.config.tasks[task].loss]
    torch.manual_seed(3)
    trainer.forward_backward(batch, 1.0)
    found = gradients(trainer)
    torch.manual_seed(3)  # the same dropout masks, drawn in the same order
    embedding = model.embed(task, batch.inputs)
    loss = loss_of(model.outputs(task, embedding), batch.labels)
    if kind == "simcse":
        extra = simcse(embedding, model.embed(task, batch.inputs), 0.2)
    else:
        first, second = embedding.chunk(2)
        share = batch.labels / (5 if task == "sts" else 1)
        extra = {
            "contrastive": lambda: contrastive(first, second, share, 20.0),
            "ranking": lambda: multiple_negatives_ranking(first, second, share >= 0.8, torch.eye(len(rows)) > 0, 3.0),
            "cosine": lambda: cosine_embedding(first, second, share >= 0.7, share < 0.2),
        }[kind]()
    (loss + 0.25 * extra).backward()
    wanted = gradients(trainer)
    torch.testing.assert_close(found, wanted)
    torch.manual_seed(3)
    loss_of(model(task, batch.inputs), batch.labels).backward()
    plain = gradients(trainer)
    assert any(not torch.allclose(plain[name], wanted[name]) for name in plain)


@pytest.mark.parametrize("task", ["sst", "para", "sts"])
def test_rdrop_adds_the_loss_of_a_second_pass_and_their_distance(
    tiny_flags: list[str], tmp_path: Path, task: str
) -> None:
    """Wu et al. 2021, equations 2 to 4, with torch's own divergences."""
    flags = ["--arch", "v2", "--sts_loss", "mse", f"--{task}_rdrop", 3, f"--{task}_weight", 2]
    trainer = make_ready(tiny_flags, tmp_path / "run", *flags)
    batch = load_batch(trainer, task, np.array([3, 0, 7, 5, 11, 2, 14, 16]))
    torch.manual_seed(3)
    trainer.forward_backward(batch, 1.0)
    found = gradients(trainer)
    torch.manual_seed(3)  # the same dropout masks, drawn in the same order
    first, second = trainer.model(task, batch.inputs), trainer.model(task, batch.inputs)
    loss_of = LOSSES[trainer.config.tasks[task].loss]
    if task == "sts":
        distance = (first - second).square().mean() / 2
    else:
        logits = (
            [first, second] if task == "sst" else [torch.stack([z, torch.zeros_like(z)], 1) for z in (first, second)]
        )
        p, q = (z.log_softmax(dim=1) for z in logits)
        distance = sum(F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p))) / 2
    (2 * loss_of(first, batch.labels) + 2 * loss_of(second, batch.labels) + 3 * distance).backward()
    torch.testing.assert_close(found, gradients(trainer))
    assert distance.item() > 1e-6


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in DEFAULT_TASKS for name in TASKS[task].losses])
def test_every_loss_of_a_task_trains(tiny_flags: list[str], tmp_path: Path, task: str, name: str) -> None:
    """Two steps, the second on a ragged batch."""
    trainer = make_ready(tiny_flags, tmp_path / "run", f"--train_{task}", f"--{task}_loss", name)
    before = {key: tensor.clone() for key, tensor in trainer.model.named_parameters()}
    for rows in (range(8), range(8, 13)):
        result = trainer.train_step(step_of(task, rows), measure_norm=True)
        (batch,) = result.batches
        assert batch.loss.item() == pytest.approx(LOSSES[name](batch.outputs, batch.labels).item())
        assert result.norm is not None and result.norm.isfinite() and result.norm > 0
    after = dict(trainer.model.named_parameters())
    assert any(key.startswith("backbones.") and not torch.equal(before[key], after[key]) for key in before)
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_two_dropout_views_of_a_sentence_become_alike(tiny_flags: list[str], tmp_path: Path) -> None:
    """As a reader would try it; over many masks, since the loss under two of them is mostly noise."""
    flags = ["--train_sst", "--sst_embedding_loss", "simcse", "--sst_embedding_weight", 10, "--arch", "r4"]
    flags += ["--optim", "AdamW", "--lr", 1e-3, "--batch_size", 20, "--epochs", 40, "--eval_every", 40]
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--fine_tune_mode", "full-model", *flags)
    batch = trainer.loader.train["sst"].batch(np.arange(20))

    @torch.no_grad()
    def mean_loss() -> float:
        model = trainer.model.train()
        return float(np.mean([simcse(model.embed("sst", batch), model.embed("sst", batch)).item() for _ in range(20)]))

    before = mean_loss()
    trainer.fit()
    assert mean_loss() < 0.6 * before


def test_which_similarities_count(tiny_flags: list[str], tmp_path: Path) -> None:
    """R4, section 4.3: ranking takes pairs from 4 on, cosine those from 3.5 on and those below 1."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "r4")
    result = forward_result(trainer, "sts", range(8))
    labels = torch.tensor([5.0, 4.0, 3.9, 3.5, 3.4, 1.0, 0.9, 0.0])
    result = replace(result, batch=replace(result.batch, labels=labels))
    first, second = result.embedding.chunk(2)
    number = torch.arange(8)
    wanted = multiple_negatives_ranking(first, second, number < 2, torch.eye(8) > 0)
    assert ranking_loss(result).item() == pytest.approx(wanted.item()) and wanted.item() > 0
    wanted = cosine_embedding(first, second, number < 4, number > 5)
    assert cosine_loss(result).item() == pytest.approx(wanted.item())


def test_pairs_with_a_text_in_common_are_no_negatives(tiny_flags: list[str], tmp_path: Path) -> None:
    """Also where the first text of one pair is the second of another: it would be told to be far from itself."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "r4")
    first, second = torch.tensor([[2, 10, 11, 3], [2, 12, 13, 3], [2, 14, 3, 0]]), torch.tensor([[2, 20, 21, 3]] * 3)
    second[1], second[2, 1] = first[0], 30
    inputs = stack_padded_pairs(first, first > 0, second, second > 0)
    result = forward_result(trainer, "sts", range(3))
    result = replace(result, batch=replace(result.batch, inputs=inputs, labels=torch.full((3,), 5.0)))
    result = replace(result, embedding=trainer.model.embed("sts", inputs))
    same = torch.eye(3) > 0
    without = multiple_negatives_ranking(*result.embedding.chunk(2), torch.ones(3) > 0, same).item()
    same[0, 1] = same[1, 0] = True
    wanted = multiple_negatives_ranking(*result.embedding.chunk(2), torch.ones(3) > 0, same).item()
    assert ranking_loss(result).item() == pytest.approx(wanted) and abs(without - wanted) > 0.1


def test_equal_texts_have_equal_hashes(tiny_flags: list[str], tmp_path: Path) -> None:
    """Whatever the batch and the place; another order of the words is another text."""
    data = make_trainer(tiny_flags, tmp_path / "run").loader.train["sts"]
    hashes = text_hashes(data.batch(np.array([3, 5, 3, 7])))  # [2 * 4]
    alone = text_hashes(data.batch(np.array([3])))
    assert hashes[[0, 2]].tolist() == [alone[0]] * 2 and hashes[[4, 6]].tolist() == [alone[1]] * 2
    texts = [column[i] for column in data.examples.texts for i in (3, 5, 3, 7)]
    assert len(set(hashes.tolist())) == len(set(texts))
    a, b, c, d = 10, 17, 23, 40  # man bites dog and dog bites man
    mirrored = torch.tensor([[2, a, b, c, d, c, b, a, 3], [2, c, b, a, d, a, b, c, 3]])
    assert len(set(text_hashes(pack_padded(mirrored, torch.ones_like(mirrored))).tolist())) == 2

"""Losses against torch, scipy, numpy and numeric gradients."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from test_smart import seen_by
from test_training import make_trainer
from torch import Tensor, nn

from tasks import DEFAULT_TASKS, TASKS, Task
from text.packing import pack_padded, stack_padded_pairs
from training.auxiliary_losses import cosine_term, ranking_term, text_hashes
from training.losses import (
    LOSSES,
    binary_cross_entropy,
    contrastive,
    cosine_embedding,
    cross_entropy,
    kl_divergence,
    log_cosh,
    mean_squared_error,
    mixed,
    multiple_negatives_ranking,
    ordinal_cross_entropy,
    pearson,
    simcse,
)
from training.seen import Seen
from training.task_sampling import Step
from training.trainer import Trainer

SIZES = (1, 2, 7, 64)  # a last batch is often ragged, and may be of one


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def classes(size: int, count: int, seed: int = 1) -> Tensor:
    return torch.randint(count, (size,), generator=torch.Generator().manual_seed(seed))


def similarities(size: int, seed: int = 2) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 5


def test_every_loss_of_the_task_table_exists() -> None:
    assert {name for task in TASKS.values() for name in task.losses} == set(LOSSES)
    assert {
        "ce": cross_entropy,
        "bce": binary_cross_entropy,
        "kl": kl_divergence,
        "ordinal": ordinal_cross_entropy,
        "mse": mean_squared_error,
        "pearson": pearson,
        "log-cosh": log_cosh,
        "mixed": mixed,
    } == LOSSES


@pytest.mark.parametrize("size", SIZES)
def test_cross_entropy_is_the_mean_over_the_batch_at_hand(size: int) -> None:
    logits, labels = normal(size, 5), classes(size, 5)
    shifted = logits.double().numpy()
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # [B, C]
    by_hand = -log_p[np.arange(size), labels].mean()
    assert cross_entropy(logits, labels).item() == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(cross_entropy(logits, labels), nn.CrossEntropyLoss()(logits, labels))


@pytest.mark.parametrize("size", SIZES)
def test_binary_cross_entropy_of_one_logit(size: int) -> None:
    logits, labels = normal(size), classes(size, 2)
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y = labels.numpy()
    by_hand = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    loss = binary_cross_entropy(logits, labels)  # labels are int64
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(loss, nn.BCEWithLogitsLoss()(logits, labels.float()))


@pytest.mark.parametrize("size", SIZES)
def test_binary_cross_entropy_of_classes_uses_one_hot_targets(size: int) -> None:
    logits, labels = normal(size, 5), classes(size, 5)
    one_hot = torch.zeros(size, 5)
    one_hot[torch.arange(size), labels] = 1.0
    assert torch.equal(binary_cross_entropy(logits, labels), nn.BCEWithLogitsLoss()(logits, one_hot))


@pytest.mark.parametrize("size", SIZES)
def test_mean_squared_error(size: int) -> None:
    predictions, labels = normal(size), similarities(size)
    by_hand = np.square(predictions.double().numpy() - labels.double().numpy()).mean()
    assert mean_squared_error(predictions, labels).item() == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(mean_squared_error(predictions, labels), nn.MSELoss()(predictions, labels))


@pytest.mark.parametrize("size", [2, 3, 7, 64, 1000])
def test_pearson_equals_scipy(size: int) -> None:
    predictions, labels = normal(size), similarities(size)
    wanted = 1 - pearsonr(predictions.double().numpy(), labels.double().numpy()).statistic
    assert pearson(predictions, labels).item() == pytest.approx(wanted, abs=2e-6)


def test_pearson_at_its_ends() -> None:
    labels = similarities(9)
    assert pearson(labels, labels).item() == pytest.approx(0.0, abs=1e-6)
    assert pearson(-labels, labels).item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.4, 7.0, 1e4])
@pytest.mark.parametrize("shift", [0.0, -3.0, 5.0])
def test_pearson_ignores_scale_and_shift(scale: float, shift: float) -> None:
    """To fp32: a shift that is large beside the scale costs digits of the predictions themselves."""
    predictions, labels = normal(33), similarities(33)
    changed = pearson(scale * predictions + shift, labels)
    assert changed.item() == pytest.approx(pearson(predictions, labels).item(), abs=1e-6 + 1e-6 * abs(shift) / scale)
    assert pearson(-scale * predictions, labels).item() == pytest.approx(2 - pearson(predictions, labels).item())


def gradient(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, labels: Tensor) -> Tensor:
    outputs = outputs.clone().requires_grad_()
    loss(outputs, labels).backward()
    assert outputs.grad is not None
    return outputs.grad


@pytest.mark.parametrize("size", [2, 5, 64])
def test_gradient_of_pearson_sums_to_zero(size: int) -> None:
    """It also has no part along the predictions, since neither shift nor scale matters."""
    predictions, labels = normal(size), similarities(size)
    grad = gradient(pearson, predictions, labels)
    assert grad.abs().max() > 1e-4 or size == 2  # two points always correlate perfectly
    assert grad.sum().abs() < 1e-6
    assert (grad @ predictions).abs() < 1e-5


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        (torch.full((6,), 0.3), similarities(6)),
        (normal(6), torch.full((6,), 2.6)),
        (torch.full((6,), 0.1), torch.full((6,), 2.2)),
        (torch.zeros(6), torch.zeros(6)),
        (torch.full((7,), 1e4 / 3), torch.full((7,), 0.1)),
        (torch.tensor([1.7]), torch.tensor([3.2])),
    ],
    ids=["predictions", "labels", "both", "zero", "rounded mean", "batch of one"],
)
def test_pearson_of_a_constant_batch_is_one_and_finite(predictions: Tensor, labels: Tensor) -> None:
    """Large constants leave a rounding error after their mean is taken off; it must not count as correlation."""
    assert pearson(predictions, labels).item() == pytest.approx(1.0, abs=1e-2)
    assert gradient(pearson, predictions, labels).isfinite().all()


def test_pearson_is_computed_in_fp32() -> None:
    predictions, labels = normal(64).bfloat16(), similarities(64)
    loss = pearson(predictions, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(pearson(predictions.float(), labels).item(), abs=1e-7)


def numeric_gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences in float64."""
    grad = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        for sign in (1, -1):
            moved = at.copy()
            moved[index] += sign * step
            grad[index] += sign * function(moved) / (2 * step)
    return grad


def test_gradient_of_pearson_equals_the_numeric_one() -> None:
    predictions, labels = normal(11), similarities(11)
    wanted = numeric_gradient(
        lambda x: 1 - pearsonr(x, labels.double().numpy()).statistic, predictions.double().numpy()
    )
    assert np.abs(gradient(pearson, predictions, labels).numpy() - wanted).max() < 1e-6


@pytest.mark.parametrize(
    ("loss", "shape", "count"),
    [(cross_entropy, (7, 5), 5), (binary_cross_entropy, (7,), 2), (binary_cross_entropy, (7, 5), 5)],
)
def test_gradients_of_class_losses_equal_the_numeric_ones(
    loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], count: int
) -> None:
    outputs, labels = normal(*shape).double(), classes(7, count)
    wanted = numeric_gradient(lambda x: loss(torch.from_numpy(x), labels).item(), outputs.numpy())
    assert np.abs(gradient(loss, outputs, labels).numpy() - wanted).max() < 1e-8


def test_gradient_of_the_squared_error_equals_the_numeric_one() -> None:
    outputs, labels = normal(7).double(), similarities(7)
    wanted = numeric_gradient(lambda x: mean_squared_error(torch.from_numpy(x), labels).item(), outputs.numpy())
    assert np.abs(gradient(mean_squared_error, outputs, labels).numpy() - wanted).max() < 1e-8


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in TASKS.values() for name in task.losses])
@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("size", SIZES)
def test_losses_of_large_outputs_are_finite(task: Task, name: str, scale: float, size: int) -> None:
    many = task.kind == "classes"
    outputs = normal(size, 5, scale=scale) if many else normal(size, scale=scale)
    labels = similarities(size) if task.kind == "similarity" else classes(size, 5 if many else 2)
    assert LOSSES[name](outputs, labels).isfinite()
    assert gradient(LOSSES[name], outputs, labels).isfinite().all()


# ------------------------------------------------------------------------------------------- other losses of R0's F.2


def softmax64(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def ordinal_by_hand(logits: np.ndarray, labels: np.ndarray) -> float:
    """Sums of probabilities in float64, without any stabilising."""
    terms = []
    for p, y in zip(softmax64(logits), labels, strict=True):
        for j in range(logits.shape[1] - 1):
            terms.append(-np.log(p[: j + 1].sum()) if y <= j else -np.log(p[j + 1 :].sum()))
    return float(np.mean(terms))


def mixed_classes_by_hand(logits: np.ndarray, labels: np.ndarray) -> float:
    one_hot = np.eye(logits.shape[1])[labels]
    q = 1 / (1 + np.exp(-logits))
    bce = -(one_hot * np.log(q) + (1 - one_hot) * np.log(1 - q)).mean()
    expected = softmax64(logits) @ np.arange(logits.shape[1])
    return float(bce + 0.1 * np.square(expected - labels).mean())


def mixed_similarity_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    return float(1 - pearsonr(x, y).statistic + 0.5 * np.square(x - y).mean())


def log_cosh_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.log(np.cosh(x - y)).mean())


BY_HAND: list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[[np.ndarray, np.ndarray], float], int]] = [
    (kl_divergence, lambda z, y: float(-np.log(softmax64(z))[np.arange(len(y)), y].mean()), 5),
    (ordinal_cross_entropy, ordinal_by_hand, 5),
    (mixed, mixed_classes_by_hand, 5),
    (mixed, mixed_similarity_by_hand, 0),
    (log_cosh, log_cosh_by_hand, 0),
]


@pytest.mark.parametrize(
    ("loss", "by_hand", "count", "size"),
    # one point has no correlation: the batch of one has a test of its own below
    [(*row, size) for row in BY_HAND for size in SIZES if size > 1 or row[1] is not mixed_similarity_by_hand],
)
def test_values_and_gradients_equal_float64_formulas(
    loss: Callable[[Tensor, Tensor], Tensor],
    by_hand: Callable[[np.ndarray, np.ndarray], float],
    count: int,
    size: int,
) -> None:
    outputs = normal(size, count) if count else normal(size)
    labels = classes(size, count) if count else similarities(size)
    exact, y = outputs.double().numpy(), labels.numpy().astype(np.int64 if count else np.float64)
    assert loss(outputs, labels).item() == pytest.approx(by_hand(exact, y), rel=1e-5, abs=1e-7)
    wanted = numeric_gradient(lambda x: by_hand(x, y), exact)
    assert np.abs(gradient(loss, outputs, labels).numpy() - wanted).max() < 2e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [2.0, 1e4])
def test_kl_equals_cross_entropy(size: int, scale: float) -> None:
    logits, labels = normal(size, 5, scale=scale), classes(size, 5)
    torch.testing.assert_close(kl_divergence(logits, labels), cross_entropy(logits, labels))
    torch.testing.assert_close(gradient(kl_divergence, logits, labels), gradient(cross_entropy, logits, labels))


def test_ordinal_is_least_at_the_truth_and_grows_with_the_distance() -> None:
    """One-hot targets in place of 1[y <= j] would not order the wrong classes."""
    logits = 6 * torch.eye(5)  # row c is sure of class c
    for label in range(5):
        losses = [ordinal_cross_entropy(row[None], torch.tensor([label])).item() for row in logits]
        assert losses[label] == min(losses) and losses[label] < 0.05
        assert all(near < far for near, far in zip(losses[label:], losses[label + 1 :], strict=False))
        assert all(near < far for far, near in zip(losses[:label], losses[1 : label + 1], strict=True))


def test_ordinal_of_two_classes_is_cross_entropy() -> None:
    logits, labels = normal(7, 2), classes(7, 2)
    torch.testing.assert_close(ordinal_cross_entropy(logits, labels), cross_entropy(logits, labels))


def test_ordinal_keeps_its_slope_where_the_cumulative_probability_rounds_to_one() -> None:
    """Sure of class 0 by 1e4 with the truth at 4: each of four terms is 1e4, and class 0 gets the whole push."""
    logits, labels = torch.tensor([[1e4, 0.0, 0.0, 0.0, 0.0]]), torch.tensor([4])
    assert ordinal_cross_entropy(logits, labels).item() == pytest.approx(1e4, rel=1e-3)
    grad = gradient(ordinal_cross_entropy, logits, labels)
    assert grad[0, 0].item() == pytest.approx(1.0) and grad[0, 4] < 0 and grad.sum().abs() < 1e-6
    for place in range(5):
        for sign in (1, -1):
            extreme = sign * 1e4 * torch.eye(5)[[place]]
            assert ordinal_cross_entropy(extreme, labels).isfinite()
            assert gradient(ordinal_cross_entropy, extreme, labels).isfinite().all()


def test_mixed_of_classes_is_zero_at_perfect() -> None:
    """Scores from 1 would leave 0.1."""
    labels = torch.arange(5)
    assert mixed(120 * torch.eye(5) - 60, labels).item() == pytest.approx(0.0, abs=1e-6)


def test_mixed_of_similarities_is_zero_at_perfect_and_knows_a_batch_of_one() -> None:
    labels = similarities(9)
    assert mixed(labels, labels).item() == pytest.approx(0.0, abs=1e-6)
    one = torch.tensor([1.5]), torch.tensor([3.5])
    assert mixed(*one).item() == pytest.approx(1 + 0.5 * 4)
    assert gradient(mixed, *one).item() == pytest.approx(-2.0)


def test_log_cosh_of_large_errors_has_the_slope_of_tanh() -> None:
    errors = torch.tensor([1e4, -1e4, 100.0, -3.0, 0.0, 0.25, 1e-3])
    labels = torch.zeros(7)
    assert log_cosh(errors[:2], labels[:2]).item() == pytest.approx(1e4 - math.log(2), rel=1e-6)
    torch.testing.assert_close(gradient(log_cosh, errors, labels), errors.tanh() / 7, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("loss", "count"), [(ordinal_cross_entropy, 5), (mixed, 5), (mixed, 0), (log_cosh, 0)])
def test_other_losses_are_computed_in_fp32(loss: Callable[[Tensor, Tensor], Tensor], count: int) -> None:
    outputs = (normal(64, count) if count else normal(64)).bfloat16()
    labels = classes(64, count) if count else similarities(64)
    assert loss(outputs, labels).dtype == torch.float32
    assert loss(outputs, labels).item() == loss(outputs.float(), labels).item()


# --------------------------------------------------------------------------------------------- losses of embeddings


def contrastive_by_hand(u: np.ndarray, v: np.ndarray, similar: np.ndarray, margin: float) -> float:
    d = np.linalg.norm(u - v, axis=1)
    return float(np.where(similar == 1, 0.5 * d**2, 0.5 * np.maximum(0, margin - d) ** 2).mean())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("margin", [1.0, 4.0])
def test_contrastive_equals_the_float64_formula(size: int, margin: float) -> None:
    u, v, labels = normal(size, 6, scale=0.8), normal(size, 6, seed=5, scale=0.8), classes(size, 2)
    exact, other = u.double().numpy(), v.double().numpy()
    wanted = contrastive_by_hand(exact, other, labels.numpy(), margin)
    assert contrastive(u, v, labels, margin).item() == pytest.approx(wanted, rel=1e-5)
    for wrt, loss, by_hand in (
        (u, lambda x, y: contrastive(x, v, y, margin), lambda x: contrastive_by_hand(x, other, labels.numpy(), margin)),
        (v, lambda x, y: contrastive(u, x, y, margin), lambda x: contrastive_by_hand(exact, x, labels.numpy(), margin)),
    ):
        numeric = numeric_gradient(by_hand, wrt.double().numpy())
        assert np.abs(gradient(loss, wrt, labels).numpy() - numeric).max() < 2e-6


def test_contrastive_of_identical_embeddings() -> None:
    """A positive pair costs nothing, a negative one half the squared margin; neither has a slope that is not finite."""
    u = normal(3, 6)
    for label, wanted in ((1, 0.0), (0, 0.5 * 2.0**2)):
        labels = torch.full((3,), label)
        assert contrastive(u, u.clone(), labels, 2.0).item() == pytest.approx(wanted, abs=1e-5)
        assert gradient(lambda x, y: contrastive(x, u, y, 2.0), u, labels).isfinite().all()
    assert contrastive(u, u.clone(), torch.ones(3)).item() == 0.0


def test_contrastive_pulls_similar_pairs_and_pushes_others_up_to_the_margin() -> None:
    u, v = torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2)
    assert gradient(lambda x, y: contrastive(x, v, y), u, torch.tensor([1]))[0, 0] > 0
    assert gradient(lambda x, y: contrastive(x, v, y), u, torch.tensor([0]))[0, 0] < 0
    assert contrastive(3 * u, v, torch.tensor([0])).item() == 0.0  # farther than the margin


def simcse_by_hand(u: np.ndarray, v: np.ndarray, temperature: float) -> float:
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    return float(-np.log(np.diag(softmax64(u @ v.T / temperature))).mean())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_simcse_equals_the_float64_formula(size: int, temperature: float) -> None:
    u = normal(size, 6)
    v = u + normal(size, 6, seed=5, scale=0.5)
    exact, other = u.double().numpy(), v.double().numpy()
    wanted = simcse_by_hand(exact, other, temperature)
    assert simcse(u, v, temperature).item() == pytest.approx(wanted, rel=2e-5, abs=1e-6)
    for wrt, loss, by_hand in (
        (u, lambda x, _: simcse(x, v, temperature), lambda x: simcse_by_hand(x, other, temperature)),
        (v, lambda x, _: simcse(u, x, temperature), lambda x: simcse_by_hand(exact, x, temperature)),
    ):
        numeric = numeric_gradient(by_hand, wrt.double().numpy())
        assert np.abs(gradient(loss, wrt, torch.empty(0)).numpy() - numeric).max() < 1e-5


def test_simcse_at_its_ends() -> None:
    """Orthogonal sentences that agree with themselves cost next to nothing; views that are all alike cost ln B."""
    assert simcse(torch.eye(8), 3 * torch.eye(8)).item() < 1e-6
    assert simcse(torch.ones(8, 8), torch.ones(8, 8)).item() == pytest.approx(math.log(8), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in DEFAULT_TASKS for name in TASKS[task].losses])
def test_every_loss_of_a_task_trains(tiny_flags: list[str], tmp_path: Path, task: str, name: str) -> None:
    """Two steps, the second on a ragged batch, through the loop that real training uses."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", f"--train_{task}", f"--{task}_loss", name)
    trainer.model.train()
    before = {key: tensor.clone() for key, tensor in trainer.model.named_parameters()}
    for indices in (np.arange(8), np.arange(8, 13)):
        loss, outputs, labels, norm = trainer.train_step(Step(task, indices), measure=True)
        assert loss.item() == pytest.approx(LOSSES[name](outputs, labels).item()) and len(outputs) == len(indices)
        assert loss.isfinite() and norm.isfinite() and norm > 0
    after = dict(trainer.model.named_parameters())
    assert any(key.startswith("backbones.") and not torch.equal(before[key], after[key]) for key in before)
    assert all(tensor.isfinite().all() for tensor in after.values())


# ------------------------------------------------------------------------------------------- terms on the embeddings


def gradients(trainer: Trainer, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of each parameter that the loss reaches."""
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def step_gradients(trainer: Trainer, task: str, indices: np.ndarray) -> dict[str, Tensor]:
    """What the loop hands to the optimizer for one batch."""
    found: dict[str, Tensor] = {}
    optimizer = trainer.optimizers[task]

    def take(*_: object) -> None:
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    optimizer.step = take  # type: ignore[method-assign]
    torch.manual_seed(3)
    trainer.train_step(Step(task, indices), False)
    return found


TERMS = [
    ("sts", "contrastive"), ("para", "contrastive"), ("sst", "simcse"),
    ("sts", "ranking"), ("para", "ranking"), ("sts", "cosine"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "kind"), TERMS)
def test_a_term_adds_its_weighted_gradient(tiny_flags: list[str], tmp_path: Path, task: str, kind: str) -> None:
    flags = [f"--{task}_embedding_loss", kind, f"--{task}_embedding_weight", 0.25, "--fine_tune_mode", "full-model"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "r4", *flags)
    model, data = trainer.model.train(), trainer.train_data[task]
    indices = np.array([3, 0, 7, 5, 11, 2, 14, 16, 9, 18, 1, 6, 19, 12])
    found = step_gradients(trainer, task, indices)
    torch.manual_seed(3)  # the same dropout masks, drawn in the same order
    batch, labels = data.batch(indices), data.labels(indices)
    embedding = model.embed(task, batch)
    loss = LOSSES[trainer.config.tasks[task].loss](model.outputs(task, embedding), labels)
    if kind == "simcse":
        extra = simcse(embedding, model.embed(task, batch))
    else:
        first, second = embedding[: len(indices)], embedding[len(indices) :]
        share = labels / (5 if task == "sts" else 1)
        extra = {
            "contrastive": lambda: contrastive(first, second, share),
            "ranking": lambda: multiple_negatives_ranking(first, second, share >= 0.8, torch.eye(len(indices)) > 0),
            "cosine": lambda: cosine_embedding(first, second, share >= 0.7, share < 0.2),
        }[kind]()
    wanted = gradients(trainer, loss + 0.25 * extra)
    torch.testing.assert_close(found, wanted)
    torch.manual_seed(3)
    plain = gradients(trainer, LOSSES[trainer.config.tasks[task].loss](model(task, batch), labels))
    assert any(not torch.allclose(plain[name], wanted[name]) for name in plain)


def test_only_the_task_that_asks_has_a_term(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--quora_embedding_loss", "contrastive")
    assert {name: len(terms) for name, terms in trainer.terms.items()} == {"sst": 0, "para": 1, "sts": 0}


def test_two_dropout_views_of_a_sentence_become_alike(tiny_flags: list[str], tmp_path: Path) -> None:
    """As a reader would try it; over many masks, since the loss under two of them is mostly noise."""
    flags = ["--train_sst", "--sst_embedding_loss", "simcse", "--sst_embedding_weight", 10]
    flags += ["--fine_tune_mode", "full-model", "--optim", "AdamW", "--lr", 1e-3, "--batch_size", 20, "--epochs", 40]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, "--arch", "r4", "--eval_every", 40)
    batch = trainer.train_data["sst"].batch(np.arange(20))

    @torch.no_grad()
    def mean_loss() -> float:
        model = trainer.model.train()
        return float(np.mean([simcse(model.embed("sst", batch), model.embed("sst", batch)).item() for _ in range(20)]))

    seen: list[float] = []
    (term,) = trainer.terms["sst"]
    trainer.terms["sst"] = [lambda view: (seen.append((out := term(view)).item()), out)[1]]
    before = mean_loss()
    trainer.fit()
    assert len(seen) == 40 and mean_loss() < 0.6 * before


def test_ranking_equals_the_float64_formula() -> None:
    """Over positive pairs only; the seconds of other pairs are no candidates."""
    u, v = normal(9, 6), normal(9, 6, seed=4)
    positive = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    kept_u, kept_v = (own[positive].double().numpy() for own in (u, v))
    unit_u, unit_v = (own / np.linalg.norm(own, axis=1, keepdims=True) for own in (kept_u, kept_v))
    logits = 20 * unit_u @ unit_v.T
    wanted = np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    found = multiple_negatives_ranking(u, v, positive, torch.eye(9) > 0)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_ranking_leaves_duplicates_out_and_bears_no_positive_pair() -> None:
    """A text that comes twice is no negative of itself: with all else orthogonal nothing is left to lose."""
    u = torch.eye(4)
    u[3] = u[0]
    same = torch.eye(4) > 0
    assert multiple_negatives_ranking(u, u, torch.ones(4) > 0, same).item() > 0.3
    same[0, 3] = same[3, 0] = True
    assert multiple_negatives_ranking(u, u, torch.ones(4) > 0, same).item() < 1e-6
    w = normal(4, 6).requires_grad_()
    nothing = multiple_negatives_ranking(w, w, torch.zeros(4) > 0, torch.eye(4) > 0)
    nothing.backward()
    assert nothing.item() == 0 and w.grad is not None and w.grad.isfinite().all()


def test_which_similarities_count(tiny_flags: list[str], tmp_path: Path) -> None:
    """R4, section 4.3: ranking takes pairs from 4 on, cosine those from 3.5 on and those below 1."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "r4")
    labels = torch.tensor([5.0, 4.0, 3.9, 3.5, 3.4, 1.0, 0.9, 0.0])
    seen = replace(seen_by(trainer, "sts", np.arange(8)), labels=labels)
    first, second = seen.embedding.chunk(2)
    number = torch.arange(8)
    wanted = multiple_negatives_ranking(first, second, number < 2, torch.eye(8) > 0)
    assert ranking_term(seen).item() == pytest.approx(wanted.item()) and wanted.item() > 0
    wanted = cosine_embedding(first, second, number < 4, number > 5)
    assert cosine_term(seen).item() == pytest.approx(wanted.item())


def test_a_pair_that_is_drawn_twice_is_no_negative_of_itself(tiny_flags: list[str], tmp_path: Path) -> None:
    """Through the term, which has to see that texts are equal."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "r4", "--sts_embedding_loss", "ranking")
    labels = trainer.train_data["sts"].labels(np.arange(20)).numpy()
    positive = np.flatnonzero(labels >= 4)[:3]
    seen = seen_by(trainer, "sts", np.append(positive, positive[0]))
    first, second = seen.embedding.chunk(2)
    same = torch.eye(4) > 0
    without = multiple_negatives_ranking(first, second, torch.ones(4) > 0, same)
    same[0, 3] = same[3, 0] = True
    wanted = multiple_negatives_ranking(first, second, torch.ones(4) > 0, same)
    (term,) = trainer.terms["sts"]
    assert term(seen).item() == pytest.approx(wanted.item()) and without.item() > wanted.item() + 0.1


def test_a_text_on_the_other_side_is_no_negative_either(tiny_flags: list[str], tmp_path: Path) -> None:
    """The first text of one pair is the second of another: it would be told to be far from itself."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "r4")
    first, second = torch.tensor([[2, 10, 11, 3], [2, 12, 13, 3], [2, 14, 3, 0]]), torch.tensor([[2, 20, 21, 3]] * 3)
    second[1], second[2, 1] = first[0], 30
    batch = stack_padded_pairs(first, first > 0, second, second > 0)
    embedding, labels = trainer.model.embed("sts", batch), torch.full((3,), 5.0)
    seen = Seen(trainer.model, "sts", batch, embedding, labels, labels, None, 0, trainer.teacher)
    same = torch.eye(3) > 0
    same[0, 1] = same[1, 0] = True
    wanted = multiple_negatives_ranking(*embedding.chunk(2), torch.ones(3) > 0, same).item()
    assert ranking_term(seen).item() == pytest.approx(wanted)
    without = multiple_negatives_ranking(*embedding.chunk(2), torch.ones(3) > 0, torch.eye(3) > 0).item()
    assert abs(without - wanted) > 0.1


def test_cosine_embedding_is_torchs_on_the_pairs_that_count() -> None:
    u, v = normal(8, 5), normal(8, 5, seed=4)
    similar = torch.tensor([1, 1, 0, 0, 1, 0, 0, 1], dtype=torch.bool)
    different = torch.tensor([0, 0, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    chosen = similar | different
    wanted = nn.functional.cosine_embedding_loss(u[chosen], v[chosen], torch.where(similar, 1, -1)[chosen])
    assert cosine_embedding(u, v, similar, different).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert cosine_embedding(u, v, similar & different, similar & different).item() == 0


def test_equal_texts_have_equal_hashes(tiny_flags: list[str], tmp_path: Path) -> None:
    """Whatever the batch and the place; another order of the words is another text."""
    data = make_trainer(tiny_flags, tmp_path / "run").train_data["sts"]
    hashes = text_hashes(data.batch(np.array([3, 5, 3, 7])))  # [2 * 4]
    alone = text_hashes(data.batch(np.array([3])))
    assert hashes[[0, 2]].tolist() == [alone[0]] * 2 and hashes[[4, 6]].tolist() == [alone[1]] * 2
    texts = [(column[i]) for column in data.examples.texts for i in (3, 5, 3, 7)]
    assert len(set(hashes.tolist())) == len(set(texts))
    a, b, c, d = 10, 17, 23, 40  # man bites dog and dog bites man
    mirrored = torch.tensor([[2, a, b, c, d, c, b, a, 3], [2, c, b, a, d, a, b, c, 3]])
    assert len(set(text_hashes(pack_padded(mirrored, torch.ones_like(mirrored))).tolist())) == 2

"""Losses against float64 formulas, numeric gradients, torch and scipy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch import Tensor, nn

from config import TaskOptions
from tasks import TASKS, Task
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
    task_loss,
)

SIZES = (1, 2, 7, 64)  # a last batch is often ragged, and may be of one
Loss = Callable[[Tensor, Tensor], Tensor]
Formula = Callable[[np.ndarray, np.ndarray], float]


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def classes(size: int, count: int, seed: int = 1) -> Tensor:
    return torch.randint(count, (size,), generator=torch.Generator().manual_seed(seed))


def similarities(size: int, seed: int = 2) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 5


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the gradient of a loss at outputs or embeddings."""
    at = at.clone().requires_grad_()
    loss(at).backward()
    assert at.grad is not None
    return at.grad


def numeric_gradient(formula: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Return central differences in float64."""
    grad = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        for sign in (1, -1):
            moved = at.copy()
            moved[index] += sign * step
            grad[index] += sign * formula(moved) / (2 * step)
    return grad


def softmax64(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(softmax64(logits))[np.arange(len(labels)), labels].mean())


def binary(logits: np.ndarray, labels: np.ndarray) -> float:
    y = labels if logits.ndim == 1 else np.eye(logits.shape[1])[labels]
    q = 1 / (1 + np.exp(-logits))
    return float(-(y * np.log(q) + (1 - y) * np.log(1 - q)).mean())


def ordinal(logits: np.ndarray, labels: np.ndarray) -> float:
    """Sums of probabilities, without any stabilising."""
    terms = []
    for p, y in zip(softmax64(logits), labels, strict=True):
        for j in range(logits.shape[1] - 1):
            terms.append(-np.log(p[: j + 1].sum()) if y <= j else -np.log(p[j + 1 :].sum()))
    return float(np.mean(terms))


def squared(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(x - y).mean())


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(1 - pearsonr(x, y).statistic)


# Loss, formula, number of outputs (0: one without a dimension), number of labels (0: similarities)
FORMULAS: list[tuple[Loss, Formula, int, int]] = [
    (cross_entropy, entropy, 5, 5),
    (kl_divergence, entropy, 5, 5),
    (binary_cross_entropy, binary, 0, 2),
    (binary_cross_entropy, binary, 5, 5),
    (ordinal_cross_entropy, ordinal, 5, 5),
    (mixed, lambda z, y: binary(z, y) + 0.1 * squared(softmax64(z) @ np.arange(5), y), 5, 5),
    (mixed, lambda x, y: correlation(x, y) + 0.5 * squared(x, y), 0, 0),
    (pearson, correlation, 0, 0),
    (mean_squared_error, squared, 0, 0),
    (log_cosh, lambda x, y: float(np.log(np.cosh(x - y)).mean()), 0, 0),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("loss", "formula", "outputs", "labels"), FORMULAS)
def test_values_and_gradients_equal_float64_formulas(
    loss: Loss, formula: Formula, outputs: int, labels: int, size: int
) -> None:
    x = normal(size, outputs) if outputs else normal(size)
    y = classes(size, labels) if labels else similarities(size)
    if size == 1 and loss in (pearson, mixed) and not outputs:  # one point has no correlation
        assert loss(x, y).item() == pytest.approx(1 + (0.5 * (x - y).square().item() if loss is mixed else 0))
        return
    exact, truth = x.double().numpy(), y.numpy().astype(np.int64 if labels else np.float64)
    assert loss(x, y).item() == pytest.approx(formula(exact, truth), rel=1e-5, abs=2e-6)
    wanted = numeric_gradient(lambda x: formula(x, truth), exact)
    assert np.abs(gradient(lambda x: loss(x, y), x).numpy() - wanted).max() < 2e-6


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in TASKS.values() for name in task.losses])
@pytest.mark.parametrize("size", (1, 7))
def test_losses_of_large_outputs_and_of_half_precision_are_finite(task: Task, name: str, size: int) -> None:
    many = task.kind == "classes"
    outputs = normal(size, 5, scale=1e4) if many else normal(size, scale=1e4)
    labels = similarities(size) if task.kind == "similarity" else classes(size, 5 if many else 2)
    assert LOSSES[name](outputs, labels).isfinite()
    assert gradient(lambda x: LOSSES[name](x, labels), outputs).isfinite().all()
    if name in ("pearson", "ordinal", "mixed", "log-cosh"):  # the others are torch's
        half = (outputs / 1e4).bfloat16()
        assert LOSSES[name](half, labels).dtype == torch.float32
        assert LOSSES[name](half, labels).item() == LOSSES[name](half.float(), labels).item()


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_pearson_ignores_scale_and_shift(scale: float, shift: float) -> None:
    """To fp32: a shift that is large beside the scale costs digits of the predictions themselves."""
    x, y = normal(33), similarities(33)
    tolerance = 1e-6 + 1e-6 * abs(shift) / scale
    assert pearson(scale * x + shift, y).item() == pytest.approx(pearson(x, y).item(), abs=tolerance)
    assert pearson(-scale * x, y).item() == pytest.approx(2 - pearson(x, y).item())
    slope = gradient(lambda x: pearson(x, y), x)
    assert slope.abs().max() > 1e-4 and slope.sum().abs() < 1e-6 and (slope @ x).abs() < 1e-5


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.full((6,), 0.3), similarities(6)),
        (normal(6), torch.full((6,), 2.6)),
        (torch.zeros(6), torch.zeros(6)),
        (torch.full((7,), 1e4 / 3), torch.full((7,), 0.1)),
        (torch.tensor([1.7]), torch.tensor([3.2])),
    ],
    ids=["predictions", "labels", "zero", "rounded mean", "batch of one"],
)
def test_pearson_of_a_constant_batch_is_one_and_finite(x: Tensor, y: Tensor) -> None:
    """Large constants leave a rounding error after their mean is taken off; it must not count as correlation."""
    assert pearson(x, y).item() == pytest.approx(1.0, abs=1e-2)
    assert gradient(lambda x: pearson(x, y), x).isfinite().all()


def test_losses_at_perfect_outputs() -> None:
    labels = similarities(9)
    assert pearson(labels, labels).item() == pytest.approx(0.0, abs=1e-6)
    assert mixed(labels, labels).item() == pytest.approx(0.0, abs=1e-6)
    assert mixed(120 * torch.eye(5) - 60, torch.arange(5)).item() == pytest.approx(0.0, abs=1e-6)  # not scores from 1


def test_the_weight_of_the_squared_error_in_a_mixed_loss_can_be_chosen() -> None:
    loss, x, y, z = task_loss(TaskOptions(loss="mixed", mixed_weight=3.0)), normal(9), similarities(9), normal(9, 5)
    assert loss(x, y).item() == pytest.approx((mixed(x, y) + 2.5 * mean_squared_error(x, y)).item())
    expected = z.softmax(1) @ torch.arange(5.0)
    wanted = mixed(z, classes(9, 5)) + 2.9 * mean_squared_error(expected, classes(9, 5))
    assert loss(z, classes(9, 5)).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_ordinal_is_least_at_the_truth_and_grows_with_the_distance() -> None:
    """One-hot targets in place of 1[y <= j] would not order the wrong classes."""
    logits = 6 * torch.eye(5)  # row c is sure of class c
    for label in range(5):
        losses = [ordinal_cross_entropy(row[None], torch.tensor([label])).item() for row in logits]
        assert losses[label] == min(losses) and losses[label] < 0.05
        assert all(near < far for near, far in zip(losses[label:], losses[label + 1 :], strict=False))
        assert all(near < far for far, near in zip(losses[:label], losses[1 : label + 1], strict=True))


def test_ordinal_keeps_its_slope_where_the_cumulative_probability_rounds_to_one() -> None:
    """Sure of class 0 by 1e4 with the truth at 4: each of four terms is 1e4, and class 0 gets the whole push."""
    logits, labels = torch.tensor([[1e4, 0.0, 0.0, 0.0, 0.0]]), torch.tensor([4])
    assert ordinal_cross_entropy(logits, labels).item() == pytest.approx(1e4, rel=1e-3)
    slope = gradient(lambda x: ordinal_cross_entropy(x, labels), logits)
    assert slope[0, 0].item() == pytest.approx(1.0) and slope[0, 4] < 0 and slope.sum().abs() < 1e-6


def test_log_cosh_of_large_errors_has_the_slope_of_tanh() -> None:
    errors, labels = torch.tensor([1e4, -1e4, 100.0, -3.0, 0.0, 0.25, 1e-3]), torch.zeros(7)
    assert log_cosh(errors[:2], labels[:2]).item() == pytest.approx(1e4 - math.log(2), rel=1e-6)
    slope = gradient(lambda x: log_cosh(x, labels), errors)
    torch.testing.assert_close(slope, errors.tanh() / 7, rtol=1e-5, atol=1e-7)


def contrastive_by_hand(u: np.ndarray, v: np.ndarray, similar: np.ndarray, margin: float) -> float:
    d = np.linalg.norm(u - v, axis=1)
    return float(np.where(similar == 1, 0.5 * d**2, 0.5 * np.maximum(0, margin - d) ** 2).mean())


def ranking_by_hand(u: np.ndarray, v: np.ndarray, scale: float) -> float:
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    return float(-np.log(np.diag(softmax64(u @ v.T * scale))).mean())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["contrastive", "simcse", "ranking"])
def test_losses_of_embeddings_equal_float64_formulas(name: str, size: int) -> None:
    """And their gradients at both embeddings."""
    u, labels = normal(size, 6, scale=0.8), classes(size, 2)
    v = u + normal(size, 6, seed=5, scale=0.5)
    everything = torch.ones(size, dtype=torch.bool), torch.eye(size, dtype=torch.bool)
    loss, by_hand = {
        "contrastive": (
            lambda u, v: contrastive(u, v, labels, 4.0),
            lambda u, v: contrastive_by_hand(u, v, labels.numpy(), 4.0),
        ),
        "simcse": (simcse, lambda u, v: ranking_by_hand(u, v, 20.0)),
        "ranking": (
            lambda u, v: multiple_negatives_ranking(u, v, *everything),
            lambda u, v: ranking_by_hand(u, v, 20.0),
        ),
    }[name]
    a, b = u.double().numpy(), v.double().numpy()
    assert loss(u, v).item() == pytest.approx(by_hand(a, b), rel=2e-5, abs=1e-6)
    for found, wanted in (
        (gradient(lambda x: loss(x, v), u), numeric_gradient(lambda x: by_hand(x, b), a)),
        (gradient(lambda x: loss(u, x), v), numeric_gradient(lambda x: by_hand(a, x), b)),
    ):
        assert np.abs(found.numpy() - wanted).max() < 1e-5


def test_contrastive_of_identical_embeddings() -> None:
    """A positive pair costs nothing, a negative one half the squared margin; neither has a slope that is not finite."""
    u = normal(3, 6)
    for label, wanted in ((1, 0.0), (0, 0.5 * 2.0**2)):
        labels = torch.full((3,), label)
        assert contrastive(u, u.clone(), labels, 2.0).item() == pytest.approx(wanted, abs=1e-5)
        assert gradient(lambda x, y=labels: contrastive(x, u, y, 2.0), u).isfinite().all()


def test_ranking_is_over_positive_pairs_and_leaves_duplicates_out() -> None:
    """A text that comes twice is no negative of itself: with all else orthogonal nothing is left to lose."""
    u, v, positive = normal(9, 6), normal(9, 6, seed=4), torch.tensor([1, 0, 1, 1, 0, 1, 0, 1, 1]) > 0
    wanted = ranking_by_hand(u[positive].double().numpy(), v[positive].double().numpy(), 20.0)
    assert multiple_negatives_ranking(u, v, positive, torch.eye(9) > 0).item() == pytest.approx(wanted, rel=1e-5)
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


def test_cosine_embedding_is_torchs_on_the_pairs_that_count() -> None:
    u, v = normal(8, 5), normal(8, 5, seed=4)
    similar, different = (torch.tensor(flags) > 0 for flags in ([1, 1, 0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 1, 1, 0]))
    chosen = similar | different
    wanted = nn.functional.cosine_embedding_loss(u[chosen], v[chosen], torch.where(similar, 1, -1)[chosen])
    assert cosine_embedding(u, v, similar, different).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert cosine_embedding(u, v, similar & different, similar & different).item() == 0

"""Losses against torch, scipy, numpy and numeric gradients."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch import Tensor, nn

from tasks import TASKS
from training.losses import LOSSES, binary_cross_entropy, cross_entropy, mean_squared_error, pearson

SIZES = (1, 2, 7, 64)  # a last batch is often ragged, and may be of one


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def classes(size: int, count: int, seed: int = 1) -> Tensor:
    return torch.randint(count, (size,), generator=torch.Generator().manual_seed(seed))


def similarities(size: int, seed: int = 2) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 5


def test_every_loss_of_the_task_table_exists() -> None:
    assert {name for task in TASKS.values() for name in task.losses} == set(LOSSES)
    assert [LOSSES[name] for name in ("ce", "bce", "mse", "pearson")] == [
        cross_entropy,
        binary_cross_entropy,
        mean_squared_error,
        pearson,
    ]


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


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_of_large_outputs_are_finite(name: str) -> None:
    outputs = normal(6, 5, scale=1e4) if name == "ce" else normal(6, scale=1e4)
    labels = classes(6, 5) if name == "ce" else classes(6, 2) if name == "bce" else similarities(6)
    assert LOSSES[name](outputs, labels).isfinite()
    assert gradient(LOSSES[name], outputs, labels).isfinite().all()

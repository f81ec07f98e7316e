"""The numbers of reports equal those of scikit-learn and scipy."""

import numpy as np
import pytest
from scipy.stats import binomtest, linregress
from sklearn.metrics import (
    confusion_matrix,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    root_mean_squared_error,
)

from evaluation.metrics import confusion, correlation, linear_fit
from reporting.measures import (
    RESAMPLES,
    binary_rates,
    errors_with_deviations,
    fit_to_labels,
    mcnemar,
    mean_and_deviation,
    paired_bootstrap,
    similarity_errors,
)
from tasks import PARA, SST

rng = np.random.default_rng


def test_confusion_matrices_equal_scikit_learn() -> None:
    labels, predicted = rng(0).integers(0, 5, 300), rng(1).integers(0, 4, 300)  # the fifth class is never predicted
    assert np.array_equal(confusion(SST, predicted, labels), confusion_matrix(labels, predicted, labels=range(5)))
    labels, predicted = rng(0).integers(0, 2, 9), np.zeros(9, np.int64)
    assert np.array_equal(confusion(PARA, predicted, labels), confusion_matrix(labels, predicted, labels=[0, 1]))


def test_the_best_line_equals_scipy() -> None:
    x, y = rng(0).normal(size=50) + 1e3, rng(1).normal(size=50)
    wanted = linregress(x, y)
    assert linear_fit(x, y) == pytest.approx((wanted.slope, wanted.intercept), rel=1e-9)
    assert fit_to_labels(x, y) == pytest.approx(wanted.slope * x + wanted.intercept, rel=1e-9)
    assert linear_fit(np.full(4, 2.0), np.arange(4.0)) == (0.0, 1.5)


def test_errors_equal_scikit_learn() -> None:
    labels = np.round(rng(0).random(80) * 5, 1).astype(np.float32)
    values = (labels + rng(1).normal(size=80)).astype(np.float32)
    assert similarity_errors(values, labels) == pytest.approx(
        {
            "MSE": mean_squared_error(labels, values),
            "RMSE": root_mean_squared_error(labels, values),
            "MAE": mean_absolute_error(labels, values),
            "R2": r2_score(labels, values),
        },
        abs=1e-6,
    )
    assert similarity_errors(fit_to_labels(values, labels), labels)["R2"] == pytest.approx(
        correlation(values, labels) ** 2
    )
    assert similarity_errors(values, np.ones(80, np.float32))["R2"] == 0.0


def test_bootstrap_deviations_are_those_of_repeated_experiments() -> None:
    """Of independent normal errors, the deviation of the mean square is sqrt(2 / n) and of the mean absolute .603."""
    count = 400
    labels = rng(0).random(count) * 5
    values = labels + rng(1).normal(size=count)
    found = errors_with_deviations(values, labels, fit=False)
    assert [value for value, _ in found.values()] == list(similarity_errors(values, labels).values())
    assert found["MSE"][1] == pytest.approx((2 / count) ** 0.5, rel=0.2)
    assert found["MAE"][1] == pytest.approx(((1 - 2 / np.pi) / count) ** 0.5, rel=0.2)
    assert errors_with_deviations(values, labels, fit=False) == found  # the same samples every time
    scaled = errors_with_deviations(-3 * values + 7, labels, fit=True)
    unscaled = errors_with_deviations(values, labels, fit=True)
    assert list(scaled) == list(unscaled) and np.allclose(list(scaled.values()), list(unscaled.values()))


def test_rates_by_hand() -> None:
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    predicted = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    assert binary_rates(PARA, predicted, labels) == pytest.approx(
        {"true positive": 3 / 4, "false positive": 2 / 6, "true negative": 4 / 6, "false negative": 1 / 4}
    )
    assert binary_rates(PARA, predicted[:4], labels[:4])["false positive"] == 0  # without any negative


def test_mean_and_deviation() -> None:
    values = [0.2, 0.5, 0.9]
    assert mean_and_deviation(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert mean_and_deviation([0.3]) == (0.3, None) and mean_and_deviation([]) == (None, None)


def test_mcnemar_equals_the_binomial_test_of_discordant_pairs() -> None:
    a, b = rng(0).random(100) < 0.7, rng(1).random(100) < 0.5
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    assert mcnemar(a, b) == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)
    assert mcnemar(a, b) == pytest.approx(mcnemar(b, a)) and mcnemar(a, a) == 1.0


def test_the_paired_bootstrap_sees_what_pairing_reveals() -> None:
    """The difference of two models with large common errors is certain although each score is not."""
    labels = rng(0).random(300) * 5
    common = rng(1).normal(size=300) * 2
    good, bad = labels + common, labels + common + 3 * rng(2).normal(size=300)
    low, high, p = paired_bootstrap(correlation, bad, good, labels)
    assert 0 < low < correlation(good, labels) - correlation(bad, labels) < high < 0.5 and p < 0.01
    assert paired_bootstrap(correlation, good, bad, labels) == pytest.approx((-high, -low, p))
    assert paired_bootstrap(correlation, good, good, labels) == (0.0, 0.0, 1.0)
    noise = [labels + rng(seed).normal(size=300) for seed in (3, 4)]
    assert paired_bootstrap(correlation, *noise, labels)[2] > 0.05
    assert paired_bootstrap(correlation, bad, labels, labels)[2] == pytest.approx(2 / (RESAMPLES + 1))

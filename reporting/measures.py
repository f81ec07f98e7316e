"""The numbers behind tables: errors of similarities, rates of binary labels, spreads, and tests of two models."""

from collections.abc import Callable, Iterator, Sequence
from statistics import mean, stdev

import numpy as np

from evaluation.metrics import confusion, correlation, linear_fit
from tasks import Task

RESAMPLES = 1000
SEED = 0  # of the resampling, so that a report made twice is the same

Metric = Callable[[np.ndarray, np.ndarray], float]  # of decided labels or similarities [N] and labels [N]


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None of too few values."""
    return mean(values) if values else None, stdev(values) if len(values) > 1 else None


# ----------------------------------------------------------------------------------------------------------------------
# One model


def accuracy(decided: np.ndarray, labels: np.ndarray) -> float:
    """The share of examples that are right."""
    return float((decided == labels).mean())


def metric_of(task: Task) -> Metric:
    """The task's own metric, a function of decided labels or similarities."""
    return correlation if task.kind == "similarity" else accuracy


def rates(task: Task, decided: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """True and false positives and negatives of binary labels [N], each as a share of its true label (R4, figure 9)."""
    (tn, fp), (fn, tp) = confusion(task, decided, labels).tolist()
    positives, negatives = max(tp + fn, 1), max(tn + fp, 1)
    return {
        "true positive": tp / positives,
        "false positive": fp / negatives,
        "true negative": tn / negatives,
        "false negative": fn / positives,
    }


def fitted(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`values` [N] mapped to the labels' scale by least squares, which a head trained with the Pearson loss lacks."""
    slope, intercept = linear_fit(values, labels)
    return slope * values.astype(np.float64) + intercept


def errors(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """MSE, RMSE, MAE and R2 of similarities [N] (R1, appendix H)."""
    residuals = values.astype(np.float64) - labels
    squares = float(np.mean(residuals**2))
    variance = float(np.var(labels, dtype=np.float64))
    return {
        "MSE": squares,
        "RMSE": squares**0.5,
        "MAE": float(np.mean(np.abs(residuals))),
        "R2": 1 - squares / variance if variance > 0 else 0.0,
    }


def resamples(count: int) -> Iterator[np.ndarray]:
    """Indices [count] of each bootstrap sample of `count` examples."""
    rng = np.random.default_rng(SEED)
    for _ in range(RESAMPLES):
        yield rng.integers(0, count, count)


def errors_and_deviations(values: np.ndarray, labels: np.ndarray, fit: bool) -> dict[str, tuple[float, float]]:
    """`errors` with their bootstrap standard deviation; with `fit`, after the best line, fitted to each sample anew."""

    def measured(rows: np.ndarray | slice) -> dict[str, float]:
        own, true = values[rows], labels[rows]
        return errors(fitted(own, true) if fit else own, true)

    samples = [measured(rows) for rows in resamples(len(values))]
    return {
        name: (value, float(np.std([sample[name] for sample in samples], ddof=1)))
        for name, value in measured(slice(None)).items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# Two models on the same examples


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> float:
    """p of McNemar's exact test: whether two classifiers, right or wrong on the same examples [N], are equally good.

    Only examples on which one alone is right tell them apart; under the null each is so in half of them (McNemar 1947).
    """
    from scipy.stats import binomtest

    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def paired_bootstrap(metric: Metric, a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """The 95% interval of metric(b) - metric(a) over bootstrap samples of the examples, and its two-sided p."""
    differences = np.array(
        [metric(b[rows], labels[rows]) - metric(a[rows], labels[rows]) for rows in resamples(len(labels))]
    )
    low, high = np.quantile(differences, [0.025, 0.975])
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(low), float(high), min(1.0, 2 * (int(tail) + 1) / (RESAMPLES + 1))

"""The numbers behind tables: errors of similarities, rates of binary labels, deviations, and tests of two models."""

from collections.abc import Callable, Iterator, Sequence
from statistics import mean, stdev

import numpy as np

from evaluation.metrics import confusion, correlation, linear_fit
from tasks import Task

RESAMPLES = 1000
SEED = 0  # of the bootstrap samples, so that the same report has the same numbers

MetricFunction = Callable[[np.ndarray, np.ndarray], float]  # of predictions [N] and labels [N]


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the sample standard deviation. A figure of too few values is None."""
    return mean(values) if values else None, stdev(values) if len(values) > 1 else None


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of correct predictions. Both arrays are [N]."""
    return float((predicted == labels).mean())


def metric_of(task: Task) -> MetricFunction:
    """Return the function that computes the task's metric from predicted labels or similarities."""
    return correlation if task.kind == "similarity" else accuracy


def binary_rates(task: Task, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return true and false positive and negative rates of binary labels [N] (R4, figure 9)."""
    counts = confusion(task, predicted, labels)
    (tn, fp), (fn, tp) = (counts / counts.sum(axis=1, keepdims=True).clip(min=1)).tolist()
    return {"true positive": tp, "false positive": fp, "true negative": tn, "false negative": fn}


def fit_to_labels(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `values` [N] mapped to the scale of the labels [N] by least squares.

    A head that was trained with the Pearson loss has an arbitrary scale.
    """
    slope, intercept = linear_fit(values, labels)
    return slope * values.astype(np.float64) + intercept


def similarity_errors(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return MSE, RMSE, MAE and R2 of similarities [N] (R1, appendix H)."""
    residuals = values.astype(np.float64) - labels
    mse = float(np.mean(residuals**2))
    variance = float(np.var(labels, dtype=np.float64))
    return {
        "MSE": mse,
        "RMSE": mse**0.5,
        "MAE": float(np.mean(np.abs(residuals))),
        "R2": 1 - mse / variance if variance > 0 else 0.0,
    }


def bootstrap_samples(count: int) -> Iterator[np.ndarray]:
    """Yield the indices [count] of each bootstrap sample of `count` examples."""
    rng = np.random.default_rng(SEED)
    for _ in range(RESAMPLES):
        yield rng.integers(0, count, count)


def errors_with_deviations(values: np.ndarray, labels: np.ndarray, fit: bool) -> dict[str, tuple[float, float]]:
    """Return `similarity_errors`, each with its bootstrap standard deviation.

    With `fit`, `values` are first mapped to the labels' scale, in each sample anew.
    """

    def errors_on(rows: np.ndarray | slice) -> dict[str, float]:
        similarities = fit_to_labels(values[rows], labels[rows]) if fit else values[rows]
        return similarity_errors(similarities, labels[rows])

    samples = [errors_on(rows) for rows in bootstrap_samples(len(values))]
    return {
        name: (value, float(np.std([sample[name] for sample in samples], ddof=1)))
        for name, value in errors_on(slice(None)).items()
    }


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """Return p of McNemar's exact test (McNemar 1947) that two classifiers are equally good.

    `correct_a` and `correct_b` [N] say whether each was right. The test counts the examples on which only one was
    right. Under the null hypothesis either classifier is right on half of them.
    """
    from scipy.stats import binomtest

    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def paired_bootstrap(
    metric: MetricFunction, a: np.ndarray, b: np.ndarray, labels: np.ndarray
) -> tuple[float, float, float]:
    """Return the bounds of the 95% interval of metric(b) - metric(a) over bootstrap samples, and its two-sided p.

    `a` and `b` are two models' predictions [N] of the same examples.
    """
    differences = np.array(
        [metric(b[rows], labels[rows]) - metric(a[rows], labels[rows]) for rows in bootstrap_samples(len(labels))]
    )
    low, high = np.quantile(differences, [0.025, 0.975])
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(low), float(high), min(1.0, 2 * (int(tail) + 1) / (RESAMPLES + 1))

"""Metrics by which labelled-text tasks are judged, exact over a data set.

Where a quotient would be 0/0 it is 0: a predictor of whom nothing can be said has earned nothing. So it is with
the correlations of a predictor that always says the same, which others define as nan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Values = NDArray[Any]


def accuracy(predicted_N: Ints, true_N: Ints) -> float:
    """Return the share of examples whose class is right; 0 of none."""
    return _ratio(_count(predicted_N == true_N), len(true_N))


def f1(predicted_N: Ints, true_N: Ints) -> float:
    """Return the harmonic mean of precision and recall of class 1; 0 where it neither occurs nor is predicted."""
    return _f1_of(1, predicted_N, true_N)


def macro_f1(predicted_N: Ints, true_N: Ints) -> float:
    """Return the mean of the F1 of every class that occurs or is predicted; 0 of none."""
    classes = np.union1d(predicted_N, true_N)
    return _ratio(sum(_f1_of(int(each), predicted_N, true_N) for each in classes), len(classes))


def matthews(predicted_N: Ints, true_N: Ints) -> float:
    """Return Matthews' correlation of any number of classes (Gorodkin 2004); 0 where one side is constant."""
    classes = np.union1d(predicted_N, true_N)
    predicted_C, true_C = (
        np.array([_count(x == each) for each in classes], dtype=np.float64) for x in (predicted_N, true_N)
    )
    count, right = float(len(true_N)), _count(predicted_N == true_N)
    covariance = float(right * count - predicted_C @ true_C)
    spread = (count**2 - predicted_C @ predicted_C) * (count**2 - true_C @ true_C)
    return _ratio(covariance, float(np.sqrt(spread)))


def pearson(predicted_N: Values, true_N: Values) -> float:
    """Return Pearson's correlation coefficient; 0 where one side is constant, or there are no examples."""
    if len(true_N) == 0 or any(np.all(x == x[0]) for x in (predicted_N, true_N)):
        return 0.0
    x_N, y_N = (_centred(np.asarray(values, dtype=np.float64)) for values in (predicted_N, true_N))
    return _ratio(float(x_N @ y_N), float(np.sqrt(x_N @ x_N) * np.sqrt(y_N @ y_N)))


def spearman(predicted_N: Values, true_N: Values) -> float:
    """Return Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs."""
    from scipy.stats import rankdata

    return pearson(rankdata(predicted_N), rankdata(true_N))


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""By the names that tasks use: functions of (N,) predictions and (N,) truths."""

CORRELATIONS = frozenset({"matthews", "pearson", "spearman"})
"""Those that say nothing where all truths are alike."""


def _f1_of(positive: int, predicted_N: Ints, true_N: Ints) -> float:
    both = _count((predicted_N == positive) & (true_N == positive))
    return _ratio(2 * both, _count(predicted_N == positive) + _count(true_N == positive))


def _count(chosen_N: NDArray[np.bool_]) -> float:
    return float(np.count_nonzero(chosen_N))


def _centred(x_N: Values) -> Values:
    """Return deviations from the mean, scaled so that their squares neither vanish nor overflow."""
    deviation_N = x_N - x_N.mean()
    return deviation_N / max(float(np.abs(deviation_N).max()), np.finfo(np.float64).tiny)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0

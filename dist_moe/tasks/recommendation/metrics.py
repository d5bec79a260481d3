"""Metrics of two-task predictions: AUC, BCE, MSE and the weighted loss, exact over the data set."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

PAPER_EVAL_BATCH = 128

Floats = NDArray[np.float64]


def two_task_metrics(
    probability_N: Floats, rating_N: Floats, target_N: NDArray[Any], weights: tuple[float, ...]
) -> dict[str, float]:
    """``probability_N``: of "watched"; ``rating_N``: predicted stars; ``target_N``: stars, 0 = not rated.

    ``weights``: of BCE over all pairs and of MSE over the rated ones in ``loss``. ``loss_by_batches`` is
    what the authors' code reports: the mean over batches of 128 of each batch's loss, weighted by
    its size, in which MSE averages over the rated pairs of the batch.
    """
    watched_N = target_N > 0
    bce_N = _cross_entropy(probability_N, watched_N)
    error_N = np.where(watched_N, (rating_N - target_N) ** 2, 0.0)
    bce = float(bce_N.mean())
    mse = float(error_N.sum() / max(watched_N.sum(), 1))
    return {
        "auc": area_under_curve(probability_N, watched_N),
        "bce": bce,
        "mse": mse,
        "loss": weights[0] * bce + weights[1] * mse,
        "loss_by_batches": _loss_by_batches(bce_N, error_N, watched_N, weights),
    }


def area_under_curve(score_N: Floats, positive_N: NDArray[np.bool_]) -> float:
    """Exact area under the ROC curve, ties counted half; nan if only one class occurs."""
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return float("nan")
    rank_sum = rankdata(score_N)[positive_N].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def _cross_entropy(probability_N: Floats, watched_N: NDArray[np.bool_]) -> Floats:
    likelihood = np.where(watched_N, probability_N, 1 - probability_N)
    return -np.log(np.maximum(likelihood, np.finfo(np.float64).tiny))


def _loss_by_batches(bce_N: Floats, error_N: Floats, watched_N: NDArray[np.bool_], weights: tuple[float, ...]) -> float:
    total = 0.0
    for start in range(0, len(bce_N), PAPER_EVAL_BATCH):
        batch = slice(start, start + PAPER_EVAL_BATCH)
        mse = error_N[batch].sum() / max(watched_N[batch].sum(), 1)
        total += weights[0] * bce_N[batch].sum() + weights[1] * mse * len(bce_N[batch])
    return float(total / max(len(bce_N), 1))

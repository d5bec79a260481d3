"""Metrics of two-task predictions: AUC, BCE, MSE and the weighted loss, exact over the data set."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_moe.tasks.ranking_metrics import Floats, area_under_curve

PAPER_EVAL_BATCH = 128


def two_task_metrics(
    probability_N: Floats, rating_N: Floats, target_N: NDArray[Any], weights: tuple[float, ...]
) -> dict[str, float]:
    """Return AUC, BCE, MSE and losses of (N,) predictions.

    ``probability_N``: of "watched"; ``rating_N``: predicted stars; ``target_N``: stars, 0 = not rated.

    ``weights``: of BCE over all pairs and of MSE over the rated ones in ``loss``. ``loss_by_batches`` is
    what the authors' code reports: the mean over batches of 128 of each batch's loss, weighted by
    its size, in which MSE averages over the rated pairs of the batch.
    """
    watched_N = target_N > 0
    likelihood_N = np.where(watched_N, probability_N, 1 - probability_N)
    bce_N = -np.log(np.maximum(likelihood_N, np.finfo(np.float64).tiny))
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


def _loss_by_batches(bce_N: Floats, error_N: Floats, watched_N: NDArray[np.bool_], weights: tuple[float, ...]) -> float:
    total = 0.0
    for start in range(0, len(bce_N), PAPER_EVAL_BATCH):
        batch = slice(start, start + PAPER_EVAL_BATCH)
        mse = error_N[batch].sum() / max(watched_N[batch].sum(), 1)
        total += weights[0] * bce_N[batch].sum() + weights[1] * mse * len(bce_N[batch])
    return float(total / max(len(bce_N), 1))

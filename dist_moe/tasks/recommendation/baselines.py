"""Predictors that look at nothing but counts: what a model must beat."""

from __future__ import annotations

import numpy as np

from dist_moe.data.movielens import MovieLens, PairTable
from dist_moe.tasks.recommendation.metrics import two_task_metrics

SMOOTHING = 1.0


def baseline_metrics(data: MovieLens, part: PairTable, weights: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """Return ``constant``, the training means for every pair, and ``popularity``, the item's training means.

    Those are per item the share of its pairs that were watched and the mean of its ratings, each smoothed by one pair
    at the mean of all.
    """
    item_N, rating_N = data.train.item_N, np.asarray(data.train.rating_N, dtype=np.float64)
    watched_N = rating_N > 0
    share, stars = watched_N.mean(), rating_N.sum() / max(watched_N.sum(), 1)
    pairs_I = np.bincount(item_N, minlength=data.num_items)
    watched_I = np.bincount(item_N, weights=watched_N, minlength=data.num_items)
    stars_I = np.bincount(item_N, weights=rating_N, minlength=data.num_items)
    share_I = (watched_I + SMOOTHING * share) / (pairs_I + SMOOTHING)
    stars_I = (stars_I + SMOOTHING * stars) / (watched_I + SMOOTHING)
    predictions = {
        "constant": (np.full(len(part), share), np.full(len(part), stars)),
        "popularity": (share_I[part.item_N], stars_I[part.item_N]),
    }
    return {
        name: two_task_metrics(probability_N, rating_N, np.asarray(part.rating_N), weights)
        for name, (probability_N, rating_N) in predictions.items()
    }

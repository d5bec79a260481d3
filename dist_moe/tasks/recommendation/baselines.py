"""Predictors that look at nothing but counts: what a model must beat."""

from __future__ import annotations

import numpy as np

from dist_moe.data.movielens import MovieLens, PairTable
from dist_moe.tasks.recommendation.metrics import Floats, two_task_metrics

SMOOTHING = 1.0


def baseline_metrics(data: MovieLens, part: PairTable, weights: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """``constant``: the training means for every pair. ``popularity``: the item's training means."""
    predictions = {"constant": _constant(data, part), "popularity": _popularity(data, part)}
    return {
        name: two_task_metrics(probability_N, rating_N, np.asarray(part.rating_N), weights)
        for name, (probability_N, rating_N) in predictions.items()
    }


def _constant(data: MovieLens, part: PairTable) -> tuple[Floats, Floats]:
    rating_N = np.asarray(data.train.rating_N, dtype=np.float64)
    watched_N = rating_N > 0
    return np.full(len(part), watched_N.mean()), np.full(len(part), rating_N[watched_N].mean())


def _popularity(data: MovieLens, part: PairTable) -> tuple[Floats, Floats]:
    """Per item: the share of its pairs that were watched and the mean of its ratings, each smoothed
    by one pair at the mean of all."""
    item_N, rating_N = data.train.item_N, np.asarray(data.train.rating_N, dtype=np.float64)
    watched_N = rating_N > 0
    pairs_I = np.bincount(item_N, minlength=data.num_items)
    watched_I = np.bincount(item_N, weights=watched_N, minlength=data.num_items)
    stars_I = np.bincount(item_N, weights=rating_N, minlength=data.num_items)
    share_I = (watched_I + SMOOTHING * watched_N.mean()) / (pairs_I + SMOOTHING)
    stars_I = (stars_I + SMOOTHING * rating_N[watched_N].mean()) / (watched_I + SMOOTHING)
    return share_I[part.item_N], stars_I[part.item_N]

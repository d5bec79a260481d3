"""Metrics of predictions against naive ones, and the predictors that only count."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_moe.data.movielens import MovieLens, PairTable
from dist_moe.tasks.ranking_metrics import area_under_curve
from dist_moe.tasks.recommendation.baselines import SMOOTHING, baseline_metrics
from dist_moe.tasks.recommendation.metrics import PAPER_EVAL_BATCH, two_task_metrics

SCORES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
SCORED = st.lists(st.tuples(SCORES, st.booleans()), max_size=30)
PREDICTED = st.tuples(st.floats(0.01, 0.99), st.floats(-1, 6), st.integers(0, 5))


def auc_of_pairs(scored: list[tuple[float, bool]]) -> float:
    won = [
        1.0 if positive > negative else 0.5 if positive == negative else 0.0
        for positive, is_positive in scored
        if is_positive
        for negative, is_watched in scored
        if not is_watched
    ]
    return float(np.mean(won)) if won else math.nan


@given(SCORED)
def test_auc_counts_pairs_and_half_of_ties(scored: list[tuple[float, bool]]) -> None:
    score_N = np.array([score for score, _ in scored], dtype=np.float64)
    positive_N = np.array([positive for _, positive in scored], dtype=bool)
    assert area_under_curve(score_N, positive_N) == pytest.approx(auc_of_pairs(scored), abs=1e-12, nan_ok=True)


@given(st.lists(PREDICTED, min_size=1, max_size=300), st.tuples(st.floats(0, 2), st.floats(0, 2)))
def test_losses_by_a_loop(predicted: list[tuple[float, float, int]], weights: tuple[float, float]) -> None:
    bce = [-math.log(p if target else 1 - p) for p, _, target in predicted]
    squares = [(stars - target) ** 2 for _, stars, target in predicted if target]
    mse = sum(squares) / len(squares) if squares else 0.0
    batches = [predicted[start : start + PAPER_EVAL_BATCH] for start in range(0, len(predicted), PAPER_EVAL_BATCH)]
    by_batches: list[float] = []
    for batch in batches:
        rated = [(stars - target) ** 2 for _, stars, target in batch if target]
        entropy = np.mean([-math.log(p if target else 1 - p) for p, _, target in batch])
        by_batches.append(len(batch) * float(weights[0] * entropy + weights[1] * (np.mean(rated) if rated else 0.0)))
    probability_N, rating_N, target_N = (np.array(column) for column in zip(*predicted, strict=True))
    metrics = two_task_metrics(probability_N, rating_N.astype(np.float64), target_N.astype(np.int8), weights)
    assert metrics["bce"] == pytest.approx(np.mean(bce), rel=1e-9)
    assert metrics["mse"] == pytest.approx(mse, rel=1e-9)
    assert metrics["loss"] == pytest.approx(weights[0] * np.mean(bce) + weights[1] * mse, rel=1e-9)
    assert metrics["loss_by_batches"] == pytest.approx(sum(by_batches) / len(predicted), rel=1e-9)


def test_a_certainty_that_is_wrong_costs_much_but_not_everything() -> None:
    metrics = two_task_metrics(np.array([0.0]), np.array([3.0]), np.array([5], dtype=np.int8), (0.5, 0.5))
    assert 100 < metrics["bce"] < math.inf


def table(rows: Sequence[Sequence[int]]) -> PairTable:
    user_N, item_N, rating_N = np.array(rows).T
    return PairTable(user_N.astype(np.int32), item_N.astype(np.int32), rating_N.astype(np.int8))


@pytest.fixture
def data() -> MovieLens:
    rng = np.random.default_rng(0)
    rows = [
        (int(u), int(i), int(rng.integers(1, 6)) if rng.random() < (i + 1) / 8 else 0)
        for u in range(40)
        for i in range(7)
    ]
    rng.shuffle(rows)
    return MovieLens(table(rows[:220]), table(rows[220:]), table(rows[220:]), 40, 8, {})


def test_constant_predictor(data: MovieLens) -> None:
    metrics = baseline_metrics(data, data.test, (0.5, 0.5))["constant"]
    watched = float((data.train.rating_N > 0).mean())
    stars = float(data.train.rating_N[data.train.rating_N > 0].mean())
    rated = data.test.rating_N[data.test.rating_N > 0]
    assert metrics["auc"] == 0.5
    assert metrics["mse"] == pytest.approx(np.mean((rated - stars) ** 2))
    share = len(rated) / len(data.test)
    assert metrics["bce"] == pytest.approx(-share * math.log(watched) - (1 - share) * math.log(1 - watched))


def test_popularity_predictor_by_a_loop(data: MovieLens) -> None:
    pairs: dict[int, int] = defaultdict(int)
    watched: dict[int, int] = defaultdict(int)
    stars: dict[int, int] = defaultdict(int)
    for item, rating in zip(data.train.item_N.tolist(), data.train.rating_N.tolist(), strict=True):
        pairs[item] += 1
        watched[item] += rating > 0
        stars[item] += rating
    mean_watched, mean_stars = sum(watched.values()) / sum(pairs.values()), sum(stars.values()) / sum(watched.values())
    predicted = [
        (
            (watched[item] + SMOOTHING * mean_watched) / (pairs[item] + SMOOTHING),
            (stars[item] + SMOOTHING * mean_stars) / (watched[item] + SMOOTHING),
        )
        for item in data.test.item_N.tolist()
    ]
    probability_N, rating_N = (np.array(column) for column in zip(*predicted, strict=True))
    expected = two_task_metrics(probability_N, rating_N, data.test.rating_N, (0.5, 0.25))
    metrics = baseline_metrics(data, data.test, (0.5, 0.25))
    assert metrics["popularity"] == pytest.approx(expected)
    assert metrics["popularity"]["auc"] > 0.6 > metrics["constant"]["auc"]


def test_an_item_never_seen_gets_the_means(data: MovieLens) -> None:
    unseen = table([(0, 7, 4), (1, 7, 0)])
    metrics = baseline_metrics(data, unseen, (0.5, 0.5))
    assert metrics["popularity"] == pytest.approx(metrics["constant"])

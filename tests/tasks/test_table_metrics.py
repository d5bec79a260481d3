"""Metrics of a table's targets against pairs and rows that are counted one by one."""

from __future__ import annotations

import math
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.data.tables import Target
from dist_moe.tasks.evaluation import with_reasons
from dist_moe.tasks.multi_task_tables.metrics import (
    CALIBRATION_BINS,
    calibration_bins,
    constant_columns,
    labels_of,
    table_metrics,
    table_undefined,
)
from dist_moe.tasks.ranking_metrics import area_under_curve, grouped_area_under_curve

TARGETS = (Target("click", "binary"), Target("stars", "numeric"), Target("like", "binary"))
ROWS = st.lists(
    st.tuples(
        st.integers(-1, 3),  # group
        st.sampled_from([0, 1, 2, 3, 0.5]),  # weight
        *[st.tuples(st.sampled_from([-3.0, -0.5, 0.0, 0.5, 40.0]), st.sampled_from([0, 1, math.nan]))] * 3,
    ),
    max_size=40,
)


def part_of(rows: list[Any]) -> Any:
    return SimpleNamespace(
        target_NT=np.array([[label for _, label in row[2:]] for row in rows], dtype=np.float32).reshape(-1, 3),
        weight_N=np.array([row[1] for row in rows], dtype=np.float32),
        group_N=np.array([row[0] for row in rows], dtype=np.int64),
    )


def auc_of_pairs(rows: list[tuple[float, float, float]]) -> float:
    """Of (score, label, weight): all pairs, one by one."""
    won = pairs = 0.0
    for score, label, weight in rows:
        for other, other_label, other_weight in rows:
            if label == 1 and other_label == 0:
                pairs += weight * other_weight
                won += weight * other_weight * (1.0 if score > other else 0.5 if score == other else 0.0)
    return won / pairs if pairs else math.nan


def naive_metrics(rows: list[Any], place: int) -> dict[str, float]:
    """Of one target: a row after the other; nan where there is no value."""
    kept = [(*row[place], row[1], row[0]) for row in rows if row[1] > 0 and not math.isnan(row[place][1])]
    weight = sum(w for *_, w, _ in kept)
    if TARGETS[place - 2].kind == "numeric":
        return {"mse": sum(w * (s - y) ** 2 for s, y, w, _ in kept) / weight if weight else math.nan}
    metrics = {"auc": auc_of_pairs([row[:3] for row in kept])}
    in_group = sorted((row for row in kept if row[3] >= 0), key=lambda row: row[3])
    if in_group:
        groups = [[row[:3] for row in group] for _, group in groupby(in_group, key=lambda row: row[3])]
        areas = [(sum(w for *_, w in group), auc_of_pairs(group)) for group in groups]
        known = [(w, area) for w, area in areas if not math.isnan(area)]
        metrics["gauc"] = sum(w * area for w, area in known) / sum(w for w, _ in known) if known else math.nan
    if not weight:
        return metrics | dict.fromkeys(("log_loss", "ne", "calibration"), math.nan)
    rate = sum(w * y for _, y, w, _ in kept) / weight
    metrics["log_loss"] = sum(w * math.log1p(math.exp(-s if y else s)) for s, y, w, _ in kept) / weight
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate) if 0 < rate < 1 else math.nan
    expected = sum(w / (1 + math.exp(-s)) for s, _, w, _ in kept) / weight
    return metrics | {
        "ne": metrics["log_loss"] / entropy,
        "calibration": expected / rate if rate else math.nan,
    }


@settings(deadline=None)  # its first call imports much
@given(ROWS, st.tuples(*[st.sampled_from([0.0, 0.5, 2.0])] * 3))
def test_metrics_are_those_of_a_loop(rows: list[Any], weights: tuple[float, float, float]) -> None:
    labels = labels_of(part_of(rows), TARGETS)
    columns_TN = np.array([[score for score, _ in row[2:]] for row in rows], dtype=np.float64).reshape(-1, 3).T
    metrics, undefined = table_metrics(columns_TN, labels, weights), table_undefined(labels, weights)
    naive = [naive_metrics(rows, place) for place in (2, 3, 4)]
    for target, expected in zip(TARGETS, naive, strict=True):
        for name, value in expected.items():
            assert metrics[f"{name}_{target.name}"] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
            assert (f"{name}_{target.name}" in undefined) == math.isnan(value)
    for name in ("auc", "gauc", "log_loss", "ne", "mse"):
        values = [one[name] for one in naive if name in one and not math.isnan(one[name])]
        if name in metrics:
            expected_mean = np.mean(values) if values else math.nan
            assert metrics[name] == pytest.approx(expected_mean, rel=1e-9, nan_ok=True)
            assert (name in undefined) == (not values)
    losses = [one.get("mse", one.get("log_loss", math.nan)) for one in naive]
    terms = [weight * loss for weight, loss in zip(weights, losses, strict=True) if weight and not math.isnan(loss)]
    assert metrics["loss"] == pytest.approx(sum(terms), rel=1e-9)
    assert ("loss" in undefined) == (not terms)
    assert {name for name, value in metrics.items() if math.isnan(value)} == set(undefined) - {"loss"}
    assert undefined.keys() <= metrics.keys()


def test_a_weight_is_a_number_of_rows() -> None:
    rng = np.random.default_rng(0)
    score_N, positive_N, group_N = rng.integers(0, 9, 300) / 9, rng.random(300) < 0.3, rng.integers(-1, 20, 300)
    weight_N = rng.integers(0, 4, 300).astype(np.float32)
    several = [np.repeat(x_N, weight_N.astype(int)) for x_N in (score_N, positive_N, group_N)]
    once_N = np.ones(len(several[0]), dtype=np.float32)
    assert area_under_curve(score_N, positive_N, weight_N) == area_under_curve(several[0], several[1])
    ours = grouped_area_under_curve(score_N, positive_N, weight_N, group_N)
    assert ours == pytest.approx(grouped_area_under_curve(several[0], several[1], once_N, several[2]), abs=1e-14)
    assert math.isnan(area_under_curve(np.array([math.nan, 1.0]), np.array([True, False])))


def test_bins_are_equally_heavy_and_keep_equal_predictions_together() -> None:
    rng = np.random.default_rng(1)
    logit_N, weight_N = rng.normal(size=20_000), rng.random(20_000) + 0.5
    label_N = (rng.random(20_000) < 1 / (1 + np.exp(-logit_N))).astype(np.float64)
    probability_C, share_C, weight_C = calibration_bins(logit_N, label_N, weight_N)
    assert len(weight_C) == CALIBRATION_BINS
    np.testing.assert_allclose(weight_C, weight_N.sum() / CALIBRATION_BINS, rtol=1e-3)
    np.testing.assert_allclose(probability_C, share_C, atol=0.05)  # these logits are the truth
    first_N = np.argsort(logit_N)[:1000]
    expected = np.average(1 / (1 + np.exp(-logit_N[first_N])), weights=weight_N[first_N])
    assert probability_C[0] == pytest.approx(expected, rel=0.02)
    (probability,), (share,), (weight,) = calibration_bins(np.zeros(9), np.arange(9) % 3 == 0, np.ones(9))
    assert (probability, share, weight) == (0.5, pytest.approx(1 / 3), 9)


def test_the_constant_predictor_is_the_base_rate_of_training() -> None:
    nan = math.nan
    train = labels_of(part_of([(-1, 1, (0, 1), (0, 5), (0, nan)), (-1, 3, (0, 0), (0, 1), (0, nan))]), TARGETS)
    columns_TN = constant_columns(train, 2)
    np.testing.assert_allclose(columns_TN, [[math.log(1 / 3)] * 2, [2.0] * 2, [0.0] * 2])
    metrics = table_metrics(columns_TN, train, (1.0, 1.0, 1.0))
    assert metrics["ne_click"] == pytest.approx(1.0)
    assert metrics["ece_click"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["mse_stars"] == 3.0
    one_class = labels_of(part_of([(-1, 1, (0, 1), (0, 0), (0, 0))] * 2), TARGETS)
    assert np.isfinite(constant_columns(one_class, 1)).all()


def test_what_has_no_value_is_null_with_a_reason() -> None:
    labels = labels_of(part_of([(0, 1, (0.5, 1), (2, 1), (1, 0)), (1, 1, (0.5, 1), (2, math.nan), (1, 1))]), TARGETS)
    weights = (1.0, 1.0, 1.0)
    metrics = with_reasons(table_metrics(np.zeros((3, 2)), labels, weights), table_undefined(labels, weights))
    why = "one class only, click is 1 in all rows"
    assert {name: metrics["undefined"][name] for name in ("auc_click", "gauc_click", "ne_click")} == dict.fromkeys(
        ("auc_click", "gauc_click", "ne_click"), why
    )
    assert metrics["undefined"]["gauc_like"] == "no group has both classes of like"
    assert metrics["undefined"].keys() == {"auc_click", "gauc_click", "ne_click", "gauc_like", "gauc"}
    assert metrics["auc"] == metrics["auc_like"] == 0.5

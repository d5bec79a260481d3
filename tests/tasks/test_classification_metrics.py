"""Metrics of classes and numbers against naive ones, cases by hand, and every 0/0."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.data.labelled_text import GRADED, TASKS
from dist_moe.tasks.labelled_text.classification_metrics import (
    METRICS,
    accuracy,
    f1,
    macro_f1,
    matthews,
    pearson,
    spearman,
)

BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=40)
CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40)
NUMBERS = st.lists(st.tuples(st.integers(-9, 9), st.integers(-3, 3)), max_size=25)


def columns(pairs: list[tuple[int, int]]) -> tuple[Any, Any]:
    """Predictions (fp64, as a task has them) and truths."""
    return np.array([p for p, _ in pairs], dtype=np.float64), np.array([t for _, t in pairs], dtype=np.int64)


def naive_f1(pairs: list[tuple[int, int]], positive: int) -> Fraction:
    predicted = [t for p, t in pairs if p == positive]
    true = [p for p, t in pairs if t == positive]
    if not predicted or not true:
        return Fraction(0)
    precision = Fraction(predicted.count(positive), len(predicted))
    recall = Fraction(true.count(positive), len(true))
    return 2 * precision * recall / (precision + recall) if precision + recall else Fraction(0)


@given(CLASSES)
def test_accuracy_and_f1_by_counting(pairs: list[tuple[int, int]]) -> None:
    right = [p == t for p, t in pairs]
    assert accuracy(*columns(pairs)) == (pytest.approx(sum(right) / len(right)) if right else 0)
    assert f1(*columns(pairs)) == pytest.approx(float(naive_f1(pairs, 1)))
    each = [naive_f1(pairs, c) for c in {c for pair in pairs for c in pair}]
    assert macro_f1(*columns(pairs)) == pytest.approx(float(sum(each) / len(each)) if each else 0)


@given(BINARY)
def test_matthews_of_two_classes_by_its_four_counts(pairs: list[tuple[int, int]]) -> None:
    tp, fp, fn, tn = (pairs.count(cell) for cell in ((1, 1), (1, 0), (0, 1), (0, 0)))
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(spread) if spread else 0.0
    assert matthews(*columns(pairs)) == pytest.approx(expected, abs=1e-12)


@given(CLASSES)
def test_matthews_of_several_classes_is_the_correlation_of_their_indicators(pairs: list[tuple[int, int]]) -> None:
    """Gorodkin's definition, over all pairs of examples: covariances summed over classes."""

    def covariance(left: int, right: int) -> Fraction:
        total = Fraction(0)
        for c in range(4):
            x, y = [int(pair[left] == c) for pair in pairs], [int(pair[right] == c) for pair in pairs]
            mean_x, mean_y = Fraction(sum(x), len(x)), Fraction(sum(y), len(y))
            total += sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        return total

    if not pairs:
        assert matthews(*columns(pairs)) == 0
        return
    spread = covariance(0, 0) * covariance(1, 1)
    expected = float(covariance(0, 1)) / math.sqrt(spread) if spread else 0.0
    assert matthews(*columns(pairs)) == pytest.approx(expected, abs=1e-12)


def naive_ranks(values: list[int]) -> list[float]:
    return [sum(x < value for x in values) + (sum(x == value for x in values) + 1) / 2 for value in values]


def naive_pearson(x: list[float], y: list[float]) -> float:
    if len(x) < 2 or len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0
    return statistics.correlation(x, y)


@settings(deadline=None)  # its first call imports much
@given(NUMBERS)
def test_correlations_by_definition(pairs: list[tuple[int, int]]) -> None:
    x, y = [p for p, _ in pairs], [t for _, t in pairs]
    assert pearson(*columns(pairs)) == pytest.approx(naive_pearson([*map(float, x)], [*map(float, y)]), abs=1e-9)
    assert spearman(*columns(pairs)) == pytest.approx(naive_pearson(naive_ranks(x), naive_ranks(y)), abs=1e-9)


def test_by_hand() -> None:
    predicted, true = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    assert accuracy(predicted, true) == pytest.approx(4 / 6)
    assert f1(predicted, true) == pytest.approx(2 / 3)
    assert matthews(predicted, true) == pytest.approx(1 / 3)
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 10.0, 100.0, 1000.0]), np.array([1, 2, 3, 4])) == pytest.approx(1)
    assert pearson(np.array([1e-200, 2e-200, 4e-200]), np.array([1e200, 2e200, 4e200])) == pytest.approx(1)
    assert matthews(np.array([0, 1, 2]), np.array([1, 2, 0])) == pytest.approx(-0.5)


@pytest.mark.parametrize("name", METRICS)
def test_nothing_over_nothing_is_nothing(name: str) -> None:
    none = np.zeros(0)
    assert METRICS[name](none, none) == 0
    constant, mixed = np.zeros(4), np.array([0, 1, 0, 1])
    if name in ("f1", "matthews", "pearson", "spearman"):
        assert METRICS[name](constant, mixed) == METRICS[name](constant, constant) == 0
    if name in ("pearson", "spearman"):
        assert METRICS[name](np.full(3, 0.1), np.array([0.1, 0.2, 0.3])) == 0  # no residue of 0.1's rounding


def test_every_task_names_metrics_that_there_are() -> None:
    for task in (*TASKS.values(), *GRADED.values()):
        assert task.metrics
        assert set(task.metrics) <= METRICS.keys()
        assert bool(task.classes) != ("pearson" in task.metrics)

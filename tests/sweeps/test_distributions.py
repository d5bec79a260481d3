"""Draws follow the distributions that the sweep file names, and Optuna's samplers know the same ones."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from dist_moe.sweeps.distributions import Between, Choice, Drawn, IntLogUniform, IntUniform, LogUniform, Uniform

DRAWS = 4000


def draws(drawn: Drawn) -> list[float]:
    generator = np.random.default_rng(0)
    return [drawn.draw(generator) for _ in range(DRAWS)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (Uniform(uniform=(-1.0, 3.0)), stats.uniform(-1, 4)),
        (LogUniform(log_uniform=(5e-5, 5e-4)), stats.loguniform(5e-5, 5e-4)),
    ],
)
def test_numbers_follow_their_distribution(drawn: Between, expected: stats.rv_continuous) -> None:
    values = draws(drawn)
    assert stats.kstest(values, expected.cdf).pvalue > 0.01
    low, high = drawn.ends
    assert low <= min(values) < max(values) <= high


def test_int_uniform_includes_both_ends() -> None:
    counts = Counter(draws(IntUniform(int_uniform=(2, 5))))
    assert sorted(counts) == [2, 3, 4, 5]
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


def test_int_log_uniform_gives_every_number_its_share_of_the_logarithm() -> None:
    counts = Counter(draws(IntLogUniform(int_log_uniform=(1, 8))))
    shares = [math.log((i + 0.5) / (i - 0.5)) / math.log(8.5 / 0.5) for i in range(1, 9)]
    expected = [DRAWS * share for share in shares]
    assert stats.chisquare([counts[i] for i in range(1, 9)], expected).pvalue > 0.01


def test_choice_is_even_and_gives_back_whole_sections() -> None:
    drawn = Choice(choice=[None, 3, "a", {"name": "top_k", "k": 2}])
    stored = Counter(draws(drawn))
    assert stats.chisquare(list(stored.values())).pvalue > 0.01
    values = [drawn.value(one) for one in stored]
    assert all(value in values for value in drawn.choice)
    assert len(values) == 4


@pytest.mark.parametrize(
    "drawn",
    [
        Choice(choice=[1, "a", [1, 2]]),
        Uniform(uniform=(0.0, 1.0)),
        LogUniform(log_uniform=(1e-3, 1.0)),
        IntUniform(int_uniform=(0, 9)),
        IntLogUniform(int_log_uniform=(1, 9)),
    ],
)
def test_optuna_accepts_every_draw(drawn: Drawn) -> None:
    theirs = drawn.optuna()
    assert all(theirs._contains(theirs.to_internal_repr(value)) for value in draws(drawn)[:200])


def test_extremes_are_the_ends_or_all_choices() -> None:
    assert Choice(choice=[3, 1, 2]).extremes() == [3, 1, 2]
    assert LogUniform(log_uniform=(0.1, 10.0)).extremes() == [0.1, 10.0]

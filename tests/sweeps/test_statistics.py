"""The paper's statistics against enumeration of all draws, and against what the words mean."""

from __future__ import annotations

import itertools
import math
import statistics as std

import numpy as np
import pytest

from dist_moe.sweeps.statistics import (
    best_spread,
    best_trials,
    budget_curve,
    budget_to_reach,
    chosen_again,
    expected_best,
    with_bounded_losses,
)

VAL = [0.5, 0.3, 0.9, 0.3]  # two trials share the least loss
TEST = [1.0, 2.0, 4.0, 8.0]
INF, NAN = math.inf, math.nan


def outcomes(val: list[float], test: list[float], budget: int) -> list[float]:
    """The chosen trial's test loss for every ordered draw; the first drawn of equals is chosen."""
    draws = itertools.product(range(len(val)), repeat=budget)
    return [test[min(draw, key=lambda trial: val[trial])] for draw in draws]


@pytest.mark.parametrize(
    ("trials", "fraction", "count"),
    [(500, 0.05, 25), (60, 0.05, 3), (61, 0.05, 4), (30, 0.05, 2), (1, 0.05, 1), (7, 1.0, 7), (100, 0.07, 7)],
)
def test_how_many_trials_are_the_best_fraction(trials: int, fraction: float, count: int) -> None:
    assert len(best_trials(np.arange(trials), fraction)) == count


def test_best_trials_are_sorted_with_the_earlier_of_equals_first_and_diverged_ones_last() -> None:
    assert best_trials([NAN, *VAL, INF, -INF], 1.0).tolist() == [2, 4, 1, 3, 0, 5, 6]


def test_the_spread_of_the_best_has_the_choice_of_them_in_it() -> None:
    """All 4^4 searches of four trials, two of them averaged, in an order that the first of equals decides."""
    searches = itertools.product(range(4), repeat=4)
    means = [std.mean(TEST[i] for i in sorted(search, key=lambda i: VAL[i])[:2]) for search in searches]
    low, high = best_spread(VAL, TEST, 0.5)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())


def test_a_search_made_again_takes_the_draw_that_its_own_seeds_choose() -> None:
    val = np.array([[1.0, 4.0], [2.0, 2.0], [0.0, NAN]])
    test = np.array([[10.0, 40.0], [20.0, 21.0], [0.0, 0.0]])
    drawn = np.array([[0, 1, 0], [0, 1, 0], [1, 0, 2], [2, 2, 2], [2, 0, 2]])
    seeds = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    # Seed 0 alone prefers draw 0, seed 1 and both together draw 1; draw 2 lacks a seed and is taken if alone.
    assert chosen_again(val, test, drawn, seeds).tolist() == [10.0, 21.0, 20.5, 40.0, 25.0]
    test[1, 1] = NAN  # which validation does not know
    assert chosen_again(val, test, drawn, seeds).tolist() == [10.0, 40.0, 30.0, 40.0, 25.0]


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_closed_form_is_the_mean_over_all_draws(budget: int) -> None:
    assert expected_best(VAL, TEST, [budget])[0] == pytest.approx(std.mean(outcomes(VAL, TEST, budget)), rel=1e-12)


def test_bootstrap_agrees_with_the_closed_form() -> None:
    generator = np.random.default_rng(1)
    val = generator.random(50).round(1)  # many ties
    test = val + generator.normal(0, 0.1, 50)
    budgets, resamples = [1, 2, 5, 20, 50], 20_000
    curve = budget_curve(val, test, budgets, resamples, seed=3)
    error = test.std() / math.sqrt(resamples)  # at most, at any budget
    assert np.abs(curve.expected - expected_best(val, test, budgets)).max() < 5 * error
    assert curve.budgets.tolist() == budgets


def test_band_of_the_bootstrap_is_that_of_all_draws() -> None:
    val, test = list(range(20)), [float(i) for i in range(20)]
    curve = budget_curve(val, test, [2], resamples=40_000, seed=0)
    everything = sorted(outcomes([float(v) for v in val], test, 2))
    assert abs(curve.low[0] - everything[int(0.05 * 400)]) <= 1
    assert abs(curve.high[0] - everything[int(0.95 * 400)]) <= 1


def test_bootstrap_repeats_itself_and_depends_on_its_seed() -> None:
    one, same, other = (budget_curve(VAL, TEST, [1, 3], 50, seed) for seed in (1, 1, 2))
    assert one.expected.tolist() == same.expected.tolist() != other.expected.tolist()


def test_a_budget_does_not_depend_on_the_others_asked_for() -> None:
    alone, among = budget_curve(VAL, TEST, [4], 50), budget_curve(VAL, TEST, [1, 4, 2], 50)
    assert alone.expected[0] == among.expected[1]


def test_least_budget_that_reaches_a_level() -> None:
    curve = budget_curve([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1, 2, 4, 8, 64], 4000)
    assert budget_to_reach(curve, 3.0) == 1
    assert budget_to_reach(curve, float(curve.expected[2])) == 4
    assert budget_to_reach(curve, 1.0) == 64
    assert budget_to_reach(curve, 0.99) is None


def test_diverged_trials_count_as_the_worst_in_budget_curves() -> None:
    val, test = with_bounded_losses([0.1, INF, NAN, 0.2], [1.0, NAN, 0.5, 3.0])
    assert val.tolist() == [0.1, INF, INF, 0.2]
    assert test.tolist() == [1.0, 3.0, 3.0, 3.0]


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="no trial has a finite"):
        with_bounded_losses([INF], [NAN])
    with pytest.raises(ValueError, match="at least one trial"):
        best_trials([], 0.5)
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], got 0"):
        best_trials(VAL, 0)
    with pytest.raises(ValueError, match="differ in number"):
        expected_best(VAL, TEST[1:], [1])
    with pytest.raises(ValueError, match="budgets must be"):
        budget_curve(VAL, TEST, [0, 1])
    with pytest.raises(ValueError, match="resamples must be positive"):
        budget_curve(VAL, TEST, [1], resamples=0)

"""Balanced k-means: exact sizes, assignments as cheap as an exact solver's, and means as centres, chunk by chunk."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from dist_moe.data.text.balanced_k_means import balanced_assignment, balanced_k_means, nearest, squared_distances

TOO_MUCH = 1e6


def exact_cost(cost_NK: NDArray[np.float64]) -> float:
    """The least cost with sizes that differ by one at most: an exact linear assignment to ceil(N / K) places each.

    What stands in for the missing points takes the last place of a cluster alone, so none gets two of them.
    """
    points, count = cost_NK.shape
    places = -(-points // count)
    square = np.full((count * places, count * places), TOO_MUCH)
    square[:points] = np.repeat(cost_NK, places, axis=1)
    square[points:, places - 1 :: places] = 0
    return float(square[linear_sum_assignment(square)].sum())


def bounds(points: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.full(count, points // count), np.full(count, -(-points // count))


@given(
    seed=st.integers(0, 10**6),
    points=st.integers(1, 40),
    count=st.integers(1, 7),
    has_ties=st.booleans(),
    has_prices=st.booleans(),
)
def test_assignment_is_balanced_and_the_cheapest(
    seed: int, points: int, count: int, has_ties: bool, has_prices: bool
) -> None:
    """Whatever the prices to begin with; the prices that come back say that no point is cheaper elsewhere."""
    draw = np.random.default_rng(seed)
    cost_NK = draw.integers(0, 3, (points, count)).astype(float) if has_ties else draw.random((points, count))
    prices = draw.normal(size=count) if has_prices else None
    cluster_N, price_K = balanced_assignment(cost_NK, *bounds(points, count), prices)
    size_K = np.bincount(cluster_N, minlength=count)
    assert size_K.max() - size_K.min() <= 1
    every = np.arange(points)
    assert cost_NK[every, cluster_N].sum() == pytest.approx(exact_cost(cost_NK), abs=1e-9)
    priced_NK = cost_NK + price_K
    assert (priced_NK[every, cluster_N] <= priced_NK.min(axis=1) + 1e-9).all()


def test_five_hundred_points_cost_what_an_exact_solver_says() -> None:
    """Points of which nine in ten lie near one centre, as documents do."""
    draw = np.random.default_rng(0)
    point_ND = draw.normal(size=(499, 20)) + np.where(np.arange(499) < 450, 3.0, 0.0)[:, None]
    cost_NK = squared_distances(point_ND, draw.normal(size=(8, 20)) + 1.0)
    cluster_N, _ = balanced_assignment(cost_NK, *bounds(499, 8))
    cost = cost_NK[np.arange(499), cluster_N].sum()
    assert cost == pytest.approx(exact_cost(cost_NK), rel=1e-9)
    assert cost > 1.02 * cost_NK.min(axis=1).sum(), "the nearest centres would do, so nothing was tried"


def test_sizes_that_the_points_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="5 points do not fit 6 to 6 places"):
        balanced_assignment(np.zeros((5, 2)), np.array([3, 3]), np.array([3, 3]))
    with pytest.raises(ValueError, match="2 points cannot be 3 clusters"):
        balanced_k_means(np.zeros((2, 2)), 3, seed=0)


@pytest.mark.parametrize("chunk", [1000, 64, 1])
@pytest.mark.parametrize("points", [203, 7])
def test_clusters_of_any_number_of_points_differ_by_one_at_most(chunk: int, points: int) -> None:
    """Fewer than a chunk, one chunk, and several with a remainder; doubles of points among them."""
    point_ND = np.random.default_rng(1).integers(0, 3, (points, 4)).astype(float)
    found = balanced_k_means(point_ND, 7, seed=0, chunk=chunk)
    size_K = np.bincount(found.cluster_N, minlength=7)
    assert size_K.sum() == points
    assert size_K.max() - size_K.min() <= 1
    again = balanced_k_means(point_ND, 7, seed=0, chunk=chunk)
    np.testing.assert_array_equal(found.cluster_N, again.cluster_N)


def test_clouds_are_found_and_centres_are_their_means() -> None:
    draw = np.random.default_rng(2)
    middle_KD = np.eye(4) * 10
    truth_N = np.arange(200) % 4
    point_ND = middle_KD[truth_N] + 0.1 * draw.normal(size=(200, 4))
    found = balanced_k_means(point_ND, 4, seed=3)
    assert len(set(zip(truth_N.tolist(), found.cluster_N.tolist(), strict=True))) == 4
    for cluster in range(4):
        np.testing.assert_allclose(found.centre_KD[cluster], point_ND[found.cluster_N == cluster].mean(axis=0))
    # A chunk's clouds are of unequal sizes, so some points are with others; the nearest centre is right all the same.
    streamed = balanced_k_means(point_ND, 4, seed=3, chunk=50)
    assert len(set(zip(truth_N.tolist(), nearest(point_ND, streamed.centre_KD).tolist(), strict=True))) == 4


def test_no_iteration_makes_the_objective_worse() -> None:
    point_ND = np.random.default_rng(4).normal(size=(120, 3))
    costs = []
    for iterations in range(1, 8):
        found = balanced_k_means(point_ND, 5, seed=0, iterations=iterations, tolerance=0.0)
        costs.append(squared_distances(point_ND, found.centre_KD)[np.arange(120), found.cluster_N].sum())
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(costs))
    assert costs[-1] < costs[0]


def test_nearest_is_the_least_distance() -> None:
    draw = np.random.default_rng(5)
    point_ND, centre_KD = draw.normal(size=(50, 3)), draw.normal(size=(6, 3))
    naive = [int(np.argmin([((p - c) ** 2).sum() for c in centre_KD])) for p in point_ND]
    np.testing.assert_array_equal(nearest(point_ND, centre_KD), naive)

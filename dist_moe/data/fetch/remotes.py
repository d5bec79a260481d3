"""Several places that carry the same data: the first that is kept, or else within reach, is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dist_moe.data.fetch.download import Archive, NetworkFailure, fetch, kept
from dist_moe.data.fetch.progress import Progress

T = TypeVar("T")


class NoSource(Exception):
    """None of the places could be reached. ``failures``: one line for each, with the reason."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__("; ".join(failures))
        self.failures = failures


@dataclass(frozen=True)
class RemoteFile:
    """A published file and the function that fetches it to a path."""

    archive: Archive
    bring: Callable[[Path], None]


@dataclass(frozen=True)
class Remote(Generic[T]):
    """A place that carries the data: its name for messages, its files, and how they are read.

    ``read`` gets the paths of the verified files, in the order of ``files``.
    """

    name: str
    files: tuple[RemoteFile, ...]
    read: Callable[[list[Path], Progress], T]

    @property
    def provenance(self) -> dict[str, Any]:
        """Who published the files, and their SHA-256 sums."""
        archives = [file.archive for file in self.files]
        return {"name": archives[0].origin, "sha256": {archive.filename: archive.sha256 for archive in archives}}


def read_first(remotes: list[Remote[T]], downloads: Path, progress: Progress) -> tuple[T, dict[str, Any]]:
    """The data and its provenance, from files kept in ``downloads``, or else fetched into it.

    Raises:
        NoSource: nothing is kept and no place could be reached.
        UserError: a kept or a fetched file has the wrong SHA-256.
    """
    for remote in remotes:
        paths = [path for file in remote.files if (path := kept(file.archive, downloads)) is not None]
        if len(paths) == len(remote.files):
            return remote.read(paths, progress), remote.provenance
    failures = []
    for remote, following in zip(remotes, [*remotes[1:], None], strict=True):
        try:
            paths = [fetch(file.archive, downloads, file.bring, progress) for file in remote.files]
        except NetworkFailure as failure:
            failures.append(f"{remote.name}: {failure}")
            if following is not None:
                progress.say(f"{remote.name} is out of reach ({failure}): trying {following.name}")
        else:
            return remote.read(paths, progress), remote.provenance
    raise NoSource(failures)

"""Data sets as they are published: read from a directory of the user, or from archives that carry the same files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dist_moe.config.files import absolute, digest_of
from dist_moe.data.fetch.archives import File, read_members
from dist_moe.data.fetch.download import NetworkFailure
from dist_moe.data.fetch.files import readable, short_digest
from dist_moe.data.fetch.packages import Archive, fetch_first, provenance
from dist_moe.data.fetch.progress import Progress
from dist_moe.errors import UserError

T = TypeVar("T")

Reader = Callable[[list[File], Progress], T]
"""Makes the content of a data set of its files."""


@dataclass(frozen=True)
class Remote(Generic[T]):
    """A place that carries a data set.

    ``members``: paths inside of the only archive; if there are none, the archives themselves are the files.
    ``read``: None where the files are those of a user's directory.
    """

    archives: tuple[Archive, ...]
    members: tuple[str, ...] = ()
    read: Reader[T] | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedData(Generic[T]):
    """A data set: the files of a directory that has it, how they are read, and the places that carry them too.

    ``files``: each by its possible names. ``folders``: where they lie below a directory that is often given instead.
    ``remedy``: what to do if they are not there; ``rescue``: if no place can be reached ({downloads} is where they go).
    """

    title: str
    files: tuple[tuple[str, ...], ...]
    read: Reader[T]
    remotes: tuple[Remote[T], ...] = ()
    folders: tuple[str, ...] = ()
    remedy: str
    rescue: str = ""
    without_root: str = "none was given"

    def check(self, root: Path | None) -> None:
        """Raise `UserError` if no directory is named and no remote carries the files."""
        if root is None and not self.remotes:
            raise UserError(f"data.root is not given, and no package carries {self.title}. Remedy: {self.remedy}")

    def locate(self, root: Path | None) -> Located[T]:
        """Return where the data is read from: ``root``, or else the remotes.

        Raises `UserError` if the directory or a file of it is missing or cannot be read, or there is neither it nor a
        remote.
        """
        self.check(root)
        if root is None:
            return Located(self, None, {})
        root = absolute(root)
        return Located(self, root, self.digests(root))

    def digests(self, root: Path) -> dict[str, str]:
        """Return the SHA-256, by name, of the files of a directory. Raises as `locate`."""
        with readable(root):
            if not root.is_dir():
                raise UserError(f"the data root {root} is not a directory. Remedy: {self.remedy}")
            found = {}
            for names in self.files:
                name = next((name for name in names if (root / name).is_file()), None)
                if name is None:
                    below = next((root / x for x in self.folders for y in names if (root / x / y).is_file()), None)
                    remedy = self.remedy if below is None else f"give the directory {below} instead."
                    others = [name for name in names if (root / name).is_symlink() or (root / name).exists()]
                    lacks = f"{others[0]}, which is no file" if others else f"no {' or '.join(names)}"
                    raise UserError(f"the data root {root} has {lacks}. Remedy: {remedy}")
                found[name] = digest_of(root / name)
            return found


@dataclass(frozen=True)
class Located(Generic[T]):
    """A data set and where it is read from: ``root``, whose ``files`` have these SHA-256, or None: its remotes."""

    data: PublishedData[T]
    root: Path | None
    files: dict[str, str]

    @property
    def key(self) -> str:
        """End of the name of a prepared directory; empty for remotes, which all give the same."""
        return f"-{short_digest(self.files)}" if self.files else ""

    def read(self, downloads: Path, progress: Progress) -> tuple[T, dict[str, Any]]:
        """Return the content, and its provenance: a name and the SHA-256 of each file (never a path).

        Raises `UserError` if a file is malformed, changed meanwhile, is not what was published, or cannot be had.
        """
        if self.root is None:
            return self._fetched(downloads, progress)
        progress.say(f"reading {self.data.title} in {self.root}")
        with readable(self.root):
            files = [File(self.root / name, (self.root / name).read_bytes()) for name in self.files]
        content = self.data.read(files, progress)
        if self.data.digests(self.root) != self.files:
            raise UserError(f"the files in {self.root} changed while they were read. Remedy: run it again.")
        return content, {"name": "directory", "sha256": self.files}

    def _fetched(self, downloads: Path, progress: Progress) -> tuple[T, dict[str, Any]]:
        places = [remote.archives for remote in self.data.remotes]
        try:
            place = fetch_first(places, downloads, progress)
        except NetworkFailure as failure:
            reasons = (f"a directory of your own: {self.data.without_root}", *failure.args)
            raise UserError(
                f"{self.data.title} could not be had from any source:\n"
                + "".join(f"  - {reason}\n" for reason in reasons)
                + f"Remedy: {self.data.rescue.format(downloads=downloads)}"
            ) from failure
        remote = self.data.remotes[places.index(place)]
        paths = [downloads / archive.filename for archive in place]
        if remote.members:
            files = read_members(paths[0], remote.members)
        else:
            files = [File(path, path.read_bytes()) for path in paths]
        return (remote.read or self.data.read)(files, progress), provenance(place)

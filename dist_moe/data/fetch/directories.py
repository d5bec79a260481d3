"""Data in a directory of the user's: its files are there, and stay as they are while they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dist_moe.data.fetch.files import sha256_of
from dist_moe.data.fetch.locations import readable
from dist_moe.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Source(Generic[T]):
    """What was read and its provenance: a name and the SHA-256 of each file (never a path)."""

    content: T
    provenance: dict[str, Any]


def digests_in(root: Path, wanted: Iterable[tuple[str, ...]], remedy: Callable[[Path], str]) -> dict[str, str]:
    """SHA-256 by name of the files in ``root``: of each that is ``wanted`` the first of its names that is there.

    Raises UserError, with the ``remedy`` for that directory, if it or a file of it is missing or cannot be read.
    """
    with readable(root):
        if not root.is_dir():
            raise UserError(f"the data root {root} is not a directory. {remedy(root)}")
        found = {}
        for names in wanted:
            name = next((name for name in names if (root / name).is_file()), None)
            if name is None:
                raise UserError(f"the data root {root} has no {' or '.join(names)}. {remedy(root)}")
            found[name] = sha256_of(root / name)
        return found


def read_unchanged(
    root: Path, files: dict[str, str], digests: Callable[[], dict[str, str]], read: Callable[[], T]
) -> Source[T]:
    """What ``read`` makes of ``root``, whose ``digests`` must still be ``files``. Raises UserError if they are not."""
    with readable(root):
        content = read()
    if digests() != files:
        raise UserError(f"the files in {root} changed while they were read. Remedy: run it again.")
    return Source(content, {"name": "directory", "sha256": files})

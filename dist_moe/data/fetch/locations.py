"""Where a data set is read and kept: a field of the configuration, or an environment variable."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_moe.errors import UserError

CACHE_ENV = "DIST_MOE_CACHE"

CACHE_DESCRIPTION = (
    "Directory where downloads and prepared arrays are kept. If not given, the environment "
    "variable DIST_MOE_CACHE, or else ~/.cache/dist_moe."
)


def given_or_environment(given: Path | None, variable: str) -> Path | None:
    """The given path, or that of an environment variable, made absolute; None if neither is set."""
    if given is None and not os.environ.get(variable):
        return None
    return Path(given or os.environ[variable]).expanduser().absolute()


def cache_directory(given: Path | None) -> Path:
    """The cache to use; it need not exist yet."""
    return given_or_environment(given, CACHE_ENV) or Path.home() / ".cache" / "dist_moe"


def short_digest(files: dict[str, str]) -> str:
    """16 hexadecimal digits that stand for the content of a directory, given the SHA-256 of each file by name."""
    return hashlib.sha256("".join(files[name] for name in sorted(files)).encode()).hexdigest()[:16]


@contextmanager
def usable(cache: Path) -> Iterator[None]:
    """Raises `UserError` for what the system refuses within: the cache cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {cache} cannot be used: {error}\n"
            f"Remedy: give a directory with room to write in (data.cache=DIR or {CACHE_ENV}=DIR)."
        ) from error


@contextmanager
def readable(root: Path) -> Iterator[None]:
    """Raises `UserError` for what the system refuses within: a directory of the user cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"the data root {root} cannot be read: {error}") from error

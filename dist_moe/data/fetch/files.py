"""Files that several processes share: where they are, their lock, and directories that appear complete or not."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_moe.config.files import absolute
from dist_moe.data.fetch.progress import Progress
from dist_moe.errors import UserError

CACHE_ENV = "DIST_MOE_CACHE"


def given_or_environment(given: Path | None, variable: str) -> Path | None:
    """Return the given path, or that of an environment variable, made absolute; None if neither is set."""
    if given is None and not os.environ.get(variable):
        return None
    return absolute(Path(given or os.environ[variable]))


def cache_directory(given: Path | None) -> Path:
    """Return the cache to use; it need not exist yet. Raises UserError where none is given and there is no home."""
    found = given_or_environment(given, CACHE_ENV)
    if found is None and not Path(os.environ.get("HOME", "/")).is_absolute():
        raise UserError(f"HOME={os.environ['HOME']!r} is no absolute path; set it, data.cache or {CACHE_ENV}")
    try:
        return found or absolute(Path("~") / ".cache" / "dist_moe")
    except UserError as error:
        raise UserError(f"data.cache and {CACHE_ENV} are not given, and {error}") from error


def short_digest(files: dict[str, str]) -> str:
    """Return 16 hexadecimal digits that stand for the content of files, given the SHA-256 of each by name."""
    return hashlib.sha256("".join(files[name] for name in sorted(files)).encode()).hexdigest()[:16]


@contextmanager
def usable(cache: Path) -> Iterator[None]:
    """Turn an OSError within into a `UserError`: the cache cannot be read or written."""
    if "\0" in str(cache):
        raise UserError(f"the cache {str(cache)!r} cannot be used: no path holds a NUL. Remedy: data.cache=DIR")
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {cache} cannot be used: {error}\n"
            f"Remedy: give a directory with room to write in (data.cache=DIR or {CACHE_ENV}=DIR)."
        ) from error


@contextmanager
def readable(root: Path) -> Iterator[None]:
    """Turn an OSError within into a `UserError`: a directory of the user cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"the data root {root} cannot be read: {error}") from error


@contextmanager
def locked(target: Path, progress: Progress) -> Iterator[None]:
    """Hold the advisory lock of ``target`` (the file ``<target>.lock``); waits while another process has it.

    The kernel frees the lock when its holder dies, so a killed preparation never blocks the next one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(target.name + ".lock").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"{target.name} is being prepared by another process: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``target`` (on its file system, so that a rename from it is atomic).

    Needs the lock of ``target``: every scratch directory of it found on entry was left by a killed
    process, and is removed. The directory goes when the context ends, however it ends.
    """
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    directory = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``target`` if nothing is raised. Needs its lock."""
    with scratch(target) as directory:
        (new := directory / "new").mkdir()
        yield new
        if target.exists():
            os.rename(target, directory / "old")
        os.rename(new, target)

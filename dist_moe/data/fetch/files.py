"""Files that several processes share: digest, lock, and a scratch directory that leaves nothing behind."""

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

from dist_moe.data.fetch.progress import Progress


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(target: Path, progress: Progress) -> Iterator[None]:
    """Hold the advisory lock of ``target`` (the file ``<target>.lock``); waits while another process has it.

    The kernel frees the lock when its holder dies, so a killed preparation never blocks the next one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(target.name + ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"{target.name} is being prepared by another process: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """An empty directory beside ``target`` (same file system, so that a rename from it is atomic).

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

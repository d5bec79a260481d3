"""Checks and stand-ins that tests of several data sets share."""

from __future__ import annotations

import hashlib
import subprocess
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.config.files import digest_of
from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.download import NetworkFailure, download_url
from dist_moe.data.fetch.packages import Archive, Source
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.movielens.readers import Ratings

PARTS = ("train", "val", "test")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def assert_same_arrays(one: Any, other: Any) -> None:
    """All arrays of the parts of two prepared data sets are the same bit for bit."""
    assert one.manifest["counts"] == other.manifest["counts"]
    for part in PARTS:
        columns = {name: x for name, x in vars(getattr(one, part)).items() if isinstance(x, np.ndarray)}
        assert columns
        for name, left in columns.items():
            right = getattr(getattr(other, part), name)
            assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes()), name


def assert_same_ratings(one: Ratings, other: Ratings) -> None:
    np.testing.assert_array_equal(one.user_ids, other.user_ids)
    assert (one.titles, one.digest()) == (other.titles, other.digest())


def forbid_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a URL nor a package manager may be asked."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)


def files_in(root: Path, *names: str) -> list[File]:
    return [File(root / name, (root / name).read_bytes()) for name in names]


def change_archives(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], name: str, place: int, **fields: Any
) -> None:
    """Give the archives of a remote of the data set ``table[name]`` other fields; a tuple has one for each archive."""
    data = table[name]
    remotes = list(data.remotes)
    archives = []
    for number, archive in enumerate(remotes[place].archives):
        mine = {field: value[number] if isinstance(value, tuple) else value for field, value in fields.items()}
        archives.append(replace(archive, **mine))
    remotes[place] = replace(remotes[place], archives=tuple(archives))
    monkeypatch.setitem(table, name, replace(data, remotes=tuple(remotes)))


def keep_download(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], name: str, place: int, cache: Path, *files: Path
) -> None:
    """Put files into a cache as the archives of a remote of ``table[name]``, their digests pinned."""
    (cache / "downloads").mkdir(parents=True, exist_ok=True)
    for file, archive in zip(files, table[name].remotes[place].archives, strict=True):
        (cache / "downloads" / archive.filename).write_bytes(file.read_bytes())
    change_archives(monkeypatch, table, name, place, sha256=tuple(map(digest_of, files)))


def archive(filename: str, content: bytes, served: bytes | None = None) -> Archive:
    """A published file ``content``, of which its only source serves ``served``, or nothing if it is None."""

    def download(path: Path, progress: Progress) -> None:
        if served is None:
            raise NetworkFailure("no route")
        path.write_bytes(served)

    origin, sources = f"publisher of {filename}", lambda: [Source(f"source of {filename}", download)]
    return Archive(filename, digest(content), origin, sources)


def install_script(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, action: str) -> None:
    """Make ``name`` the only command: a shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{action}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def only_source(name: str, url: str) -> Callable[[], list[Source]]:
    return lambda: [Source(name, partial(download_url, url))]

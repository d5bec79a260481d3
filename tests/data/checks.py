"""What several tests of MovieLens-1M ask for."""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.download import download_url
from dist_moe.data.fetch.packages import Source
from dist_moe.data.movielens import MovieLens
from dist_moe.data.movielens.readers import Ratings

PARTS = ("train", "val", "test")


def assert_same_arrays(one: MovieLens, other: MovieLens) -> None:
    assert (one.num_users, one.num_items) == (other.num_users, other.num_items)
    for part in PARTS:
        for column in ("user_N", "item_N", "rating_N"):
            left, right = getattr(getattr(one, part), column), getattr(getattr(other, part), column)
            assert left.dtype == right.dtype
            assert left.tobytes() == right.tobytes()


def assert_same_ratings(one: Ratings, other: Ratings) -> None:
    for column in ("user_N", "item_N", "rating_N", "user_ids"):
        left, right = getattr(one, column), getattr(other, column)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert one.titles == other.titles
    assert one.digest() == other.digest()


def forbid_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a URL nor pip may be asked."""

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


def only_source(name: str, url: str) -> Callable[[], list[Source]]:
    return lambda: [Source(name, partial(download_url, url))]

"""What several tests of MovieLens-1M ask for."""

from __future__ import annotations

import subprocess
import urllib.request
from typing import Any

import pytest

from dist_moe.data.movielens.prepare import MovieLens

PARTS = ("train", "val", "test")


def assert_same_arrays(one: MovieLens, other: MovieLens) -> None:
    assert (one.num_users, one.num_items) == (other.num_users, other.num_items)
    for part in PARTS:
        for column in ("user_N", "item_N", "rating_N"):
            left, right = getattr(getattr(one, part), column), getattr(getattr(other, part), column)
            assert left.dtype == right.dtype
            assert left.tobytes() == right.tobytes()


def forbid_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a URL nor pip may be asked."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)

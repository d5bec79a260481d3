"""The columns of a prepared table: features by kind, and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TableColumns:
    """Names and sizes of the features, each kind in the order of its columns in the arrays.

    ``categorical``, ``sizes``: ids of column c are 0 to ``sizes[c] - 1``; 0 is a cell that is missing or whose value
    the training rows do not have. ``numeric``: numbers with mean 0 and standard deviation 1 over the training rows.
    ``lists``: (name, size, length): at most ``length`` ids below ``size``, filled up with -1.
    """

    categorical: tuple[str, ...]
    sizes: tuple[int, ...]
    numeric: tuple[str, ...]
    lists: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Target:
    """A column to predict: 0 or 1 if ``kind`` is binary, or any number; NaN where a row is not labelled."""

    name: str
    kind: Literal["binary", "numeric"]

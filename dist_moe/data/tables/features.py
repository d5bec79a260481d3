"""Features: what each kind of column learns from the training rows, and the arrays that it becomes.

A feature is shown all blocks of rows with ``learn``, then ``settle``d, then shown them again with ``encode``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.batches import spread_over
from dist_moe.data.tables.cells import categories, entries, numbers
from dist_moe.data.tables.parts import TRAIN, RowBlock
from dist_moe.data.tables.schema import FeatureColumn, ListColumn, NumericColumn, Vocabulary

QUANTILE_ROWS = 1 << 17
"""Training rows whose numbers the quantiles are taken of; if there are more, some at equal distances."""


class Feature(Protocol):
    """A column that is read. ``words``: texts of its ids from 1, none if it is of numbers."""

    name: str
    words: list[str]

    def learn(self, block: RowBlock) -> None:
        """Learn from the training rows of a block."""
        ...

    def settle(self) -> dict[str, Any]:
        """End learning; return what was learnt, but for the words, for the manifest."""
        ...

    def encode(self, block: RowBlock) -> NDArray[Any]:
        """Return the arrays' entries for all rows of a block."""
        ...


class Words:
    """Ids of the words of the training rows, the most frequent first, then by text."""

    def __init__(self, settings: Vocabulary) -> None:
        self._settings = settings
        self._counts: Counter[str] = Counter()
        self.words: list[str] = []
        self._ids: dict[str, int] = {}

    def count(self, word_N: NDArray[np.int64], words: list[str]) -> None:
        """Count words, given by their places in a list."""
        for word, count in zip(words, np.bincount(word_N, minlength=len(words)).tolist(), strict=True):
            if word and count:
                self._counts[word] += count

    def settle(self) -> dict[str, Any]:
        """Give ids to the words that are frequent enough, and return how many other ones there are."""
        frequent = [item for item in self._counts.items() if item[1] >= self._settings.min_count]
        frequent.sort(key=lambda item: (-item[1], item[0]))
        self.words = [word for word, _ in frequent[: self._settings.max_size - 1]]
        self._ids = {word: number for number, word in enumerate(self.words, 1)}
        rare = len(self._counts) - len(self.words)
        self._counts.clear()
        return {"values": len(self.words), "rare_values": rare}

    def ids(self, word_N: NDArray[np.int64], words: list[str]) -> NDArray[np.int32]:
        """Return the id of each word."""
        return np.array([self._ids.get(word, 0) for word in words], np.int32)[word_N]


class CategoricalFeature(Words):
    """Ids of categories."""

    def __init__(self, name: str, settings: Vocabulary, missing: Collection[str]) -> None:
        super().__init__(settings)
        self.name, self._missing = name, missing

    def learn(self, block: RowBlock) -> None:
        """Count the words of the training rows."""
        word_B, words = block.read(self.name, lambda column: categories(column, self._missing))
        self.count(word_B[block.part_B == TRAIN], words)

    def encode(self, block: RowBlock) -> NDArray[np.int32]:
        """Return (B,) ids."""
        return self.ids(*block.read(self.name, lambda column: categories(column, self._missing)))


class ListFeature(Words):
    """Ids of the entries of lists, filled up with -1."""

    def __init__(self, name: str, settings: ListColumn, missing: Collection[str]) -> None:
        super().__init__(settings)
        self.name, self.length = name, settings.length
        self._read = lambda column: entries(column, settings.separator, missing, settings.length)

    def learn(self, block: RowBlock) -> None:
        """Count the words of the training rows."""
        row_M, _, word_M, words = block.read(self.name, self._read)
        self.count(word_M[block.part_B[row_M] == TRAIN], words)

    def encode(self, block: RowBlock) -> NDArray[np.int32]:
        """Return (B, length) ids."""
        row_M, place_M, word_M, words = block.read(self.name, self._read)
        id_BP = np.full((len(block.part_B), self.length), -1, np.int32)
        id_BP[row_M, place_M] = self.ids(word_M, words)
        return id_BP


class NumericFeature:
    """Numbers less the mean of the training rows, by their standard deviation (or 1 where all are the same)."""

    words: list[str] = []  # noqa: RUF012 (none, of any)

    def __init__(self, name: str, missing: Collection[str]) -> None:
        self.name, self._missing = name, missing
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def learn(self, block: RowBlock) -> None:
        """Add the training rows to mean and squared deviations (Chan, Golub and LeVeque 1979)."""
        value_B = block.read(self.name, lambda column: numbers(column, self._missing))
        value_B = value_B[(block.part_B == TRAIN) & ~np.isnan(value_B)]
        if not len(value_B):
            return
        mean, before = float(value_B.mean()), self._count
        self._count += len(value_B)
        gap = mean - self._mean
        self._mean += gap * len(value_B) / self._count
        self._squares += float(((value_B - mean) ** 2).sum()) + gap**2 * before * len(value_B) / self._count

    def settle(self) -> dict[str, Any]:
        """Return mean and standard deviation."""
        self._deviation = (self._squares / max(self._count, 1)) ** 0.5
        return {"mean": self._mean, "std": self._deviation}

    def encode(self, block: RowBlock) -> NDArray[np.float32]:
        """Return (B,) numbers, 0 for a missing one."""
        value_B = block.read(self.name, lambda column: numbers(column, self._missing))
        return np.nan_to_num((value_B - self._mean) / (self._deviation or 1.0)).astype(np.float32)


class BucketFeature:
    """Ids of ranges between quantiles of the training rows: 1 below the first, each from its lower edge on."""

    def __init__(self, name: str, buckets: int, train_rows: int, missing: Collection[str]) -> None:
        self.name, self._missing, self._buckets = name, missing, buckets
        self._sampled = spread_over(train_rows, QUANTILE_ROWS)
        self._seen, self._values = 0, [np.zeros(0)]
        self.words: list[str] = []

    def learn(self, block: RowBlock) -> None:
        """Keep the numbers of training rows at equal distances."""
        value_B = block.read(self.name, lambda column: numbers(column, self._missing))[block.part_B == TRAIN]
        first, last = np.searchsorted(self._sampled, (self._seen, self._seen + len(value_B)))
        self._values.append(value_B[self._sampled[first:last] - self._seen])
        self._seen += len(value_B)

    def settle(self) -> dict[str, Any]:
        """Return the edges of the ranges."""
        values = np.concatenate(self._values)
        values = values[~np.isnan(values)]
        shares = np.arange(1, self._buckets) / self._buckets
        self._edges = np.unique(np.quantile(values, shares)) if len(values) else np.zeros(0)
        self._values.clear()
        self.words = [f">= {edge:.6g}" for edge in (-np.inf, *self._edges)]
        return {"edges": self._edges.tolist()}

    def encode(self, block: RowBlock) -> NDArray[np.int32]:
        """Return (B,) ids, 0 for a missing number."""
        value_B = block.read(self.name, lambda column: numbers(column, self._missing))
        id_B = np.searchsorted(self._edges, value_B, side="right") + 1
        return np.where(np.isnan(value_B), 0, id_B).astype(np.int32)


def feature_of(name: str, settings: FeatureColumn, train_rows: int, missing: Collection[str]) -> Feature:
    """Return what reads a column. ``train_rows``: training rows of the table. ``missing``: words for a missing cell."""
    if isinstance(settings, ListColumn):
        return ListFeature(name, settings, missing)
    if not isinstance(settings, NumericColumn):
        return CategoricalFeature(name, settings, missing)
    if settings.buckets is None:
        return NumericFeature(name, missing)
    return BucketFeature(name, settings.buckets, train_rows, missing)

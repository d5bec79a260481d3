"""Features: what each kind of column learns from the training rows, and the arrays that it becomes.

A feature is shown all blocks of rows with ``learn``, then ``settle``d, then shown them again with ``encode``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_moe.data.batches import spread_over
from dist_moe.data.tables.cells import categories, entries, numbers
from dist_moe.data.tables.parts import TRAIN, RowBlock
from dist_moe.data.tables.schema import FeatureColumn, ListColumn, NumericColumn, Vocabulary

QUANTILE_ROWS = 1 << 17
"""Training rows whose numbers the quantiles are taken of; if there are more, some at equal distances."""


class Feature(ABC):
    """A column that is read. ``words``: texts of its ids from 1, none if it is of numbers."""

    length = 1

    def __init__(self, name: str, reader: Callable[[pa.Array], Any]) -> None:
        self.name = name
        self.words: list[str] = []
        self._reader = reader

    def _read(self, block: RowBlock) -> Any:
        return block.read(self.name, self._reader)

    @abstractmethod
    def learn(self, block: RowBlock) -> None:
        """Learn from the training rows of a block."""

    @abstractmethod
    def settle(self) -> dict[str, Any]:
        """End learning; return what was learnt, but for the words, for the manifest."""

    @abstractmethod
    def encode(self, block: RowBlock) -> NDArray[Any]:
        """Return (B,) or (B, length) entries of the arrays for all rows of a block."""


class CategoricalFeature(Feature):
    """Ids of the words of the training rows, the most frequent first, then by text."""

    def __init__(self, name: str, reader: Callable[[pa.Array], Any], settings: Vocabulary) -> None:
        super().__init__(name, reader)
        self._settings = settings
        self._counts: Counter[str] = Counter()
        self._ids: dict[str, int] = {}

    def learn(self, block: RowBlock) -> None:
        """Count the words of the training rows."""
        word_B, words = self._read(block)
        self._count(word_B[block.part_B == TRAIN], words)

    def _count(self, word_N: NDArray[np.int64], words: list[str]) -> None:
        for word, count in zip(words, np.bincount(word_N, minlength=len(words)).tolist(), strict=True):
            if word and count:
                self._counts[word] += count

    def settle(self) -> dict[str, Any]:
        """Give ids to the words that are frequent enough, and return how many these and the others are."""
        frequent = [item for item in self._counts.items() if item[1] >= self._settings.min_count]
        frequent.sort(key=lambda item: (-item[1], item[0]))
        self.words = [word for word, _ in frequent[: self._settings.max_size - 1]]
        self._ids = {word: number for number, word in enumerate(self.words, 1)}
        return {"values": len(self.words), "rare_values": len(self._counts) - len(self.words)}

    def encode(self, block: RowBlock) -> NDArray[np.int32]:
        """Return (B,) ids, 0 for what is missing or has none."""
        return self._id_of(*self._read(block))

    def _id_of(self, word_N: NDArray[np.int64], words: list[str]) -> NDArray[np.int32]:
        return np.array([self._ids.get(word, 0) for word in words], np.int32)[word_N]


class ListFeature(CategoricalFeature):
    """Ids of the entries of lists, filled up with -1."""

    def __init__(self, name: str, reader: Callable[[pa.Array], Any], settings: ListColumn) -> None:
        super().__init__(name, reader, settings)
        self.length = settings.length

    def learn(self, block: RowBlock) -> None:
        """Count the words of the training rows."""
        row_M, _, word_M, words = self._read(block)
        self._count(word_M[block.part_B[row_M] == TRAIN], words)

    def encode(self, block: RowBlock) -> NDArray[np.int32]:
        """Return (B, length) ids."""
        row_M, place_M, word_M, words = self._read(block)
        id_BP = np.full((len(block.part_B), self.length), -1, np.int32)
        id_BP[row_M, place_M] = self._id_of(word_M, words)
        return id_BP


class NumericFeature(Feature):
    """Numbers less the mean of the training rows, by their standard deviation; 0 where these are all the same."""

    _count, _mean, _squares = 0, 0.0, 0.0

    def learn(self, block: RowBlock) -> None:
        """Add the training rows to mean and squared deviations (Chan, Golub and LeVeque 1979)."""
        value_B = self._read(block)
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
        deviation = (self._squares / max(self._count, 1)) ** 0.5
        rounding = 1e-13 * abs(self._mean)  # the mean of numbers that are all the same is not quite this number
        self._scale = 1 / deviation if deviation > rounding else 0.0
        return {"mean": self._mean, "std": deviation if self._scale else 0.0}

    def encode(self, block: RowBlock) -> NDArray[np.float32]:
        """Return (B,) numbers, 0 for a missing one."""
        return np.nan_to_num((self._read(block) - self._mean) * self._scale).astype(np.float32)


class BucketFeature(Feature):
    """Ids of ranges between quantiles of the training rows: 1 below the first, each from its lower edge on."""

    def __init__(self, name: str, reader: Callable[[pa.Array], Any], buckets: int, train_rows: int) -> None:
        super().__init__(name, reader)
        self._buckets, self._sampled = buckets, spread_over(train_rows, QUANTILE_ROWS)
        self._seen, self._values = 0, [np.zeros(0)]

    def learn(self, block: RowBlock) -> None:
        """Keep the numbers of training rows at equal distances."""
        value_B = self._read(block)[block.part_B == TRAIN]
        first, last = np.searchsorted(self._sampled, (self._seen, self._seen + len(value_B)))
        self._values.append(value_B[self._sampled[first:last] - self._seen])
        self._seen += len(value_B)

    def settle(self) -> dict[str, Any]:
        """Return the edges of the ranges."""
        values = np.concatenate(self._values)
        values = values[~np.isnan(values)]
        shares = np.arange(1, self._buckets) / self._buckets
        self._edges = np.unique(np.quantile(values, shares)) if len(values) else np.zeros(0)
        self.words = [f">= {edge:.6g}" for edge in (-np.inf, *self._edges)]
        return {"edges": self._edges.tolist()}

    def encode(self, block: RowBlock) -> NDArray[np.int32]:
        """Return (B,) ids, 0 for a missing number."""
        value_B = self._read(block)
        id_B = np.searchsorted(self._edges, value_B, side="right") + 1
        return np.where(np.isnan(value_B), 0, id_B).astype(np.int32)


def feature_of(name: str, settings: FeatureColumn, train_rows: int, missing: Collection[str]) -> Feature:
    """Return what reads a column. ``train_rows``: training rows of the table. ``missing``: words for a missing cell."""
    if isinstance(settings, ListColumn):
        read_list = partial(entries, separator=settings.separator, missing=missing, length=settings.length)
        return ListFeature(name, read_list, settings)
    if not isinstance(settings, NumericColumn):
        return CategoricalFeature(name, partial(categories, missing=missing), settings)
    read = partial(numbers, missing=missing)
    if settings.buckets is None:
        return NumericFeature(name, read)
    return BucketFeature(name, read, settings.buckets, train_rows)

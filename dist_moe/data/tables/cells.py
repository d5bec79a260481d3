"""The meaning of cells: the same whether CSV or Parquet holds them.

A cell is missing if it is empty but for white space, null, a NaN, or one of the words that the schema names. A
category is its text without white space around it, in Unicode's form NFC; whole numbers have no point, so that the
texts "1" and "1.0", 1 and 1.0 are one category; truth values are true and false. A time is its ISO text. "01" and "1"
are two categories, and so are "1.10" and "1.1".
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dist_moe.config.settings import LARGEST_FLOAT
from dist_moe.data.fetch.tables import NUMBER

LABELS = {"0": 0.0, "false": 0.0, "1": 1.0, "true": 1.0}
"""Categories that are labels by themselves."""

_NEEDLESS_ZEROS = re.compile(r"(-?(?:0|[1-9]\d*)|.+:\d\d)\.0+", re.ASCII)
"""A whole number, or a time, with a fraction of zero."""

_LARGE_WHOLE = re.compile(r"-?\d(?:\.\d+)?e\+(?:1[5-9]|2\d)", re.ASCII)
"""A number as Arrow writes out 1e15 and more; other programs write it in full."""


class BadCell(Exception):
    """A cell that is not what its column is said to hold; ``row``: in its batch, None if it is the column's type."""

    def __init__(self, row: int | None, value: object, remedy: str) -> None:
        super().__init__(row, value, remedy)
        self.row, self.value, self.remedy = row, value, remedy


def canonical(text: str) -> str:
    """Return the category that a text means; empty for a missing one."""
    text = unicodedata.normalize("NFC", text.strip())
    if text.lower() in ("true", "false"):
        return text.lower()
    if (whole := _NEEDLESS_ZEROS.fullmatch(text)) is not None:
        text = whole[1]
    if _LARGE_WHOLE.fullmatch(text):
        text = f"{float(text):.0f}"
    return "0" if text == "-0" else text


def texts(column: pa.Array) -> pa.Array:
    """Return cells as texts, null where they are null or NaN. Raises `BadCell` for a type that has no text."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return texts(column.dictionary_decode())
    if pa.types.is_nested(kind) or pa.types.is_duration(kind):
        raise BadCell(None, kind, "a column of categories, numbers or labels holds single values, no other type")
    if pa.types.is_floating(kind):
        column = column.cast(pa.float32()) if pa.types.is_float16(kind) else column
        column = pc.if_else(pc.is_nan(column), None, column)
    try:
        return column.cast(pa.string())
    except pa.ArrowException as error:
        raise BadCell(None, kind, f"its cells have no text in UTF-8 ({error}); save them as text") from error


def categories(column: pa.Array, missing: Collection[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Return which of the words each cell is, and the words: distinct texts, `canonical`, the first for a missing cell.

    A word may stand there twice, where two texts mean the same. ``missing``: `canonical` texts of missing cells.
    """
    encoded = texts(column).dictionary_encode()
    words = [canonical(text) for text in encoded.dictionary.to_pylist()]
    place_N = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
    return place_N, ["", *("" if word in missing else word for word in words)]


def entries(
    column: pa.Array, separator: str, missing: Collection[str], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Return the entries of lists that are not missing, the first ``length`` of each row.

    Each by its row, its place in the list, and its word, as `categories` gives them.
    """
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        column = pc.split_pattern(texts(column), separator)
    row_M = pc.list_parent_indices(column).to_numpy(zero_copy_only=False).astype(np.int64)
    word_M, words = categories(pc.list_flatten(column), missing)
    held = np.array([bool(word) for word in words])[word_M]
    row_M, word_M = row_M[held], word_M[held]
    place_M = np.arange(len(row_M)) - np.searchsorted(row_M, row_M)
    first = place_M < length
    return row_M[first], place_M[first], word_M[first], words


def numbers(column: pa.Array, missing: Collection[str]) -> NDArray[np.float64]:
    """Return cells as numbers, NaN where they are missing. Raises `BadCell` for what is no number that fp32 holds."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return numbers(column.dictionary_decode(), missing)
    if (
        pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
    ):
        found = column.cast(pa.float64(), safe=False)
    elif pa.types.is_temporal(kind):
        raise BadCell(None, kind, "a numeric column holds numbers, no times; write them as numbers, or leave it out")
    else:
        trimmed = pc.utf8_trim_whitespace(texts(column))
        trimmed = pc.if_else(pc.is_in(trimmed, value_set=pa.array(["", *missing])), None, trimmed)
        try:
            found = trimmed.cast(pa.float64())
        except pa.ArrowInvalid:
            found = pa.array([_number(row, text) for row, text in enumerate(trimmed.to_pylist())], pa.float64())
    value_N: NDArray[np.float64] = found.to_numpy(zero_copy_only=False).astype(np.float64)
    value_N[np.isin(value_N, [float(word) for word in missing if NUMBER.fullmatch(word)])] = np.nan
    if (beyond := np.flatnonzero(np.abs(value_N) > LARGEST_FLOAT)).size:
        row = int(beyond[0])
        raise BadCell(row, column[row].as_py(), f"expected a number within {LARGEST_FLOAT:g}, which fp32 holds")
    return value_N


def _number(row: int, text: str | None) -> float | None:
    if text is None or text.lower() == "nan":
        return None
    if not NUMBER.fullmatch(text):
        raise BadCell(row, text, "expected a number such as -1.5e3; other words for a missing one go into data.missing")
    return float(text)


def times(column: pa.Array, missing: Collection[str]) -> NDArray[np.float64]:
    """Return cells as numbers that order them: numbers as they are, dates and ISO texts in seconds since 1970.

    Raises `BadCell` for a missing one, and for any other text.
    """
    if pa.types.is_temporal(column.type):
        column = texts(column)
    try:
        second_N = numbers(column, missing)
    except BadCell:
        second_N = np.array([_seconds(row, text) for row, text in enumerate(texts(column).to_pylist())])
    if (gaps := np.flatnonzero(np.isnan(second_N))).size:
        row = int(gaps[0])
        raise BadCell(row, column[row].as_py(), "its time is missing; fill it in, or leave out the row")
    return second_N


def _seconds(row: int, text: str | None) -> float:
    if not text or not text.strip():
        return math.nan
    if NUMBER.fullmatch(text.strip()):
        return float(text)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadCell(row, text, "expected a number, or a date such as 2024-01-31 or 2024-01-31 23:59:59") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

"""Which rows of a table are trained on, validated and tested on; and all of them batch by batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_moe.data.prepared import PARTS
from dist_moe.data.tables.cells import BadCell, canonical, categories, times
from dist_moe.data.tables.files import TableFile
from dist_moe.data.tables.schema import Part, Split
from dist_moe.errors import UserError, shown

T = TypeVar("T")
TRAIN = PARTS.index("train")


@dataclass(frozen=True)
class RowBlock:
    """Rows of a file that follow one another. ``first``: number of the first one, from 1; ``part_B``: of `PARTS`."""

    file: TableFile
    first: int
    rows: pa.RecordBatch
    part_B: NDArray[np.int8]

    def read(self, name: str, reader: Callable[[pa.Array], T]) -> T:
        """Return what ``reader`` makes of a column. Raises `UserError` with file, row and column for its `BadCell`."""
        try:
            return reader(self.rows.column(name))
        except BadCell as bad:
            if bad.row is None:
                raise UserError(f"{self.file.path}: column {name!r} is of type {bad.value}; {bad.remedy}") from bad
            place = f"{self.file.path}, row {self.first + bad.row}"
            raise UserError(f"{place}: {name}={shown(bad.value)}; {bad.remedy}") from bad


def separator_doubt(names: Sequence[str]) -> str:
    """Return a question to end a message with where a table seems to be one column because it was parted wrongly."""
    if len(names) != 1 or not re.search(r"[;,|\t]", names[0]):
        return ""
    return "; does another character part its cells? (data.separator, --separator of 'data inspect')"


def check_columns(file: TableFile, names: Collection[str]) -> None:
    """Raise `UserError` if a column is not there, or there twice."""
    own = file.names()
    for name in names:
        if (count := own.count(name)) != 1:
            remedy = f"its columns: {shown(own, 400)}{separator_doubt(own)}" if own else "it is empty"
            how = (
                f"has {count} columns {shown(name)}; leave one of them"
                if count
                else f"has no column {shown(name)}; {remedy}"
            )
            raise UserError(f"{file.path} {how}")


@dataclass(frozen=True)
class PartedTable:
    """All rows of some files, in order, each of a part of `PARTS`: ``part_N``."""

    files: tuple[TableFile, ...]
    part_N: NDArray[np.int8]

    def blocks(self, names: Sequence[str]) -> Iterator[RowBlock]:
        """Yield all rows with these columns."""
        start = 0
        for file in self.files:
            first = 1
            for rows in file.batches(names):
                part_B = self.part_N[start : start + len(rows)]
                if len(part_B) < len(rows):
                    raise UserError(f"{file.path} grew while it was read. Remedy: run it again")
                yield RowBlock(file, first, rows, part_B)
                start, first = start + len(rows), first + len(rows)
        if start < len(self.part_N):
            raise UserError(f"{self.files[-1].path} shrank while it was read. Remedy: run it again")


def part_rows(
    files: Mapping[Part, Sequence[TableFile]], split: Split, names: Sequence[str], missing: Collection[str]
) -> PartedTable:
    """Return the table with the part of each row, having read no more than the column that says so.

    ``files``: of each part that has its own; the others are taken from the training rows by ``split``. Within a part
    rows keep their order. ``names``: the columns that every file is to have. Raises `UserError` where one has not, for
    a part without rows, and for a cell of ``split.column`` or ``split.latest_by`` that does not say.
    """
    parts = [PARTS.index(part) for part, several in files.items() for _ in several]
    table = tuple(file for several in files.values() for file in several)
    asked = [name for name in (split.column, split.latest_by) if name is not None]
    part_N, time_N = [np.zeros(0, np.int8)], [np.zeros(0)]
    for file, part in zip(table, parts, strict=True):
        wanted = asked if part == TRAIN else []
        check_columns(file, [*names, *wanted])
        first = 1
        for rows in file.batches(wanted or names[:1]):
            block = RowBlock(file, first, rows, np.full(len(rows), part, np.int8))
            first += len(rows)
            part_N.append(_named_parts(block, split, missing) if wanted and split.column else block.part_B)
            if wanted and split.latest_by:
                time_N.append(block.read(split.latest_by, lambda column: times(column, missing)))
            else:
                time_N.append(np.zeros(len(rows)))
    given = {*files, *(split.values if split.column else ())}
    shared = PartedTable(table, _share_out(np.concatenate(part_N), np.concatenate(time_N), split, given))
    for place, part_name in enumerate(PARTS):
        if not (shared.part_N == place).any():
            if own := [several[0].path for part, several in files.items() if part == part_name != "train"]:
                raise UserError(f"{own[0]} has no rows to be used for {part_name}; give a file with some")
            raise UserError(
                f"{table[0].path} has {len(shared.part_N):,} rows and none of them for {part_name}; give more rows, "
                "other shares or values under data.split, or a file for this part"
            )
    return shared


def _named_parts(block: RowBlock, split: Split, missing: Collection[str]) -> NDArray[np.int8]:
    assert split.column is not None
    place_of = {canonical(str(value)): PARTS.index(part) for part, values in split.values.items() for value in values}

    def read(column: pa.Array) -> NDArray[np.int8]:
        word_B, words = categories(column, missing)
        part_B = np.array([place_of.get(word, -1) for word in words], np.int8)[word_B]
        if (strange := np.flatnonzero(part_B < 0)).size:
            row = int(strange[0])
            raise BadCell(row, column[row].as_py(), "data.split.values has it in no part; add it there")
        return part_B

    return block.read(split.column, read)


def _share_out(
    part_N: NDArray[np.int8], time_N: NDArray[np.float64], split: Split, given: Collection[str]
) -> NDArray[np.int8]:
    """Take the parts that are not ``given`` from the training rows: by ``time_N``, or at random; halves up."""
    train = np.flatnonzero(part_N == TRAIN)
    keys = np.random.default_rng(split.seed).random(len(train)) if split.latest_by is None else time_N[train]
    order, end = train[np.argsort(keys, kind="stable")], len(train)
    for part, share in (("test", split.test), ("val", split.val)):
        if part not in given:
            start = end - int(share * len(train) + 0.5)
            part_N[order[start:end]] = PARTS.index(part)
            end = start
    return part_N

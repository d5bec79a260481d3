"""Tables in text files: comma- or tab-separated, with a header or without; errors name file, line and column."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_moe.data.fetch.archives import File
from dist_moe.errors import UserError, shown

_SHOWN_NAMES = 400

LARGEST_INTEGER = 2**63 - 1
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
"""The pattern of a number as all programs write it; Python's own would read 1_5 as 15."""


@dataclass(frozen=True)
class Table:
    """Rows of equally many cells; ``line_N``: where each begins in its file, from 1; ``broken``: lines left out."""

    path: Path
    header: tuple[str, ...]
    rows: list[list[str]]
    line_N: list[int]
    broken: int = 0

    def texts(self, name: str) -> list[str]:
        """Return the cells of a column. Raises `UserError` if there is no such column."""
        if name not in self.header:
            raise UserError(f"{self.path} has no column {shown(name)}; its columns: {_several(map(repr, self.header))}")
        if self.header.count(name) > 1:
            raise UserError(f"{self.path} has {self.header.count(name)} columns {name!r}; leave one of them")
        place = self.header.index(name)
        return [row[place] for row in self.rows]

    def classes(self, name: str, labels: Sequence[str]) -> list[float]:
        """Return a column of labels as their places in ``labels``. Raises `UserError` for any other label."""
        numbers = {label: number for number, label in enumerate(labels)}
        return self.values(name, lambda cell: numbers.get(cell, math.nan), f"allowed: {', '.join(labels)}")

    def numbers(self, name: str, low: float, high: float) -> list[float]:
        """Return a column of numbers from ``low`` to ``high``. Raises `UserError` for anything else."""

        def number(cell: str) -> float:
            value = float(cell) if NUMBER.fullmatch(cell.strip()) else math.nan
            return value if low <= value <= high else math.nan

        return self.values(name, number, f"expected a number from {low:g} to {high:g}")

    def integers(self, name: str) -> list[int]:
        """Return a column of whole numbers from 0 to `LARGEST_INTEGER`, exactly. Raises `UserError` for any other."""
        digits = len(str(LARGEST_INTEGER))  # int() would refuse thousands of them, and take those of other scripts

        def is_one(cell: str) -> bool:
            if not (cell.isascii() and cell.isdecimal()):
                return False
            return len(cell.lstrip("0")) <= digits and int(cell.lstrip("0") or 0) <= LARGEST_INTEGER

        remedy = f"expected a whole number from 0 to {LARGEST_INTEGER}"
        self.values(name, lambda cell: 0 if is_one(cell) else math.nan, remedy)
        return [int(cell.lstrip("0") or 0) for cell in self.texts(name)]

    def values(self, name: str, value_of: Callable[[str], float], remedy: str) -> list[float]:
        """Return a column of what ``value_of`` makes of its cells. Raises `UserError` with the ``remedy`` for NaN."""
        cells = self.texts(name)
        values = [float(value_of(cell)) for cell in cells]
        for line, cell, value in zip(self.line_N, cells, values, strict=True):
            if math.isnan(value):
                raise UserError(f"{self.path}, line {line}: {name}={shown(cell)}; {remedy}")
        return values


def _several(names: Iterable[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= _SHOWN_NAMES else f"{text[:_SHOWN_NAMES]}..."


def separated(
    file: File,
    header: tuple[str, ...] | None = None,
    *,
    separator: str = "\t",
    encoding: str = "utf-8-sig",
    skip_broken: bool = False,
) -> Table:
    """Read a table whose cells are parted by a ``separator``; quotes have no meaning, and empty lines are no rows.

    ``header``: names of the columns where the file has no line for them. ``skip_broken``: leave out lines with another
    number of cells than the header has. Raises `UserError` for such a line otherwise, and for a file without rows.
    """
    lines = ((number, line.split(separator)) for number, line in enumerate(file.lines(encoding), 1) if line)
    return _table(file.path, lines, header, skip_broken)


def comma_separated(file: File) -> Table:
    """Read a table as spreadsheets write it: a header, cells in double quotes where needed. Raises `UserError`."""
    text = file.text()
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def lines() -> Iterator[tuple[int, list[str]]]:
        begin = 1
        try:
            for cells in reader:
                if cells:
                    yield begin, cells
                begin = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{file.path}, line {reader.line_num}: {error}; cells with quotes, commas or line ends stand in double "
                "quotes, and quotes in them are doubled"
            ) from error

    limit = csv.field_size_limit(len(text) + 1)  # of the whole process: 131,072 characters if nobody changes it
    try:
        return _table(file.path, lines(), None, skip_broken=False)
    finally:
        csv.field_size_limit(limit)


def _table(
    path: Path, lines: Iterable[tuple[int, list[str]]], header: tuple[str, ...] | None, skip_broken: bool
) -> Table:
    rows: list[list[str]] = []
    numbers: list[int] = []
    broken = 0
    for number, cells in lines:
        if header is None:
            header = tuple(cells)
        elif len(cells) == len(header):
            rows.append(cells)
            numbers.append(number)
        elif skip_broken:
            broken += 1
        else:
            raise UserError(f"{path}, line {number}: {len(cells)} columns; expected {len(header)}: {_several(header)}")
    if header is None or not rows:
        raise UserError(f"{path} holds no rows")
    return Table(path, header, rows, numbers, broken)

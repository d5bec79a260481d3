"""A data set in a user's directory, and naive readers of tables, which know nothing of ours."""

from __future__ import annotations

import csv
import gzip
import io
import random
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from dist_moe.data.fetch.progress import Progress
from tools.fuzzing.mutate import odd_cell

SILENT = Progress(False)
Rows = Counter[tuple[Any, ...]]


class DataSet(ABC):
    """A data set in a user's directory: how good files are written, read by the product, and read naively."""

    separator: ClassVar[str] = "\t"
    encoding: ClassVar[str] = "utf-8"

    @abstractmethod
    def write(self, root: Path) -> object:
        """Write good files."""

    @abstractmethod
    def read(self, root: Path, cache: Path) -> Any:
        """Return what the product makes of the files."""

    @abstractmethod
    def check(self, root: Path, found: Any) -> str | None:
        """Return what is wrong with that, by reading the files naively."""

    def change(self, root: Path, drawn: random.Random) -> str:
        """Change the files in a way of this data set."""
        path = drawn.choice(files_of(root))
        return odd_cell(path, drawn, self.separator, self.encoding)


def files_of(root: Path) -> list[Path]:
    """Return the files below a directory, in order."""
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def lines_of(path: Path, encoding: str = "utf-8-sig") -> list[str]:
    """Return the lines of a text file that are not empty; only newlines end one, after a carriage return or not."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode(encoding)
    return [line.removesuffix("\r") for line in text.split("\n") if line.removesuffix("\r")]


def tabular(path: Path, encoding: str = "utf-8-sig") -> list[dict[str, str]]:
    """Return the rows of a file parted by tabs, by the names in its first line."""
    header, *rows = (line.split("\t") for line in lines_of(path, encoding))
    return [dict(zip(header, row, strict=True)) for row in rows]


def spreadsheet(path: Path) -> list[dict[str, str]]:
    """Return the rows of a comma-separated file, packed or not, by the names in its first line."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    limit = csv.field_size_limit(len(text) + 1)
    try:
        header, *rows = (row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row)
    finally:
        csv.field_size_limit(limit)
    return [dict(zip(header, row, strict=True)) for row in rows]


def difference(naive: Rows, found: Rows) -> str | None:
    """Return how two bags of rows differ; None if they do not."""
    if naive == found:
        return None
    lost, added = list((naive - found).items())[:2], list((found - naive).items())[:2]
    return f"{naive.total()} rows by a naive reading, {found.total()} found; lost {lost}, added {added}"[:600]

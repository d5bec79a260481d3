"""Files of tables, read as a stream of record batches: CSV and Parquet, and whatever else has `TableFile`'s methods."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dist_moe.config.files import absolute, check_regular, digest_of
from dist_moe.errors import UserError, shown

ROWS_AT_ONCE, CELLS_AT_ONCE = 65_536, 4_000_000
"""Read of a Parquet file in one piece, whichever is less."""

BYTES_AT_ONCE = 1 << 24
"""Read of a CSV file in one piece; a row must fit."""

SEPARATOR = r"^[\t !#-~]$"
"""Pattern of what parts the cells of CSV: one character of ASCII, no quote."""

_PARQUET_MAGIC = b"PAR1"


class TableFile(Protocol):
    """A file that can be read as often as needed. ``path``: its name in messages."""

    @property
    def path(self) -> Path:
        """The name of the file in messages."""
        ...

    def names(self) -> list[str]:
        """Return the names of its columns."""
        ...

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, with these columns in this order. Raises `UserError` where it cannot be read."""
        ...


@dataclass(frozen=True)
class CsvFile:
    """Text in UTF-8, one row a line unless a cell in double quotes goes on; every cell is text, compressed or not.

    ``header``: names of the columns where no line has them. ``content``: the bytes, where there is no such file.
    """

    path: Path
    separator: str = ","
    header: tuple[str, ...] | None = None
    content: bytes | None = None

    def stream(self) -> pa.NativeFile:
        """Return its bytes, decompressed where the name ends in .gz, .bz2 or .zst; from memory if ``content``."""
        return pa.input_stream(self.path if self.content is None else pa.py_buffer(self.content))

    def names(self) -> list[str]:
        """Return the names in its first line, in Unicode's form NFC, without white space around them."""
        if self.header is not None:
            return list(self.header)
        with _readable(self.path), self.stream() as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            header = next(csv.reader(text, delimiter=self.separator), None)
        return [_plain(name) for name in header or ()]

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order; empty lines are none."""
        header = self.names()
        if not header:
            return
        skipped = int(self.header is None)
        wrong: list[Any] = []
        numbered = [str(place) for place in range(len(header))]  # a name may stand there twice
        wanted = [str(header.index(name)) for name in names]

        def refuse(row: Any) -> str:
            wrong.append(row)
            return "error"

        with _readable(self.path), self.stream() as stream:
            try:
                reader = pyarrow.csv.open_csv(
                    stream,
                    read_options=pyarrow.csv.ReadOptions(
                        use_threads=False,
                        block_size=BYTES_AT_ONCE,
                        column_names=numbered,
                        skip_rows_after_names=skipped,
                    ),
                    parse_options=pyarrow.csv.ParseOptions(
                        delimiter=self.separator, newlines_in_values=True, invalid_row_handler=refuse
                    ),
                    convert_options=pyarrow.csv.ConvertOptions(
                        column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted
                    ),
                )
                yield from (batch.rename_columns(list(names)) for batch in reader)
            except pa.ArrowInvalid as error:
                if wrong:
                    row = wrong[0]
                    raise UserError(
                        f"{self.path}, row {row.number - skipped}: {row.actual_columns} cells, where there are "
                        f"{len(header)} columns: {shown(row.text)}; cells that hold {self.separator!r}, quotes or line "
                        "ends stand in double quotes"
                    ) from error
                if "straddling" not in str(error):
                    raise
                if _lines(self, 2) > 1:
                    raise UserError(
                        f"{self.path}: a row is longer than {BYTES_AT_ONCE:,} bytes; is a double quote never closed?"
                    ) from error


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file, read a few thousand rows at a time."""

    path: Path

    def names(self) -> list[str]:
        """Return the names of its columns, in Unicode's form NFC."""
        return [_plain(name) for name in self._open().schema_arrow.names]

    def _open(self) -> pyarrow.parquet.ParquetFile:
        with _readable(self.path):
            return pyarrow.parquet.ParquetFile(self.path, pre_buffer=False)

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order."""
        file = self._open()
        own = {_plain(name): name for name in file.schema_arrow.names}
        rows = max(1, min(ROWS_AT_ONCE, CELLS_AT_ONCE // max(len(names), 1)))
        wanted = [own[name] for name in names]
        with _readable(self.path), file:
            for batch in file.iter_batches(batch_size=rows, columns=wanted, use_threads=False):
                yield batch.select(wanted).rename_columns(list(names))


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _lines(file: CsvFile, limit: int) -> int:
    """Return how many lines there are, at most ``limit``."""
    with file.stream() as stream:
        return sum(1 for _ in zip(io.BufferedReader(stream), range(limit), strict=False))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what pyarrow and the system say of a file that cannot be read into a `UserError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; give a CSV or Parquet file, or a directory of them") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {said[:300]}. Remedy: give an intact CSV or Parquet file") from error


def own_files(given: Path, separator: str) -> list[tuple[TableFile, str]]:
    """Return the table in a file, or the parts of it in a directory by name, each with the SHA-256 of what it holds.

    What a directory hides (names that begin with a dot or an underscore) is passed over. Raises `UserError`, also for
    text that is not in UTF-8, holds a NUL, or leaves a quote open.
    """
    path = absolute(given)
    with _readable(path):
        check_regular(path)
        parts = sorted(path.iterdir()) if path.is_dir() else [path]
        parts = [part for part in parts if part == path or not part.name.startswith((".", "_"))]
        if not parts:
            raise UserError(f"the directory {path} holds no files; give one with the CSV or Parquet files of a table")
        return [_own_file(part, separator) for part in parts]


def _own_file(path: Path, separator: str) -> tuple[TableFile, str]:
    if path.is_dir():
        raise UserError(f"{path} is a directory in a directory; files of a table lie in one, side by side")
    check_regular(path)
    with path.open("rb") as stream:
        if stream.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC:
            return ParquetFile(path), digest_of(path)
    file = CsvFile(path, separator)
    return file, _checked_digest(file)


def _checked_digest(file: CsvFile) -> str:
    sha256, decode, lines, quotes = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 1, 0
    with file.stream() as stream:
        while True:
            block = stream.read(BYTES_AT_ONCE)
            try:
                if (place := block.find(0)) >= 0:
                    raise UnicodeDecodeError("utf-8", block, place, place + 1, "NUL")
                decode.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n")
                raise UserError(
                    f"{file.path}, line {line}: byte 0x{error.object[error.start]:02x} is no text in UTF-8. "
                    "Remedy: save it in UTF-8"
                ) from error
            if not block:
                break
            sha256.update(block)
            lines, quotes = lines + block.count(b"\n"), quotes + block.count(b'"')
    if quotes % 2:
        raise UserError(
            f"{file.path} has an odd number of double quotes ({quotes:,}), so that one is never closed; cells with "
            "quotes stand in double quotes, and quotes in them are doubled"
        )
    return sha256.hexdigest()

"""Tables that get further columns while they are streamed: those of other tables, found by a key, and a part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_moe.data.tables.files import TableFile
from dist_moe.errors import UserError, shown

PART = "part"
"""The column that `PartedFile` adds."""


@dataclass(frozen=True)
class PartedFile:
    """A file whose rows belong to ``parts`` of the data, equally many to each, drawn with ``seed``: column `PART`."""

    file: TableFile
    parts: tuple[str, ...]
    seed: int = 0

    @property
    def path(self) -> Path:
        """The name of the file in messages."""
        return self.file.path

    def names(self) -> list[str]:
        """Return the names of its columns, the part last."""
        return [*self.file.names(), PART]

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order; the same part for each whenever this is called."""
        own = [name for name in names if name != PART] or self.file.names()[:1]
        count = sum(batch.num_rows for batch in self.file.batches(own[:1]))
        part_N = np.arange(count, dtype=np.int32) % len(self.parts)
        np.random.Generator(np.random.PCG64(self.seed)).shuffle(part_N)
        begin = 0
        for batch in self.file.batches(own):
            here = pa.array(part_N[begin : begin + batch.num_rows])
            columns = dict(zip(own, batch.columns, strict=True))
            columns[PART] = pa.DictionaryArray.from_arrays(here, pa.array(self.parts))
            yield pa.RecordBatch.from_arrays([columns[name] for name in names], names=list(names))
            begin += batch.num_rows


@dataclass(frozen=True)
class Lookup:
    """A table in memory that describes things, such as users, by the texts in its column ``key``, each once."""

    key: str
    key_K: pa.Array
    columns: Mapping[str, pa.Array] = field(repr=False)


def read_lookup(file: TableFile, key: str, names: Sequence[str]) -> Lookup:
    """Read a whole file, these columns alone. Raises `UserError` if a key comes twice."""
    cells = pa.schema([(name, pa.string()) for name in (key, *names)])
    table = pa.Table.from_batches(file.batches(cells.names), cells)
    keys = pc.utf8_trim_whitespace(table[key]).combine_chunks()
    counts = keys.value_counts()
    if len(counts) < len(keys):
        values, times = counts.flatten()
        first = values[pc.index(pc.greater(times, 1), True).as_py()].as_py()
        raise UserError(f"{file.path}: {key}={shown(first)} has several rows; leave one of them")
    return Lookup(key, keys, {name: table[name].combine_chunks() for name in names})


@dataclass(frozen=True)
class JoinedFile:
    """A file whose rows also have the columns of what they refer to; missing ones where a table does not list it.

    ``again``: columns that stand there under a second name, by that name.
    """

    file: TableFile
    lookups: tuple[Lookup, ...]
    again: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The name of the file in messages."""
        return self.file.path

    def names(self) -> list[str]:
        """Return the names of its own columns, and of those that are joined to them."""
        return [*self.file.names(), *(name for lookup in self.lookups for name in lookup.columns), *self.again]

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows of the file in order."""
        home = {name: lookup for lookup in self.lookups for name in lookup.columns}
        used = [lookup for lookup in self.lookups if any(home.get(name) is lookup for name in names)]
        read = [self.again.get(name, name) for name in names if name not in home]
        own = list(dict.fromkeys([*read, *(lookup.key for lookup in used)]))
        for batch in self.file.batches(own):
            columns = dict(zip(own, batch.columns, strict=True))
            columns |= {name: columns[first] for name, first in self.again.items() if first in columns}
            for lookup in used:
                place_N = pc.index_in(pc.utf8_trim_whitespace(columns[lookup.key]), value_set=lookup.key_K)
                columns |= {name: column.take(place_N) for name, column in lookup.columns.items() if name in names}
            yield pa.RecordBatch.from_arrays([columns[name] for name in names], names=list(names))

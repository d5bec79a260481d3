"""Character vectors out of an R package, without R.

``Rdata.rdb`` holds the objects of a package one after the other: the length in 4 bytes, then a zlib stream of
R's serialization (R Internals, 1.8). Of that only what a plain character vector needs is read.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

HEADER = b"X\n"
VERSION_WITH_ENCODING = 3
CHARACTER_VECTOR, STRING = 16, 9
LATIN1 = 1 << 14
"""Of a string's flags: bit 2 of the 16 bits that R keeps from bit 12 on."""

MISSING = -1


def character_vectors(rdb: bytes) -> Iterator[list[str]]:
    """Every object of an ``Rdata.rdb``. Raises ValueError if one is not a plain character vector."""
    while rdb:
        stream = zlib.decompressobj()
        yield _character_vector(stream.decompress(rdb[4:]))
        rdb = stream.unused_data


def _character_vector(content: bytes) -> list[str]:
    integers = _Reader(content)
    if content[:2] != HEADER:
        raise ValueError("not in R's binary serialization")
    integers.position = len(HEADER)
    version, _written_by, _readable_by = (integers.next() for _ in range(3))
    if version == VERSION_WITH_ENCODING:
        integers.take(integers.next())
    if integers.next() & 0xFF != CHARACTER_VECTOR:
        raise ValueError("not a character vector")
    return [_string(integers) for _ in range(integers.next())]


def _string(reader: _Reader) -> str:
    flags, length = reader.next(), reader.next()
    if flags & 0xFF != STRING:
        raise ValueError("not a string")
    if length == MISSING:
        return ""
    return reader.take(length).decode("latin-1" if flags & LATIN1 else "utf-8")


class _Reader:
    """Big-endian integers of 4 bytes, and bytes, one after the other."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def next(self) -> int:
        value: int = struct.unpack_from(">i", self.content, self.position)[0]
        self.position += 4
        return value

    def take(self, count: int) -> bytes:
        self.position += count
        return self.content[self.position - count : self.position]

"""The framing of TensorBoard's event files: length, checksum, content, checksum.

TensorBoard's own writer takes the checksum (CRC-32C, RFC 3720) byte by byte in Python, which is most of the time that
writing an event takes: a millisecond for the scalars of a step, fifty for a picture. Here 64 bytes are taken at once:
the register after a block is a sum over GF(2) of what it was before and of each byte, moved on by what follows it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BLOCK = 64
_HEAD = struct.Struct("<Q4s")
_POLYNOMIAL = 0x82F63B78


def framed(content: bytes) -> bytes:
    """Return ``content`` as a record of an event file."""
    length = struct.pack("<Q", len(content))
    return b"".join([length, _masked(crc32c(length)), content, _masked(crc32c(content))])


def contents_of(path: Path) -> Iterator[bytes]:
    """Yield the contents of the records of an event file, up to its end or the first that is torn or altered."""
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, checksum = _HEAD.unpack(head)
            if checksum != _masked(crc32c(head[:8])):
                return
            content = file.read(length)
            if file.read(4) != _masked(crc32c(content)):
                return
            yield content


def crc32c(content: bytes) -> int:
    """Return the CRC-32C of ``content``."""
    table, blocks_64x256, moved = _tables()
    size = len(content) // _BLOCK * _BLOCK
    bytes_NB = np.frombuffer(content[:size], dtype=np.uint8).reshape(-1, _BLOCK)
    register = 0xFFFFFFFF
    for block in np.bitwise_xor.reduce(blocks_64x256[np.arange(_BLOCK), bytes_NB], axis=1).tolist():
        a, b, c, d = moved
        register = (
            a[register & 255] ^ b[register >> 8 & 255] ^ c[register >> 16 & 255] ^ d[register >> 24] ^ block
        )  # fmt: skip
    for byte in content[size:]:
        register = table[(register ^ byte) & 255] ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def _masked(crc: int) -> bytes:
    """Return a checksum as records hold it: a checksum of what contains checksums would say little."""
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


@lru_cache(maxsize=1)
def _tables() -> tuple[list[int], NDArray[np.uint32], list[list[int]]]:
    """Return what a byte makes of an empty register; the same for each place of a block, at the block's end; and what
    becomes of each of the register's four bytes in a block of zeros."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)

    def zeros(register: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
        for _ in range(count):
            register = table[register & 255] ^ (register >> 8)
        return register

    places = np.stack([zeros(table, _BLOCK - 1 - place) for place in range(_BLOCK)])
    register = np.arange(256, dtype=np.uint32)
    moved = [zeros(register << np.uint32(shift), _BLOCK).tolist() for shift in (0, 8, 16, 24)]
    return table.tolist(), places, moved

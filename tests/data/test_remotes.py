"""The first place that is kept, or else within reach, is read, and all of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.data.fetch.download import Archive, NetworkFailure
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.remotes import NoSource, Remote, RemoteFile, read_first
from dist_moe.errors import UserError

SILENT = Progress(enabled=False)


def remote(name: str, contents: dict[str, bytes], bring: Callable[[Path, bytes], None]) -> Remote[list[bytes]]:
    def file(filename: str, content: bytes) -> RemoteFile:
        archive = Archive(filename, hashlib.sha256(content).hexdigest(), name)
        return RemoteFile(archive, lambda path: bring(path, content))

    return Remote(
        name,
        tuple(file(filename, content) for filename, content in contents.items()),
        lambda paths, _progress: [path.read_bytes() for path in paths],
    )


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def fail(path: Path, content: bytes) -> None:
    raise NetworkFailure(f"no route to {content.decode()}")


def test_the_first_within_reach_is_read_with_all_its_files(tmp_path: Path) -> None:
    places = [remote("far", {"a": b"x"}, fail), remote("near", {"b": b"y", "c": b"z"}, write)]
    data, provenance = read_first(places, tmp_path, SILENT)
    assert data == [b"y", b"z"]
    assert provenance == {
        "name": "near",
        "sha256": {"b": hashlib.sha256(b"y").hexdigest(), "c": hashlib.sha256(b"z").hexdigest()},
    }


def test_a_later_place_that_is_kept_comes_before_an_earlier_one_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"y")
    places = [remote("first", {"a": b"x"}, write), remote("kept", {"b": b"y"}, fail)]
    assert read_first(places, tmp_path, SILENT)[0] == [b"y"]


def test_a_place_that_is_kept_in_part_is_completed(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"y")
    assert read_first([remote("near", {"b": b"y", "c": b"z"}, write)], tmp_path, SILENT)[0] == [b"y", b"z"]
    assert (tmp_path / "c").read_bytes() == b"z"


def test_none_within_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [remote("one", {"a": b"x"}, fail), remote("two", {"b": b"y"}, fail)]
    with pytest.raises(NoSource) as error:
        read_first(places, tmp_path, Progress(enabled=True))
    assert error.value.failures == ["one: no route to x", "two: no route to y"]
    assert "one is out of reach (no route to x): trying two" in capsys.readouterr().err


def test_wrong_bytes_are_not_passed_over(tmp_path: Path) -> None:
    served = remote("served", {"a": b"x"}, lambda path, _: write(path, b"else"))
    with pytest.raises(UserError, match="a from served is not the file that was published"):
        read_first([served, remote("good", {"b": b"y"}, write)], tmp_path, SILENT)
    (tmp_path / "b").write_bytes(b"rotten")
    with pytest.raises(UserError, match="is corrupt"):
        read_first([remote("good", {"b": b"y"}, write)], tmp_path, SILENT)

"""The seam of all data sets: a user's directory or remotes, found, read, verified and named in messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import PublishedData, Remote
from dist_moe.errors import UserError

from .checks import archive, digest
from .packing import write_wheel

SILENT = Progress(enabled=False)


def joined(files: list[File], progress: Progress) -> str:
    return "+".join(file.text() for file in files)


DATA = PublishedData(
    title="Words",
    files=(("one.txt",), ("two.txt", "two.txt.gz")),
    read=joined,
    folders=("raw", "Words/raw"),
    remedy="give the right directory.",
    rescue="put the files into {downloads}",
)
FAR: Remote[str] = Remote((archive("far.zip", b""),), ("one", "two"))
NEAR: Remote[str] = Remote((archive("near-1", b"a", b"a"), archive("near-2", b"b", b"b")))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    for name in ("one.txt", "two.txt"):
        (tmp_path / "root" / name).write_text(name[:3])
    return tmp_path / "root"


def test_a_directory_is_read_and_its_files_make_the_key(root: Path, tmp_path: Path) -> None:
    located = DATA.locate(root)
    content, provenance = located.read(tmp_path, SILENT)
    sums = {name: digest((root / name).read_bytes()) for name in ("one.txt", "two.txt")}
    assert (content, provenance) == ("one+two", {"name": "directory", "sha256": sums})
    (root / "two.txt").write_text("new")
    assert DATA.locate(root).key not in (located.key, "")
    (root / "two.txt").rename(root / "two.txt.gz")
    assert list(DATA.locate(root).files) == ["one.txt", "two.txt.gz"]


def test_a_directory_that_is_wrong_is_an_error_not_a_fallback(root: Path) -> None:
    data = replace(DATA, remotes=(NEAR,))
    with pytest.raises(UserError, match=r"absent is not a directory\. Remedy: give the right directory"):
        data.locate(root / "absent")
    (root / "two.txt").unlink()
    with pytest.raises(
        UserError, match=rf"the data root {root} has no two\.txt or two\.txt\.gz\. Remedy: give the right"
    ):
        data.locate(root)


@pytest.mark.parametrize("folder", DATA.folders)
def test_the_folder_above_the_right_one_is_answered_with_the_right_one(root: Path, folder: str) -> None:
    (right := root / "above" / folder).parent.mkdir(parents=True)
    for name in ("one.txt", "two.txt"):
        right.mkdir(exist_ok=True)
        (root / name).rename(right / name)
    with pytest.raises(UserError, match=f"give the directory {right} instead"):
        DATA.locate(root / "above")


def test_a_directory_that_changes_while_it_is_read_is_refused(root: Path, tmp_path: Path) -> None:
    def read_then_change(files: list[File], progress: Progress) -> str:
        (root / "one.txt").write_text("changed")
        return joined(files, progress)

    with pytest.raises(UserError, match="changed while they were read"):
        replace(DATA, read=read_then_change).locate(root).read(tmp_path, SILENT)


def test_remotes_serve_in_turn_whole_files_or_members(tmp_path: Path) -> None:
    located = replace(DATA, remotes=(FAR, NEAR)).locate(None)
    read, provenance = located.read(tmp_path / "some", SILENT)
    assert (read, located.key) == ("a+b", "")
    assert provenance["sha256"] == {"near-1": digest(b"a"), "near-2": digest(b"b")}
    wheel = write_wheel(tmp_path / "w-1-py3-none-any.whl", {"in/one": b"c", "in/two": b"d"})
    content = wheel.read_bytes()
    members = archive(wheel.name, content, content)
    backwards = Remote((members,), ("in/two", "in/one"), lambda files, progress: joined(files[::-1], progress))
    assert replace(DATA, remotes=(FAR, backwards)).locate(None).read(tmp_path / "other", SILENT)[0] == "c+d"


def test_without_any_source_each_is_named_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root is not given, and no package carries Words\. Remedy"):
        DATA.locate(None)
    with pytest.raises(UserError) as error:
        replace(DATA, remotes=(FAR,)).locate(None).read(tmp_path, SILENT)
    assert str(error.value).splitlines() == [
        "Words could not be had from any source:",
        "  - a directory of your own: none was given",
        "  - source of far.zip is out of reach (no route)",
        f"Remedy: put the files into {tmp_path}",
    ]
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]

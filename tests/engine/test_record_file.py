"""Records on disks that are really full or read-only: whole or not there, waiting, and counted when they are lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.engine.monitor.record_file import RecordFile
from tests.helpers.disks import fill, remount, small_disk

RECORDS = [f"{n:03d} {'x' * 996}\n".encode() for n in range(40)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kib=128) as directory:
        yield directory


def write(file: RecordFile, numbers: range) -> None:
    """One flush per record, as after every step."""
    for n in numbers:
        file.add(RECORDS[n])
        file.flush()


def test_a_disk_that_is_full_for_a_while_costs_nothing(disk: Path) -> None:
    said: list[str] = []
    file = RecordFile(disk / "deep" / "records", said.append)
    write(file, range(10))
    filler = fill(disk)
    write(file, range(10, 30))
    on_disk = file.path.read_bytes()
    assert b"".join(RECORDS[: len(on_disk) // 1001]) == on_disk  # whole ones, the last page's slack used up
    assert 10 <= len(on_disk) // 1001 < 20
    (warning,) = said
    for part in ("warning", str(file.path), "ENOSPC", "No space left on device"):
        assert part in warning
    filler.unlink()
    write(file, range(30, 40))
    file.close()
    assert file.path.read_bytes() == b"".join(RECORDS)
    assert (file.lost, len(said)) == (0, 1)


def test_a_disk_that_stays_full(disk: Path) -> None:
    said: list[str] = []
    filler = fill(disk)
    file = RecordFile(disk / "records", said.append)
    write(file, range(40))
    file.close()
    written = len(file.path.read_bytes()) // 1001
    assert file.lost == 40 - written > 30
    assert said[1:] == [f"warning: {file.lost} record(s) of {file.path} are lost: they could not be written"]
    filler.unlink()
    assert file.path.read_bytes() == b"".join(RECORDS[:written])


def test_memory_is_limited(disk: Path) -> None:
    """The oldest go first: what is written in the end is the newest."""
    file = RecordFile(disk / "records", lambda text: None, kept_bytes=5 * 1001)
    write(file, range(3))
    remount(disk, "ro")
    write(file, range(3, 20))
    assert file.lost == 12
    remount(disk, "rw")
    file.close()
    assert file.path.read_bytes() == b"".join(RECORDS[:3] + RECORDS[15:20])
    assert file.lost == 12


def test_what_was_written_of_a_record_goes_before_the_next(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the disk turned read-only just then, so that it cannot go at once."""
    file = RecordFile(disk / "records", lambda text: None)
    write(file, range(2))
    fill(disk)
    cut = RecordFile._cut
    monkeypatch.setattr(RecordFile, "_cut", _refuse)
    write(file, range(2, 8))
    assert len(file.path.read_bytes()) % 1001 > 0
    monkeypatch.setattr(RecordFile, "_cut", cut)
    (disk / "filler").unlink()
    file.close()
    assert file.path.read_bytes() == b"".join(RECORDS[:8])


def _refuse(self: RecordFile, file: object, end: int) -> None:
    raise OSError(30, "Read-only file system")


def test_a_disk_that_is_read_only(disk: Path) -> None:
    said: list[str] = []
    file = RecordFile(disk / "records", said.append)
    remount(disk, "ro")
    write(file, range(3))
    assert "EROFS: Read-only file system" in said[0]
    remount(disk, "rw")
    file.close()
    assert (file.path.read_bytes(), file.lost) == (b"".join(RECORDS[:3]), 0)


def test_other_errors_are_raised(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        RecordFile(tmp_path / "directory", print)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        RecordFile(tmp_path / "file" / "records", print)
    file = RecordFile(tmp_path / "records", print)
    file.path.unlink()
    file.path.mkdir()
    file.add(RECORDS[0])
    with pytest.raises(IsADirectoryError):
        file.flush()
    with pytest.raises(IsADirectoryError):
        file.close()

"""A file of records that outlives a full or failing disk: the training goes on, and what could be saved is.

Records are appended whole or not at all. What cannot be written is kept in memory, up to a limit, and tried
again whenever there is more to write, and at the end; what had to be given up is counted.

A file of JSON records is read line by line, and a line that is no record is in nobody's way.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import IO

from dist_moe.config.files import json_line, parse_json

SURVIVED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOENT})
"""Disk full, quota or file size used up, read-only, failing, its server gone for a while, or the directory renamed."""

KEPT_BYTES = 16 * 2**20
"""The size of the records that may wait for the disk; beyond it the oldest are given up."""


class RecordFile:
    """Appends records to ``path``, which it makes, with the directories above it.

    ``within``: a directory above; once its path leads to another one, or to none, nothing is written or made there.
    ``say``: gets one sentence when the disk first fails, and one in the end if records were lost. ``lost``: how
    many were; final after :meth:`close`. Only one process may write. Raises OSError for errors not in SURVIVED.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None], kept_bytes: int = KEPT_BYTES, within: Path | None = None
    ) -> None:
        self.path, self.within = path, within
        self._began_in = within.stat() if within is not None and within.is_dir() else None
        self.lost = 0
        self._say = say
        self._kept_bytes = kept_bytes
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._torn_at: int | None = None
        self._has_failed = False
        self.flush()

    def add(self, record: bytes) -> None:
        """Take a record in, to be written by the next :meth:`flush`."""
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        while self._waiting_bytes > self._kept_bytes:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.lost += 1

    def flush(self) -> None:
        """Write all that waits, or as much of it as the disk takes."""
        try:
            self._write()
        except OSError as error:
            if error.errno not in SURVIVED:
                raise
            if not self._has_failed:
                self._has_failed = True
                name = errno.errorcode.get(error.errno or 0, "")
                self._say(
                    f"warning: {self.path} cannot be written: {name}: {error.strerror}; the training goes on, and its "
                    f"records are kept in memory (up to {self._kept_bytes / 2**20:g} MiB) until they can be"
                )

    def close(self) -> None:
        """Try for the last time, and say what is lost."""
        self.flush()
        self.lost += len(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        if self.lost:
            self._say(f"warning: {self.lost} record(s) of {self.path} are lost: they could not be written")

    def _write(self) -> None:
        # Opened anew each time: a file that stays open keeps a disk from being repaired, and may go stale.
        if self.within and self._began_in and not os.path.samestat(self.within.stat(), self._began_in):
            raise FileNotFoundError(errno.ENOENT, "another directory has taken its place")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            if self._torn_at is not None:
                self._cut(file, self._torn_at)
            while self._waiting:
                end, rest = file.seek(0, 2), memoryview(self._waiting[0])
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    self._torn_at = end
                    with suppress(OSError):  # a disk that is read-only by now; the next flush begins with it
                        self._cut(file, end)
                    raise
                self._waiting_bytes -= len(self._waiting.popleft())

    def _cut(self, file: FileIO, end: int) -> None:
        file.truncate(end)
        self._torn_at = None


def last_step_in(path: Path) -> int:
    """Return the last step in a file of JSON records; 0 if there is none. Raises OSError."""
    with path.open("rb") as file:
        return max((_step_of(line) or 0 for line, is_whole in _lines(file) if is_whole), default=0)


def sift_records(path: Path, last_step: int) -> int:
    """Drop the records of steps after ``last_step`` from a file of JSON records, and one that is cut short at its end.

    Lines that are no records are moved to ``path`` + ".bad". Returns how many stood before the first record that is
    dropped. Only if something stays behind what goes, is the file written anew: else it is cut. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    position, prefix, num_bad, is_dropping = 0, 0, 0, False
    with path.open("rb") as file, ExitStack() as stack:
        rest: IO[bytes] | None = None
        for line, is_whole in _lines(file):
            position += len(line)
            step = _step_of(line) if is_whole else None
            if step is None:
                if line.endswith(b"\n") or not (is_whole and line.startswith(b"{")):
                    num_bad += line.endswith(b"\n") and not is_dropping
                    with path.with_name(f"{path.name}.bad").open("ab") as bad:
                        bad.write(line)
            elif step > last_step:
                is_dropping = True
            elif rest is None and prefix == position - len(line) and _clean(line) == line:
                prefix = position
            else:
                if rest is None:
                    rest = stack.enter_context(partial.open("wb"))
                    with path.open("rb") as beginning:
                        _copy(beginning, rest, prefix)
                rest.write(_clean(line))
    if rest is not None:
        os.replace(partial, path)
    elif prefix < position:
        os.truncate(path, prefix)
    return num_bad


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield lines, and whether each may be a record: what is longer than any comes in parts, and is none."""
    begins = True
    while part := file.readline(KEPT_BYTES):
        ends = part.endswith(b"\n")
        yield part, begins and (ends or len(part) < KEPT_BYTES)
        begins = ends


def _step_of(line: bytes) -> int | None:
    """Return the step of a record; None if the line is none."""
    try:
        step = parse_json(line)["step"]
    except (ValueError, TypeError, LookupError):
        return None
    return step if type(step) is int and step >= 0 else None


def _clean(line: bytes) -> bytes:
    """Return the line of a record with its end, and without the words NaN and Infinity that earlier versions wrote."""
    if b"NaN" in line or b"Infinity" in line:
        line = json_line(parse_json(line)).encode()
    return line if line.endswith(b"\n") else line + b"\n"


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0:
        size -= target.write(source.read(min(size, 2**20)))

"""A file of records that outlives a full or failing disk: the training goes on, and what could be saved is.

Records are appended whole or not at all. What cannot be written is kept in memory, up to a limit, and tried
again whenever there is more to write, and at the end; what had to be given up is counted.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

SURVIVED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE})
"""Disk full, quota or file size used up, read-only, failing, or its server gone for a while."""

KEPT_BYTES = 16 * 2**20
"""The size of the records that may wait for the disk; beyond it the oldest are given up."""


class RecordFile:
    """Appends records to ``path``, which it makes, with the directories above it.

    ``say``: gets one sentence when the disk first fails, and one in the end if records were lost. ``lost``: how
    many were; final after :meth:`close`. Only one process may write. Raises OSError for errors not in SURVIVED.
    """

    def __init__(self, path: Path, say: Callable[[str], None], kept_bytes: int = KEPT_BYTES) -> None:
        self.path = path
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

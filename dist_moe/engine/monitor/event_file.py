"""TensorBoard's event file, written event by event through :class:`RecordFile`.

torch's SummaryWriter writes in a thread that ends for good with the first error of the disk.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from dist_moe.engine.monitor.record_file import RecordFile

_VERSION = "brain.Event:2"
_numbers = itertools.count()


class EventFile:
    """A new event file in ``directory``. Events of ``purge_step`` and later in older files count no more.

    ``say``: where a disk that fails is reported. ``lost``: events that could not be written.
    """

    def __init__(self, directory: Path, purge_step: int, say: Callable[[str], None]) -> None:
        _wait_for_a_later_name(directory)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._file = RecordFile(directory / name, say)
        self._add(Event(file_version=_VERSION))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    @property
    def lost(self) -> int:
        return self._file.lost

    def add(self, summary: Summary, step: int) -> None:
        """To be written by the next :meth:`flush`."""
        self._add(Event(step=step, summary=summary))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        framed = BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        self._file.add(framed.getvalue())


def _wait_for_a_later_name(directory: Path) -> None:
    """Event files are read in the order of their names, which begin with the second in which they were made."""
    seconds = [int(path.name.split(".")[3]) for path in directory.glob("events.out.tfevents.*")]
    if seconds and max(seconds) == int(time.time()):
        time.sleep(1.0)

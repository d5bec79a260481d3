"""TensorBoard: scalars of every step, pictures of the load, the configuration as text and as hyper-parameters.

The event file is written event by event through :class:`RecordFile`: torch's SummaryWriter writes in a thread that
ends for good with the first error of the disk. It lies in the run's own directory, so that TensorBoard calls the run by
that directory's name. What pictures need of earlier steps is in the event file, too.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_HALF
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import summary

from dist_moe.engine.monitor.board import Board
from dist_moe.engine.monitor.board_tags import LAYOUT, MEANINGS
from dist_moe.engine.monitor.event_records import contents_of, framed
from dist_moe.engine.monitor.load_history import LoadHistory
from dist_moe.engine.monitor.pictures import Panel, draw, png
from dist_moe.engine.monitor.record_file import RecordFile
from dist_moe.engine.monitor.trackers import TRACKERS, FileTracker, Say, Tracker, TrackerSettings

LOAD_SHARE = "experts/load_share"
"""Tag of the shares (layers, experts) of a column of the load's history, fp16; the steps since the column before."""

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.\d{1,10}\.")
_FILE_VERSION = "brain.Event:2"
_numbers = itertools.count()


@TRACKERS.register
class TensorBoardSettings(TrackerSettings):
    """TensorBoard's event files, in the directory of the run."""

    name: Literal["tensorboard"] = Field("tensorboard", description="which tracker this is")

    def build(self, root: Path, first_step: int, say: Say) -> Tracker:
        """Return the tracker that writes there."""
        return TensorBoardTracker(root, first_step, say)


class TensorBoardTracker(Board, FileTracker):
    """Writes a new event file into ``directory``; events after ``first_step`` in older files count no more."""

    def __init__(self, directory: Path, first_step: int, say: Say) -> None:
        # Event files are read in the order of their names, which begin with a second: that of this one comes after all
        # that stand there, though the clock may be behind those of earlier attempts on other machines.
        before = _event_files(directory)
        second = max([int(time.time()), *(int(path.name.split(".")[3]) + 1 for path in before)])
        self._earliest = max([float(second), *(path.stat().st_mtime for path in before)])
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        Board.__init__(self, first_step, history_in(directory, first_step))
        FileTracker.__init__(self, RecordFile(directory / name, say, within=directory))
        self._explained: set[str] = set()
        self._add(Event(file_version=_FILE_VERSION))
        self._add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._add(Event(step=first_step, summary=summary.custom_scalars(LAYOUT)))
        self.flush()

    def picture(self, name: str, panels: Sequence[Panel], step: int) -> None:
        """Add a picture of ``panels``, one below the other."""
        image = draw(panels)
        encoded = Summary.Image(width=image.width, height=image.height, colorspace=3, encoded_image_string=png(image))
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=encoded)])))

    def text(self, name: str, text: str, step: int) -> None:
        """Add a text, in Markdown."""
        self._add(Event(step=step, summary=summary.text(name, text)))

    def hyperparameters(self, values: Mapping[str, bool | float | str]) -> None:
        """Add what the run is compared by with others, and that its metrics are all its scalars."""
        texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
        _, start, _ = summary.hparams(texts, {})
        self._add(Event(summary=start))

    def metrics(self, part: str, metrics: dict[str, Any], step: int) -> None:
        """Add the numbers of an evaluation, and write them at once."""
        super().metrics(part, metrics, step)
        self._file.flush()

    def keep_load(self, column_LE: NDArray[np.float16], step: int) -> None:
        """Keep a column of the load's history in the event file."""
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="dist_moe"))
        value = Summary.Value(tag=LOAD_SHARE, metadata=metadata, tensor=_half_tensor(column_LE))
        self._add(Event(step=step, summary=Summary(value=[value])))

    def curves(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Add all of a step in one event: an event each would cost as much each. A tag's first has its meaning."""
        every = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        for value in every:
            if value.tag in MEANINGS and value.tag not in self._explained:
                self._explained.add(value.tag)
                value.metadata.summary_description = MEANINGS[value.tag]
                value.metadata.plugin_data.plugin_name = "scalars"
                value.metadata.data_class = DATA_CLASS_SCALAR  # without it TensorBoard's server drops the meaning
        self._add(Event(step=step, summary=Summary(value=every)))

    def _add(self, event: Event) -> None:
        event.wall_time = max(time.time(), self._earliest)
        self._file.add(framed(event.SerializeToString()))


def _event_files(directory: Path) -> list[Path]:
    """Return the event files in ``directory``, in the order in which they were begun."""
    files = directory.iterdir() if directory.is_dir() else ()
    return sorted(path for path in files if _EVENT_FILE.match(path.name))


def history_in(directory: Path, last_step: int) -> LoadHistory:
    """Return what earlier attempts of the run in ``directory`` have written of the load up to ``last_step``.

    What one holds of steps that the next does again does not count. Empty, where no event file was written.
    """
    columns: dict[int, NDArray[np.float16]] = {}
    for path in _event_files(directory) if last_step else ():
        for event in map(Event.FromString, contents_of(path)):
            if event.session_log.status == SessionLog.START:
                columns = {step: column_LE for step, column_LE in columns.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == LOAD_SHARE:
                    columns[event.step] = make_ndarray(value.tensor)
    history = LoadHistory()
    for step, column_LE in columns.items():
        if step <= last_step:
            history.put(step, column_LE)
    return history


def _half_tensor(values: NDArray[np.float16]) -> TensorProto:
    """Return the message of a tensor, as bytes; ``make_tensor_proto`` would take each number by itself."""
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in values.shape])
    return TensorProto(dtype=DT_HALF, tensor_shape=shape, tensor_content=values.tobytes())

"""TensorBoard: scalars of every step, load per expert as histogram and as an image over time.

The event file is written event by event through :class:`RecordFile`: torch's SummaryWriter writes in a thread that
ends for good with the first error of the disk.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from dist_moe.engine.monitor.record_file import RecordFile
from dist_moe.engine.monitor.trackers import TRACKERS, FileTracker, Say, Tracker, TrackerSettings

IMAGE_EVERY = 100
MAX_COLUMNS = 400
PIXELS_PER_CELL = 12

_TAGS = {
    "loss": "loss/task",
    "total_loss": "loss/total",
    "active_experts": "experts/active_per_token",
    "rows_computed": "experts/rows_computed",
    "wire_bytes": "traffic/all_to_all_bytes",
    "wire_rows": "traffic/all_to_all_rows",
    "wire_bytes_across_nodes": "traffic/bytes_across_nodes",
    "wire_rows_across_nodes": "traffic/rows_across_nodes",
    "gate_seconds": "time/gate",
    "dispatch_seconds": "time/dispatch",
    "experts_seconds": "time/experts",
    "combine_seconds": "time/combine",
    "examples_per_second": "speed/examples_per_second",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "skipped": "optimizer/skipped",
}
"""Tags of the numbers that every run records; others are their own tag, or a loss if they name no group."""

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.\d{1,10}\.")
_FILE_VERSION = "brain.Event:2"
_numbers = itertools.count()


@TRACKERS.register
class TensorBoardSettings(TrackerSettings):
    """TensorBoard's event files, in the directory ``tensorboard`` of the run."""

    name: Literal["tensorboard"] = Field("tensorboard", description="which tracker this is")

    def build(self, root: Path, first_step: int, say: Say) -> Tracker:
        """Return the tracker that writes there."""
        return TensorBoardTracker(root / "tensorboard", first_step, say)


class TensorBoardTracker(FileTracker):
    """Writes a new event file into ``directory``; events after ``first_step`` in older files count no more."""

    def __init__(self, directory: Path, first_step: int, say: Say) -> None:
        # Event files are read in the order of their names, which begin with a second: that of this one comes after all
        # that stand there, though the clock may be behind those of earlier attempts on other machines.
        before = [path for path in directory.iterdir() if _EVENT_FILE.match(path.name)] if directory.is_dir() else []
        second = max([int(time.time()), *(int(path.name.split(".")[3]) + 1 for path in before)])
        self._earliest = max([float(second), *(path.stat().st_mtime for path in before)])
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        super().__init__(RecordFile(directory / name, say, within=directory.parent))
        self._load_columns: list[list[NDArray[np.float64]]] = []
        self._add(Event(file_version=_FILE_VERSION))
        self._add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def step(self, record: dict[str, Any]) -> None:
        """Add a step's scalars, and of every 100th the load per expert."""
        step, load_LE = record["step"], np.asarray(record.get("load", ()))
        scalars = {_tag(name): value for name, value in record.items() if isinstance(value, float) and name != "epoch"}
        if len(load_LE):
            means = load_LE.mean(axis=1)  # 0 where a layer had no row
            scalars["experts/load_max_over_mean"] = float((load_LE.max(axis=1) / np.where(means, means, np.inf)).max())
        self._scalars(scalars, step)
        self._load_columns = self._load_columns or [[] for _ in load_LE]
        for layer, (load_E, columns) in enumerate(zip(load_LE, self._load_columns, strict=True)):
            self._load(load_E, columns, f"/layer_{layer}" if len(load_LE) > 1 else "", step)

    def metrics(self, part: str, metrics: dict[str, Any], step: int) -> None:
        """Add the numbers of an evaluation as scalars named after ``part``, those in mappings too."""
        self._scalars(dict(_numbers_in(part, metrics)), step)
        self.flush()

    def image(self, name: str, matrix: Tensor, step: int) -> None:
        """Add a picture, enlarged."""
        enlarged = torch.kron(1 - matrix.float().cpu(), torch.ones(PIXELS_PER_CELL, PIXELS_PER_CELL))
        self._add(Event(step=step, summary=summary.image(name, enlarged, dataformats="HW")))

    def _scalars(self, values: dict[str, float], step: int) -> None:
        """Add all of a step in one event: an event each would cost as much each."""
        every = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=every)))

    def _load(self, load_E: NDArray[np.float64], columns: list[NDArray[np.float64]], suffix: str, step: int) -> None:
        total = load_E.sum()
        columns.append(load_E / total if total else load_E)
        if step % IMAGE_EVERY == 0:
            experts = np.repeat(np.arange(len(load_E)), load_E.astype(int))
            histogram = summary.histogram(f"experts/load{suffix}", experts, bins=len(load_E))
            image = summary.image(f"experts/load_over_time{suffix}", _load_image(columns), dataformats="HW")
            self._add(Event(step=step, summary=histogram))
            self._add(Event(step=step, summary=image))

    def _add(self, event: Event) -> None:
        event.wall_time = max(time.time(), self._earliest)
        framed = BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        self._file.add(framed.getvalue())


def _tag(name: str) -> str:
    return _TAGS.get(name, name if "/" in name else f"loss/{name}")


def _numbers_in(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers in a mapping and in those within it, by their paths."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers_in(f"{name}/{key}", inner)
    elif isinstance(value, (int, float)):
        yield name, value


def _load_image(columns: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return an image with experts down and time to the right; white is no load, black the heaviest share so far."""
    pieces = np.array_split(np.stack(columns), min(len(columns), MAX_COLUMNS))
    image = np.stack([piece.mean(axis=0) for piece in pieces], axis=1)
    image = 1 - image / max(image.max(), np.finfo(float).tiny)
    return np.kron(image, np.ones((PIXELS_PER_CELL, 2)))

"""TensorBoard: scalars of every step, pictures of the load, the configuration as text and as hyper-parameters.

The event file is written event by event through :class:`RecordFile`: torch's SummaryWriter writes in a thread that
ends for good with the first error of the disk. It lies in the run's own directory, so that TensorBoard calls the run by
that directory's name. How many scalars there are does not depend on the number of layers, experts or ranks; what does
is shown as pictures. Pictures are drawn after a hundred steps, whenever the run is half as long again as at the last
ones, and at its end, so that they cost next to nothing however long it lasts; what they need of earlier steps is in the
event file, too.
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
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_HALF
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import summary

from dist_moe.engine.monitor.board_tags import LAYOUT, MEANINGS, split_metrics, tag_of
from dist_moe.engine.monitor.event_records import contents_of, framed
from dist_moe.engine.monitor.load import effective_experts
from dist_moe.engine.monitor.load_history import LoadHistory, over_time, step_names
from dist_moe.engine.monitor.pictures import Bars, HeatMap, NamedBars, Panel, draw, has_grown, png
from dist_moe.engine.monitor.record_file import RecordFile
from dist_moe.engine.monitor.trackers import TRACKERS, FileTracker, Say, Tracker, TrackerSettings

LOAD_SHARE = "experts/load_share"
"""Tag of the shares (layers, experts) of a column of the load's history, fp16; the steps since the column before."""

_PANELS = 4
"""Layers that have a panel of their own, at most."""
_PLACES = 180
"""Places on an axis of time, at most."""
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


class TensorBoardTracker(FileTracker):
    """Writes a new event file into ``directory``; events after ``first_step`` in older files count no more."""

    def __init__(self, directory: Path, first_step: int, say: Say) -> None:
        # Event files are read in the order of their names, which begin with a second: that of this one comes after all
        # that stand there, though the clock may be behind those of earlier attempts on other machines.
        before = [path for path in directory.iterdir() if _EVENT_FILE.match(path.name)] if directory.is_dir() else []
        second = max([int(time.time()), *(int(path.name.split(".")[3]) + 1 for path in before)])
        self._earliest = max([float(second), *(path.stat().st_mtime for path in before)])
        name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        super().__init__(RecordFile(directory / name, say, within=directory))
        self._history = _history_in(sorted(before), first_step)
        self._explained: set[str] = set()
        self._load: Sequence[Sequence[float]] = ()
        self._waiting: list[Sequence[Sequence[float]]] = []
        self._step, self._drawn_at = first_step, {"load": first_step}
        self._add(Event(file_version=_FILE_VERSION))
        self._add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._add(Event(step=first_step, summary=summary.custom_scalars(LAYOUT)))
        self.flush()

    def step(self, record: dict[str, Any]) -> None:
        """Add a step's scalars, and its load to what the next pictures show."""
        self._step = record["step"]
        values = {tag_of(name): x for name, x in record.items() if isinstance(x, float) and name != "epoch"}
        self._scalars(values, self._step)
        if len(load := record.get("load", ())):
            self._load = load
            self._waiting.append(load)

    def metrics(self, part: str, metrics: dict[str, Any], step: int) -> None:
        """Add the numbers of an evaluation: as scalars named after ``part``, or as pictures, see ``split_metrics``."""
        numbers, pictures = split_metrics(metrics)
        self._scalars({f"{part}/{name}": value for name, value in numbers.items()}, step)
        if self._is_due(part, step):
            for name, content in pictures.items():
                if panels := _panels_of(name, content):
                    self.picture(f"{part}/{name}", panels, step)
        self._file.flush()

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

    def flush(self) -> None:
        """Write what has been taken in so far, and draw the pictures that are due."""
        if self._waiting:
            self._history.add(self._step, _filled(self._waiting))
            self._waiting = []
        column_LE = self._history.end_column()
        if column_LE is not None:
            metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="dist_moe"))
            value = Summary.Value(tag=LOAD_SHARE, metadata=metadata, tensor=_half_tensor(column_LE))
            self._add(Event(step=self._step, summary=Summary(value=[value])))
        if self._load and self._is_due("load", self._step):
            self._draw_load()
        self._file.flush()

    def close(self) -> None:
        """Draw and write for the last time."""
        self.flush()
        if self._load and self._drawn_at["load"] < self._step:
            self._draw_load()
        super().close()

    def _is_due(self, what: str, step: int) -> bool:
        """Return whether ``what`` is to be drawn now; if so, it counts as drawn."""
        is_due = what not in self._drawn_at or has_grown(step, self._drawn_at[what])
        if is_due:
            self._drawn_at[what] = step
        return is_due

    def _draw_load(self) -> None:
        """Draw the load: of the last step, over time, and the effective experts of all layers over time.

        A layer's panels are those of the most uneven layers, where there are many.
        """
        self._drawn_at["load"] = self._step
        (load_LE,) = _filled([self._load])
        last_steps, share_CLE = self._history.shares()
        experts_L = (~np.isnan(load_LE)).sum(axis=1)
        effective_CL = effective_experts(np.nan_to_num(share_CLE))
        layers = np.sort(np.argsort(effective_CL[-1] / experts_L, kind="stable")[:_PANELS])
        names = step_names(int(last_steps[-1]), _PLACES)
        relative_LE = _times_the_mean(load_LE, experts_L)
        bars: list[Panel] = []
        maps: list[Panel] = []
        for layer in layers.tolist():
            title, count = f"layer {layer}" if len(experts_L) > 1 else "the layer's experts", experts_L[layer]
            bars.append(
                Bars(
                    relative_LE[layer, :count], title, "expert", f"rows of step {self._step}, times the mean", line=1.0
                )
            )
            share_EC = over_time(last_steps, share_CLE[:, layer, :count] * count, _PLACES)
            share_EC = np.where(share_EC > 0, share_EC, np.nan)
            maps.append(
                HeatMap(share_EC, title, "expert", "step", "times the mean load", column_names=names, nothing="no row")
            )
        self.picture("experts/load", bars, self._step)
        self.picture("experts/load_over_time", maps, self._step)
        if len(experts_L) > 1:
            everything_LE = np.where(relative_LE > 0, relative_LE, np.nan)
            title = f"load of step {self._step}"
            by_layer = HeatMap(everything_LE, title, "layer", "expert", "times the mean load", nothing="no row")
            self.picture("experts/load_by_layer", [by_layer], self._step)
            share_LC = over_time(last_steps, effective_CL / experts_L, _PLACES)
            title, unit = "effective experts", "share of the layer's experts"
            over = HeatMap(share_LC, title, "layer", "step", unit, column_names=names, limits=(0.0, 1.0))
            self.picture("experts/effective_over_time", [over], self._step)

    def _scalars(self, values: dict[str, float], step: int) -> None:
        """Add all of a step in one event: an event each would cost as much each. A tag's first has its meaning."""
        every = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        for value in every:
            if value.tag in MEANINGS and value.tag not in self._explained:
                self._explained.add(value.tag)
                value.metadata.summary_description = MEANINGS[value.tag]
                value.metadata.plugin_data.plugin_name = "scalars"
        self._add(Event(step=step, summary=Summary(value=every)))

    def _add(self, event: Event) -> None:
        event.wall_time = max(time.time(), self._earliest)
        self._file.add(framed(event.SerializeToString()))


def _history_in(files: Sequence[Path], last_step: int) -> LoadHistory:
    """Return what earlier attempts of a run have written of the load of the steps up to ``last_step``.

    ``files``: in the order in which they were begun; what one holds of steps that the next does again does not count.
    """
    columns: dict[int, NDArray[np.float16]] = {}
    for path in files if last_step else ():
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


def _filled(loads: Sequence[Sequence[Sequence[float]]]) -> NDArray[np.float64]:
    """Return (W, L, E) loads of W steps; layers with fewer experts than others are filled up by NaN."""
    sizes = list(map(len, loads[0]))
    if min(sizes) == max(sizes):
        return np.asarray(loads, dtype=np.float64)
    filled_WLE = np.full((len(loads), len(sizes), max(sizes)), np.nan)
    for layer, size in enumerate(sizes):
        filled_WLE[:, layer, :size] = [load[layer] for load in loads]
    return filled_WLE


def _times_the_mean(load_LE: NDArray[np.float64], experts_L: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return loads (L, E) over the mean of their layer; 0 where a layer had no row."""
    mean_L1 = (np.nansum(load_LE, axis=1) / experts_L)[:, None]
    return load_LE / np.where(mean_L1 > 0, mean_L1, 1.0)


def _panels_of(name: str, content: Mapping[str, Any]) -> list[Panel]:
    """Return pictures of a mapping of numbers (bars), of equal mappings of numbers (a heat map), or of deeper ones."""
    numbers = {key: float(x) for key, x in content.items() if isinstance(x, (int, float))}
    if len(numbers) > 1:
        return [NamedBars(numbers, name)]
    inner = [one for one in content.values() if isinstance(one, Mapping)]
    names = list(inner[0]) if inner else []
    if names and all(list(one) == names and all(isinstance(x, (int, float)) for x in one.values()) for one in inner):
        matrix = np.array([list(one.values()) for one in inner], dtype=np.float64)
        return [HeatMap(matrix, name, "", "", "value", list(content), names)]
    return [panel for key, one in content.items() if isinstance(one, Mapping) for panel in _panels_of(key, one)]

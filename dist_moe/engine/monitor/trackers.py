"""Trackers: where the numbers and pictures of a run go, by name.

To add one: derive a settings class from :class:`TrackerSettings` whose ``build`` gives a :class:`Tracker`, and register
it, here or in a module under ``imports``. See docs/extending/tracker.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny

from dist_moe.config.files import json_line
from dist_moe.config.registry import Registry
from dist_moe.config.settings import Settings
from dist_moe.engine.monitor.pictures import Panel
from dist_moe.engine.monitor.record_file import RecordFile
from dist_moe.errors import UserError

Say = Callable[[str], None]
"""Takes a sentence for the user."""


class Tracker(ABC):
    """Takes in what a run shows, on rank 0. ``lost``: how much could not be written; final after :meth:`close`."""

    lost = 0

    @abstractmethod
    def step(self, record: dict[str, Any]) -> None:
        """Take the record of a finished step: numbers by name, ``step`` among them, and, of models with experts,
        ``load``: rows per layer and expert, a list of E numbers for each layer."""

    def metrics(self, part: str, metrics: dict[str, Any], step: int) -> None:  # noqa: B027 (some take steps alone)
        """Take numbers by name of an evaluation (``part``: validation, test) or of what else happens beside training
        (swap_search, placement), after ``step`` steps. A validation comes before the records of its window of steps."""

    def picture(self, name: str, panels: Sequence[Panel], step: int) -> None:  # noqa: B027 (most show none)
        """Take a picture: heat maps and bars, with their axes, names and units."""

    def text(self, name: str, text: str, step: int) -> None:  # noqa: B027 (most show none)
        """Take a text in Markdown, such as the configuration or an alarm."""

    def hyperparameters(self, values: Mapping[str, bool | float | str]) -> None:  # noqa: B027 (most show none)
        """Take the fields of the configuration, by their paths, by which the run is compared with others."""

    def follow(self, root: Path) -> None:  # noqa: B027 (some write elsewhere)
        """Take the news that the run directory is ``root`` from now on: it was renamed."""

    def flush(self) -> None:  # noqa: B027 (some write at once)
        """Write what has been taken in so far."""

    def close(self) -> None:  # noqa: B027 (some hold nothing)
        """Write for the last time."""


class TrackerSettings(Settings, ABC):
    """An entry of the section ``trackers``: which tracker, and its own fields."""

    name: str

    def check(self) -> None:
        """Raise UserError for what is missing on this machine, such as a package; before any process group exists."""

    @abstractmethod
    def build(self, root: Path, first_step: int, say: Say) -> Tracker:
        """Return the tracker of the run in the directory ``root``.

        ``first_step``: steps done before; what an earlier attempt wrote of later ones must count no more. ``say``:
        where a disk that fails is reported.
        """


TRACKERS = Registry("tracker", TrackerSettings)

TrackerConfig = Annotated[SerializeAsAny[TrackerSettings], TRACKERS]
"""The type of a configuration field that holds any registered tracker."""


def check_trackers(trackers: Sequence[TrackerSettings]) -> None:
    """Raise UserError for a tracker that is there twice, or that misses something on this machine."""
    names = [tracker.name for tracker in trackers]
    if len(set(names)) < len(names):
        raise UserError(f"trackers={names}: each can be there once")
    for tracker in trackers:
        tracker.check()


class FileTracker(Tracker):
    """A tracker that writes into one ``file``; a disk that is full does not end it, see :class:`RecordFile`."""

    def __init__(self, file: RecordFile) -> None:
        self._file = file

    @property
    def lost(self) -> int:  # type: ignore[override]
        """The number of records that could not be written."""
        return self._file.lost

    def follow(self, root: Path) -> None:
        """Write to the file where it is now."""
        if self._file.within is not None:
            self._file.path = root / self._file.path.relative_to(self._file.within)
            self._file.within = root

    def flush(self) -> None:
        """Write what has been taken in so far."""
        self._file.flush()

    def close(self) -> None:
        """Write for the last time."""
        self._file.close()


@TRACKERS.register
class MetricsFileSettings(TrackerSettings):
    """metrics.jsonl: one object per step, and {"step": .., "validation": {..}} after a step that was validated."""

    name: Literal["jsonl"] = Field("jsonl", description="which tracker this is")

    def build(self, root: Path, first_step: int, say: Say) -> Tracker:
        """Return the tracker that writes that file."""
        return MetricsFile(RecordFile(root / "metrics.jsonl", say, within=root), first_step)


class MetricsFile(FileTracker):
    """Writes JSON lines into ``file``."""

    def __init__(self, file: RecordFile, first_step: int) -> None:
        super().__init__(file)
        self._last_step = first_step
        self._validations: list[dict[str, Any]] = []

    def step(self, record: dict[str, Any]) -> None:
        """Write the record of a step, and the validations that were waiting for it."""
        self._write(record)
        self._last_step = record["step"]
        self._write_validations()

    def metrics(self, part: str, metrics: dict[str, Any], step: int) -> None:
        """Write a validation, once the record of its step stands in the file."""
        if part == "validation":
            self._validations.append({"step": step, "validation": metrics})
            self._write_validations()

    def _write_validations(self) -> None:
        """Write the validations of steps whose records stand in the file."""
        while self._validations and self._validations[0]["step"] <= self._last_step:
            self._write(self._validations.pop(0))

    def _write(self, record: dict[str, Any]) -> None:
        self._file.add(f"{json_line(record)}\n".encode())

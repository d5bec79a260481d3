"""The hub of what a run shows: trackers, and a progress line, live on a terminal. Silent on all ranks but the first."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tqdm import tqdm

import dist_moe.engine.monitor.services  # noqa: F401 (registers its trackers)
from dist_moe.engine.monitor.pictures import Panel
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.tensorboard import TensorBoardSettings
from dist_moe.engine.monitor.trackers import MetricsFileSettings, Tracker, TrackerSettings
from dist_moe.screen import say

SECONDS_BETWEEN_LINES = 10.0
_LIVE = "{n_fmt}/{total_fmt} {bar}| {remaining} left{postfix}"
_LIVE_WIDTH = 23
"""The least columns of a live line beside its numbers and steps: 4 signs, 4 of a bar, 'h:mm:ss left, '."""
_LOST_TERMINAL = suppress(OSError, ValueError)
DEFAULT_TRACKERS: tuple[TrackerSettings, ...] = (MetricsFileSettings(), TensorBoardSettings())


class Monitor:
    """Takes what a run shows and gives it to ``trackers`` (none without a ``run``) and to the progress line.

    ``is_rank_zero``: others do nothing. A disk that is full does not end it, see
    :class:`~dist_moe.engine.monitor.record_file.RecordFile`.
    """

    def __init__(
        self,
        run: RunDirectory | None,
        trackers: Sequence[TrackerSettings],
        *,
        is_rank_zero: bool,
        first_step: int,
        total_steps: int,
        steps_per_epoch: int,
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._progress: ProgressLine | None = None
        self._trackers: dict[str, Tracker] = {}
        self._spoilt = 0
        if not is_rank_zero:
            return
        self._progress = ProgressLine(total_steps, first_step)
        if run is not None:
            self._spoilt = run.forget_metrics_after(first_step)
            if self._spoilt:
                self.say(
                    f"warning: {self._spoilt} line(s) of {run.metrics} are no records; moved to {run.metrics.name}.bad"
                )
            self._trackers = {one.name: one.build(run.root, first_step, self.say) for one in trackers}

    @property
    def lost_records(self) -> dict[str, int]:
        """How many could not be written or were spoilt, by tracker; final after :meth:`close`. Empty but on rank 0."""
        spoilt: dict[str, int] = {MetricsFileSettings().name: self._spoilt}
        return {name: tracker.lost + spoilt.get(name, 0) for name, tracker in self._trackers.items()}

    def say(self, text: str) -> None:
        """Print a sentence, above the live line."""
        if self._progress is not None:
            self._progress.say(text)

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Show the records of finished steps; adds their epoch to them."""
        if self._progress is None:
            return
        for record in records:
            record["epoch"] = record["step"] / self._steps_per_epoch
            for tracker in self._trackers.values():
                tracker.step(record)
        for tracker in self._trackers.values():
            tracker.flush()
        self._progress.update(records)

    def metrics(self, part: str, metrics: dict[str, Any], step: int) -> None:
        """Give numbers by name to the trackers; see :meth:`Tracker.metrics`."""
        for tracker in self._trackers.values():
            tracker.metrics(part, metrics, step)

    def evaluation(
        self, part: str, metrics: dict[str, Any], step: int, headlines: Collection[str] | None = None
    ) -> None:
        """Show the metrics of an evaluation on ``part`` (validation, test) after ``step`` steps, on screen too.

        ``headlines``: names of those that the line on screen has; None: all.
        """
        self.metrics(part, metrics, step)
        shown = ", ".join(
            f"{name} undefined" if value is None else f"{name} {value:.4g}"
            for name, value in metrics.items()
            if (value is None or isinstance(value, float)) and (headlines is None or name in headlines)
        )
        self.say(f"{part} after step {step}: {shown}")

    def picture(self, name: str, panels: Sequence[Panel], step: int) -> None:
        """Give a picture to the trackers; see :meth:`Tracker.picture`."""
        for tracker in self._trackers.values():
            tracker.picture(name, panels, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Give a text to the trackers; see :meth:`Tracker.text`."""
        for tracker in self._trackers.values():
            tracker.text(name, text, step)

    def hyperparameters(self, values: Mapping[str, bool | float | str]) -> None:
        """Give fields of the configuration to the trackers; see :meth:`Tracker.hyperparameters`."""
        for tracker in self._trackers.values():
            tracker.hyperparameters(values)

    def follow(self, run: RunDirectory | None) -> None:
        """Write to where the run directory is now; None: there is none any more, and nothing is written."""
        for tracker in self._trackers.values():
            if run is not None:
                tracker.follow(run.root)
        if run is None:
            self._trackers = {}

    def close(self) -> None:
        """Write for the last time."""
        for tracker in self._trackers.values():
            tracker.close()
        if self._progress is not None:
            self._progress.close()


class ProgressLine:
    """Step, time left, and the numbers of :func:`progress_fields`, on stderr; on a terminal as many as it is wide."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total = total_steps
        self._first = first_step
        self._started = time.monotonic()
        self._last_line = -SECONDS_BETWEEN_LINES
        self._latest: dict[str, Any] = {}
        self._bar = None
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, bar_format=_LIVE, dynamic_ncols=True)

    def update(self, records: list[dict[str, Any]]) -> None:
        """Show the newest of each number."""
        for record in records:
            self._latest |= record  # some numbers, such as memory, are not in every record
        step, fields = self._latest["step"], progress_fields(self._latest)
        if self._bar is not None:
            with _LOST_TERMINAL:
                self._bar.set_postfix_str(fitted(fields, self._width() - _LIVE_WIDTH), refresh=False)
                self._bar.update(step - self._bar.n)
        elif step == self._total or time.monotonic() > self._last_line + SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            per_step = (time.monotonic() - self._started) / (step - self._first)
            minutes, seconds = divmod(round(per_step * (self._total - step)), 60)
            say(f"step {step}/{self._total}: {', '.join(fields)}, {minutes}:{seconds:02d} left")

    def _width(self) -> int:
        """Return the columns of the terminal, but for what the count of steps takes."""
        return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 2 * len(str(self._total))

    def say(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self._bar is not None:
            with _LOST_TERMINAL:
                self._bar.write(text, file=sys.stderr)
        else:
            say(text)

    def close(self) -> None:
        """Leave the live line as it is."""
        if self._bar is not None:
            with _LOST_TERMINAL:
                self._bar.close()


def progress_fields(record: Mapping[str, Any]) -> list[str]:
    """Return numbers of a record with their units, the most important first; those that it has."""
    speed = record.get("tokens_per_second", record["examples_per_second"])
    has_tokens = speed != record["examples_per_second"]  # a pair of user and item is a token, too
    shown = {
        "loss": "loss {:.4f}",
        "lr": "lr {:.2g}",
        "grad_norm": "grad {:.3g}",
        "peak_memory_gib": "{:.1f} GiB",
        "active_experts": "{:.2f} experts/token",
    }
    fields = [text.format(record[name]) for name, text in shown.items() if name in record]
    fields.insert(1, f"{_count(speed).strip()} {'tokens' if has_tokens else 'examples'}/s")
    return [*fields, f"{_count(record['wire_bytes'])}B exchanged"]


def fitted(fields: Sequence[str], width: int) -> str:
    """Return as many of ``fields`` as ``width`` columns have room for, one at least; the last ones go first."""
    fields = list(fields)
    while len(fields) > 1 and len(", ".join(fields)) > width:
        fields.pop()
    return ", ".join(fields)


def _count(number: float) -> str:
    """Return a number in short, for example '1.2 M'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "

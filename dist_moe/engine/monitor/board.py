"""Curves by tag, and pictures of evaluations and of the load: the content of any board, whoever keeps it.

How many curves there are does not depend on the number of layers, experts or ranks; what does is shown as pictures.
Pictures are drawn after a hundred steps, whenever the run is half as long again as at the last ones, and at its end, so
that they cost next to nothing however long it lasts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_moe.engine.monitor.board_tags import split_metrics, tag_of
from dist_moe.engine.monitor.load import effective_experts
from dist_moe.engine.monitor.load_history import LoadHistory, over_time, step_names
from dist_moe.engine.monitor.pictures import Bars, HeatMap, NamedBars, Panel, has_grown
from dist_moe.engine.monitor.trackers import Tracker

STEPS = "steps"
"""The kind of the numbers of steps, beside the parts that are evaluated."""

_PANELS = 4
"""Layers that have a panel of their own, at most."""
_PLACES = 180
"""Places on an axis of time, at most."""


class Board(Tracker):
    """Turns records into curves and pictures. ``history``: of the load of the steps up to ``first_step``, if known."""

    def __init__(self, first_step: int, history: LoadHistory) -> None:
        self._history = history
        self._load: Sequence[Sequence[float]] = ()
        self._waiting: list[Sequence[Sequence[float]]] = []
        self._step = self._first_step = first_step
        self._drawn_at = {"load": first_step}
        self._undrawn: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {}

    @abstractmethod
    def curves(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Take a point of each curve, by its tag. ``kind``: STEPS, or the part that was evaluated."""

    def keep_load(self, column_LE: NDArray[np.float16], step: int) -> None:
        """Take a column of the load's history, of the steps up to ``step``: whoever can, keeps it for a restart."""

    def step(self, record: dict[str, Any]) -> None:
        """Add a step's numbers, and its load to what the next pictures show."""
        self._step = record["step"]
        values = {tag_of(name): x for name, x in record.items() if isinstance(x, float) and name != "epoch"}
        self.curves(STEPS, values, self._step)
        if len(load := record.get("load", ())):
            self._load = load
            self._waiting.append(load)

    def metrics(self, part: str, metrics: dict[str, Any], step: int) -> None:
        """Add the numbers of an evaluation: as curves named after ``part``, or as pictures, see ``split_metrics``."""
        numbers, pictures = split_metrics(metrics)
        self.curves(part, {f"{part}/{name}": value for name, value in numbers.items()}, step)
        self._undrawn[part] = step, pictures
        if self._is_due(part, step):
            self._draw_metrics(part)

    def flush(self) -> None:
        """Draw the pictures that are due, and write what has been taken in so far."""
        if self._waiting:
            load_WLE = _filled(self._waiting)
            if self._history.is_empty and self._first_step:
                self._history.put(self._first_step, (load_WLE[0] * 0).astype(np.float16))  # of which nothing is known
            self._history.add(self._step, load_WLE)
            self._waiting = []
        column_LE = self._history.end_column()
        if column_LE is not None:
            self.keep_load(column_LE, self._step)
        if self._load and self._is_due("load", self._step):
            self._draw_load()
        super().flush()

    def close(self) -> None:
        """Draw and write for the last time."""
        self.flush()
        if self._load and self._drawn_at["load"] < self._step:
            self._draw_load()
        for part in list(self._undrawn):
            self._draw_metrics(part)
        super().close()

    def _is_due(self, what: str, step: int) -> bool:
        """Return whether ``what`` is to be drawn now; if so, it counts as drawn."""
        is_due = what not in self._drawn_at or has_grown(step, self._drawn_at[what])
        if is_due:
            self._drawn_at[what] = step
        return is_due

    def _draw_metrics(self, part: str) -> None:
        """Draw the pictures of the last evaluation of ``part``."""
        step, pictures = self._undrawn.pop(part)
        for name, content in pictures.items():
            if panels := _panels_of(name, content):
                self.picture(f"{part}/{name}", panels, step)

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
            title, count = f"MoE layer {layer}" if len(experts_L) > 1 else "the layer's experts", experts_L[layer]
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
            by_layer = HeatMap(everything_LE, title, "MoE layer", "expert", "times the mean load", nothing="no row")
            self.picture("experts/load_by_layer", [by_layer], self._step)
            share_LC = over_time(last_steps, effective_CL / experts_L, _PLACES)
            title, unit = "effective experts", "share of the layer's experts"
            over = HeatMap(share_LC, title, "MoE layer", "step", unit, column_names=names, limits=(0.0, 1.0))
            self.picture("experts/effective_over_time", [over], self._step)


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

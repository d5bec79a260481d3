"""The files of a run directory, read without its model: records, metrics, environment, stages."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_moe.config.files import parse_json, read_json
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.errors import UserError

POINTS = 300
"""The most points of a curve; longer ones are means of as many pieces."""


@dataclass(frozen=True)
class Curve:
    """A number by step: ``step_N``, ``value_N``."""

    step_N: NDArray[np.float64]
    value_N: NDArray[np.float64]

    def is_same(self, other: Curve) -> bool:
        """Return whether ``other`` has the same points."""
        return np.array_equal(self.step_N, other.step_N) and np.array_equal(self.value_N, other.value_N)

    def thinned(self) -> Curve:
        """Return at most :data:`POINTS` points, each the mean of those that it stands for."""
        if len(self.step_N) <= POINTS:
            return self
        pieces = [np.array_split(values, POINTS) for values in (self.step_N, self.value_N)]
        return Curve(*(np.array([piece.mean() for piece in of]) for of in pieces))


@dataclass(frozen=True)
class RunRecord:
    """Numbers and texts of a run, or of a stage of one.

    ``curves``: numbers of steps by their names in ``metrics.jsonl``. ``validations``: those of validations.
    ``load_step_N``, ``load_NLE``: assignments per MoE layer and expert at these steps, as shares of their layer's.
    ``summary``, ``result``, ``environment``: contents of these files; empty where there is none. ``config``: its text.
    """

    name: str
    root: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    validations: dict[str, Curve] = field(default_factory=dict)
    load_step_N: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    load_NLE: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0, 0)))
    summary: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    stages: tuple[RunRecord, ...] = ()


def read_run(root: Path, name: str | None = None) -> RunRecord:
    """Read a run directory and those of its stages. Raises UserError if there is none, or if it cannot be read."""
    run = RunDirectory(root)
    run.check_exists()
    try:
        return _read(run, name or root.resolve().name)
    except (OSError, ValueError) as error:
        raise UserError(f"{root} cannot be read: {error}") from error


def _read(run: RunDirectory, name: str) -> RunRecord:
    columns, validations = defaultdict[str, list[tuple[int, float]]](list), defaultdict[str, Any](list)
    loads: list[tuple[int, list[list[float]]]] = []
    if run.metrics.is_file():
        with run.metrics.open(encoding="utf-8") as lines:
            for line in lines:
                _take(parse_json(line), columns, validations, loads)
    config_paths = sorted(run.stages.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    step_N, load_NLE = _load(loads)
    return RunRecord(
        name,
        run.root,
        {key: _curve(points) for key, points in columns.items()},
        {key: _curve(points) for key, points in validations.items()},
        step_N,
        load_NLE,
        summary=_content(run.summary),
        result=_content(run.result),
        environment=_content(run.environment),
        config=run.config.read_text(encoding="utf-8"),
        stages=tuple(_read(RunDirectory(path.parent), f"{name}: {path.parent.name}") for path in config_paths),
    )


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path) if path.is_file() else {}
    return content


def _take(record: Any, columns: Any, validations: Any, loads: list[tuple[int, list[list[float]]]]) -> None:
    step = record["step"]
    for key, value in record.items():
        if key == "load" and value:
            loads.append((step, value))
        elif key == "validation":
            for metric, number in value.items():
                if isinstance(number, (int, float)):
                    validations[metric].append((step, number))
        elif key not in ("step", "epoch") and isinstance(value, (int, float)):
            columns[key].append((step, value))


def _curve(points: list[tuple[int, float]]) -> Curve:
    step_N, value_N = np.array(points, dtype=np.float64).T
    return Curve(step_N, value_N)


def _load(loads: list[tuple[int, list[list[float]]]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps and shares of at most :data:`POINTS` pieces; layers with fewer experts end in NaN."""
    if not loads:
        return np.zeros(0), np.zeros((0, 0, 0))
    layers, width = len(loads[0][1]), max(len(load_E) for load_E in loads[0][1])
    pieces = np.array_split(np.arange(len(loads)), min(len(loads), POINTS))
    load_NLE = np.full((len(pieces), layers, width), np.nan)
    for place, piece in enumerate(pieces):
        for layer in range(layers):
            load_E = np.sum([loads[i][1][layer] for i in piece], axis=0)
            load_NLE[place, layer, : len(load_E)] = load_E / max(load_E.sum(), 1.0)
    return np.array([loads[piece[-1]][0] for piece in pieces], dtype=np.float64), load_NLE

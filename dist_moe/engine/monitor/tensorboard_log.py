"""TensorBoard: scalars of every step, load per expert as histogram and as an image over time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import summary

from dist_moe.engine.monitor.event_file import EventFile

if TYPE_CHECKING:
    from dist_moe.engine.loop import StepRecord

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


class TensorBoardLog:
    """Writes an event file into ``directory``; steps after ``first_step`` that an earlier attempt wrote are purged.

    ``say``: where a disk that fails is reported.
    """

    def __init__(self, directory: Path, first_step: int, say: Callable[[str], None]) -> None:
        self._events = EventFile(directory, first_step + 1, say)
        self._load_columns: list[list[NDArray[np.float64]]] = []

    def close(self) -> None:
        self._events.close()

    def flush(self) -> None:
        self._events.flush()

    @property
    def lost(self) -> int:
        """Events that could not be written."""
        return self._events.lost

    def step(self, record: StepRecord) -> None:
        """``record["load"]``: (L, E) rows per layer and expert; of a dense model there are no layers."""
        step, load_LE = record["step"], np.asarray(record["load"])
        scalars = {
            _TAGS.get(name, f"loss/{name}"): value
            for name, value in record.items()
            if isinstance(value, float) and name != "epoch"
        }
        if len(load_LE):
            scalars["experts/load_max_over_mean"] = max(map(_max_over_mean, load_LE))
        self._scalars(scalars, step)
        if not self._load_columns:
            self._load_columns = [[] for _ in load_LE]
        for layer, (load_E, columns) in enumerate(zip(load_LE, self._load_columns, strict=True)):
            self._load(load_E, columns, f"/layer_{layer}" if len(load_LE) > 1 else "", step)

    def evaluation(self, part: str, figures: dict[str, Any], step: int) -> None:
        self._scalars({f"{part}/{n}": value for n, value in figures.items() if isinstance(value, (int, float))}, step)
        self.flush()

    def matrix(self, tag: str, matrix: Tensor, step: int) -> None:
        """An image of a matrix with entries in 0..1: 0 is white, 1 is black."""
        enlarged = torch.kron(1 - matrix.float().cpu(), torch.ones(PIXELS_PER_CELL, PIXELS_PER_CELL))
        self._events.add(summary.image(tag, enlarged, dataformats="HW"), step)

    def _scalars(self, values: dict[str, float], step: int) -> None:
        """All of a step in one event: an event each would cost as much each."""
        every = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._events.add(Summary(value=every), step)

    def _load(self, load_E: NDArray[np.float64], columns: list[NDArray[np.float64]], suffix: str, step: int) -> None:
        total = load_E.sum()
        columns.append(load_E / total if total else load_E)
        if step % IMAGE_EVERY == 0:
            experts = np.repeat(np.arange(len(load_E)), load_E.astype(int))
            self._events.add(summary.histogram(f"experts/load{suffix}", experts, bins=len(load_E)), step)
            image = _load_image(columns)
            self._events.add(summary.image(f"experts/load_over_time{suffix}", image, dataformats="HW"), step)


def _load_image(columns: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Experts down, time to the right; white is no load, black the heaviest share so far."""
    pieces = np.array_split(np.stack(columns), min(len(columns), MAX_COLUMNS))
    image = np.stack([piece.mean(axis=0) for piece in pieces], axis=1)
    image = 1 - image / max(image.max(), np.finfo(float).tiny)
    return np.kron(image, np.ones((PIXELS_PER_CELL, 2)))


def _max_over_mean(rows_per_expert: NDArray[np.float64]) -> float:
    mean = rows_per_expert.mean()
    return float(rows_per_expert.max() / mean) if mean else 0.0

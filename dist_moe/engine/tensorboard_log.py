"""TensorBoard: scalars of every step, load per expert as histogram and as an image over time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

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


def _wait_for_a_later_name(directory: Path) -> None:
    """Event files are read in the order of their names, which begin with the second in which they were made."""
    seconds = [int(path.name.split(".")[3]) for path in directory.glob("events.out.tfevents.*")]
    if seconds and max(seconds) == int(time.time()):
        time.sleep(1.0)


class TensorBoardLog:
    """Writes event files into ``directory``; steps after ``first_step`` that an earlier attempt wrote are purged."""

    def __init__(self, directory: Path, first_step: int) -> None:
        _wait_for_a_later_name(directory)
        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)
        self._load_columns: list[NDArray[np.float64]] = []

    def close(self) -> None:
        self._writer.close()

    def step(self, record: StepRecord) -> None:
        step = record["step"]
        scalars = {
            _TAGS.get(name, f"loss/{name}"): value
            for name, value in record.items()
            if isinstance(value, float) and name != "epoch"
        }
        self._scalars(scalars | {"experts/load_max_over_mean": _max_over_mean(np.asarray(record["load"]))}, step)
        self._load(np.asarray(record["load"]), step)

    def evaluation(self, part: str, figures: dict[str, Any], step: int) -> None:
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{part}/{name}", value, step)

    def matrix(self, tag: str, matrix: Tensor, step: int) -> None:
        """An image of a matrix with entries in 0..1: 0 is white, 1 is black."""
        enlarged = torch.kron(1 - matrix.float().cpu(), torch.ones(PIXELS_PER_CELL, PIXELS_PER_CELL))
        self._writer.add_image(tag, enlarged, step, dataformats="HW")

    def _scalars(self, scalars: dict[str, float], step: int) -> None:
        """All of a step as one event: an event for each costs several times as much."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer._get_file_writer().add_summary(Summary(value=values), step)

    def _load(self, rows_per_expert: NDArray[np.float64], step: int) -> None:
        total = rows_per_expert.sum()
        self._load_columns.append(rows_per_expert / total if total else rows_per_expert)
        if step % IMAGE_EVERY == 0:
            experts = np.repeat(np.arange(len(rows_per_expert)), rows_per_expert.astype(int))
            self._writer.add_histogram("experts/load", experts, step, bins=len(rows_per_expert))
            self._writer.add_image("experts/load_over_time", self._load_image(), step, dataformats="HW")

    def _load_image(self) -> NDArray[np.float64]:
        """Experts down, time to the right; white is no load, black the heaviest share so far."""
        columns = np.stack(self._load_columns)
        pieces = np.array_split(columns, min(len(columns), MAX_COLUMNS))
        image = np.stack([piece.mean(axis=0) for piece in pieces], axis=1)
        image = 1 - image / max(image.max(), np.finfo(float).tiny)
        return np.kron(image, np.ones((PIXELS_PER_CELL, 2)))


def _max_over_mean(rows_per_expert: NDArray[np.float64]) -> float:
    mean = rows_per_expert.mean()
    return float(rows_per_expert.max() / mean) if mean else 0.0

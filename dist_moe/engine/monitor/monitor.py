"""What a run shows: metrics.jsonl, TensorBoard and the progress line. On rank 0 only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dist_moe.engine.monitor.progress import ProgressLine
from dist_moe.engine.monitor.record_file import RecordFile
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.tensorboard_log import TensorBoardLog

if TYPE_CHECKING:
    from torch import Tensor

    from dist_moe.engine.loop import StepRecord
    from dist_moe.search import SwapReport


@dataclass(frozen=True)
class Schedule:
    """``batch_size``: examples per step. ``steps_per_epoch``, ``total_steps``: of the whole run."""

    batch_size: int
    steps_per_epoch: int
    total_steps: int


class Monitor:
    """Takes the records of finished steps and shows them; use as a context manager.

    A disk that is full does not end it: see :class:`RecordFile`.
    """

    def __init__(self, run: RunDirectory, schedule: Schedule, first_step: int) -> None:
        run.forget_metrics_after(first_step)
        self._schedule = schedule
        self._reported = first_step
        self._validations: list[dict[str, Any]] = []
        self._progress = ProgressLine(schedule.total_steps, first_step)
        self._metrics = RecordFile(run.metrics, self.say)
        self._board = TensorBoardLog(run.tensorboard, first_step, self.say)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._board.close()
        self._progress.close()

    @property
    def lost_records(self) -> dict[str, int]:
        """How many could not be written, by file; final after the end."""
        return {"metrics.jsonl": self._metrics.lost, "tensorboard": self._board.lost}

    def report(self, records: list[StepRecord]) -> None:
        """Show finished steps. ``load`` in a record: (L, E) rows per layer and expert; the rest are numbers."""
        for record in records:
            record["epoch"] = record["step"] / self._schedule.steps_per_epoch
            record["examples_per_second"] = self._schedule.batch_size / record.pop("seconds")
            self._write(record)
            self._board.step(record)
            self._reported = record["step"]
            self._write_validations()
        self._metrics.flush()
        self._board.flush()
        self._progress.update(records)

    def evaluation(self, part: str, figures: dict[str, Any], step: int) -> None:
        """Show the figures of an evaluation on ``part`` (validation, test) after ``step`` steps.

        A validation's follow the record of their step in metrics.jsonl, as {"step": .., "validation": {..}}.
        """
        if part == "validation":
            self._validations.append({"step": step, "validation": figures})
            self._write_validations()
        self._board.evaluation(part, figures, step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float))
        self._progress.say(f"{part} after step {step}: {shown}")

    def permutation(self, matrix_PKEE: Tensor, step: int, layer: str | None = None) -> None:
        """Show the permutations, soft or hard, as images: one for each of P gates and K branches.

        ``layer``: its name, where there are several.
        """
        tag = "permutation/slot_to_expert" + (f"/{layer}" if layer else "")
        several = matrix_PKEE.shape[:2].numel() > 1
        for gate, of_gate in enumerate(matrix_PKEE):
            for branch, matrix in enumerate(of_gate):
                suffix = f"/gate_{gate}_branch_{branch}" if several else ""
                self._board.matrix(f"{tag}{suffix}", matrix, step)

    def swap_search(self, found: SwapReport, step: int) -> None:
        """Show what a swap search after ``step`` steps found."""
        before, after = found.losses[0], found.losses[-1]
        figures = {"loss_before": before, "loss_after": after, "swaps": len(found.swaps), "verified": found.verified}
        self._board.evaluation("swap_search", figures, step)
        self._progress.say(
            f"swap search after step {step}: loss {before:.4g} -> {after:.4g} by {len(found.swaps)} swap(s), "
            f"{found.screened} screened, {found.verified} verified"
        )

    def placement(self, figures: dict[str, float], sentence: str, step: int, layer: str | None = None) -> None:
        """Show a look at the placement of the experts after ``step`` steps; a sentence only if they moved.

        ``layer``: its name, where there are several.
        """
        self._board.evaluation(f"placement/{layer}" if layer else "placement", figures, step)
        if figures["moved_experts"]:
            self._progress.say(f"{layer}: {sentence}" if layer else sentence)

    def say(self, text: str) -> None:
        self._progress.say(text)

    def _write(self, record: dict[str, Any]) -> None:
        self._metrics.add(f"{json.dumps(record)}\n".encode())

    def _write_validations(self) -> None:
        """Those of steps that are reported: a validation comes before the records of its window of steps do."""
        while self._validations and self._validations[0]["step"] <= self._reported:
            self._write(self._validations.pop(0))

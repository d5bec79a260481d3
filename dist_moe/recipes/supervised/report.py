"""What a person sees of a run: its opening line, validations on the way, the table at the end."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.loop import StepRecord
from dist_moe.engine.monitor.monitor import Monitor
from dist_moe.models import MoEModel
from dist_moe.recipes.supervised.plan import TrainingPlan
from dist_moe.search import SwapReport
from dist_moe.search.placement_policy import PlacementLook

PERMUTATION_IMAGE_EVERY = 50
_HIDDEN = ("loss_by_batches",)
_MOST_COLUMNS = 10


class Reporter:
    """Speaks on rank 0 and is silent on the others; use as a context manager."""

    def __init__(self, plan: TrainingPlan, engine: ExpertParallelEngine, first_step: int) -> None:
        self._monitor = Monitor(plan.run, plan.schedule, first_step) if plan.environment.is_first else None
        self._model: MoEModel = engine.module
        if self._monitor is not None:
            for line in (*plan.warnings, _opening_line(plan, engine, first_step)):
                self._monitor.say(line)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._monitor is not None:
            self._monitor.__exit__(kind, error, trace)

    @property
    def lost_records(self) -> dict[str, int]:
        """How many could not be written, by file; final after the end. Nothing but on rank 0."""
        return {} if self._monitor is None else self._monitor.lost_records

    def say(self, text: str) -> None:
        if self._monitor is not None:
            self._monitor.say(text)

    def steps(self, records: list[StepRecord]) -> None:
        if self._monitor is None:
            return
        self._monitor.report(records)
        before, after = records[0]["step"] - 1, records[-1]["step"]
        if after // PERMUTATION_IMAGE_EVERY > before // PERMUTATION_IMAGE_EVERY:
            tables = self._model.tables
            for layer, table in tables.items():
                self._monitor.permutation(table.current_matrix(), after, layer if len(tables) > 1 else None)

    def swaps(self, found: SwapReport, step: int) -> None:
        if self._monitor is not None:
            self._monitor.swap_search(found, step)

    def placement(self, look: PlacementLook, step: int, layer: str | None) -> None:
        if self._monitor is not None:
            self._monitor.placement(look.figures(), look.sentence(step), step, layer)

    def evaluation(self, part: str, figures: dict[str, Any], step: int) -> None:
        if self._monitor is not None:
            self._monitor.evaluation(part, figures, step)


def figures_table(test: dict[str, Any], others: dict[str, dict[str, Any]]) -> str:
    """Test figures of the model beside others by name, as aligned text; a line for each figure where they are many."""
    columns = [name for name, value in test.items() if isinstance(value, (int, float)) and name not in _HIDDEN]
    rows = {"this model": test} | others
    cells = [["", *(column.replace("_", " ") for column in columns)]]
    cells += [[name, *(_cell(figures.get(column)) for column in columns)] for name, figures in rows.items()]
    if len(columns) > _MOST_COLUMNS:
        cells = [list(row) for row in zip(*cells, strict=True)]
    names, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    return "\n".join(
        f"{name:{names}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(figures, widths, strict=True))
        for name, *figures in cells
    )


def predictor_rows(baselines: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Baselines under the names that a table shows."""
    return {f"{name} predictor": figures for name, figures in baselines.items()}


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _opening_line(plan: TrainingPlan, engine: ExpertParallelEngine, first_step: int) -> str:
    config, schedule = plan.config, plan.schedule
    layers, world_size = len(engine.module.moe_layers), plan.environment.world_size
    parameters = engine.num_parameters
    start = f"from step {first_step} " if first_step else ""
    several = f" in each of {layers} layers" if layers > 1 else ""
    experts = f"{config.gate_label}, {config.model.num_experts} experts{several}"
    spread = f"{experts} over {config.parallel.expert_parallel_size} of {world_size} rank(s)"
    tokens = plan.task.tokens_per_example
    return (
        f"{spread if layers else f'dense, {world_size} rank(s)'}, ZeRO stage {engine.zero_optimization_stage()}, "
        f"{parameters:,} parameters on this rank, {torch.get_num_threads()} thread(s) each, "
        f"{schedule.total_steps} step(s) {start}of {schedule.batch_size} examples"
        f"{f' of {tokens} tokens' if tokens > 1 else ''} -> {plan.run.root}"
    )

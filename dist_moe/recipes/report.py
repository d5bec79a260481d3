"""What a person sees of a run: its opening line, validations on the way, the table at the end."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from dist_moe.engine.expert_parallel_engine import ExpertParallelEngine
from dist_moe.engine.loop import StepRecord
from dist_moe.engine.monitor import Monitor
from dist_moe.models import Recommender
from dist_moe.recipes.plan import TrainingPlan

PERMUTATION_IMAGE_EVERY = 50
_COLUMNS = ("auc", "bce", "mse", "loss", "active_experts", "dead_experts")


class Reporter:
    """Speaks on rank 0 and is silent on the others; use as a context manager."""

    def __init__(self, plan: TrainingPlan, engine: ExpertParallelEngine, first_step: int) -> None:
        self._monitor = Monitor(plan.run, plan.schedule, first_step) if plan.environment.is_first else None
        self._model: Recommender = engine.module
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

    def say(self, text: str) -> None:
        if self._monitor is not None:
            self._monitor.say(text)

    def steps(self, records: list[StepRecord]) -> None:
        if self._monitor is None:
            return
        self._monitor.report(records)
        before, after = records[0]["step"] - 1, records[-1]["step"]
        permutation = self._model.permutation
        if permutation is not None and after // PERMUTATION_IMAGE_EVERY > before // PERMUTATION_IMAGE_EVERY:
            self._monitor.permutation(permutation.current_matrix(), after)

    def evaluation(self, part: str, figures: dict[str, Any], step: int) -> None:
        if self._monitor is not None:
            self._monitor.evaluation(part, figures, step)


def figures_table(test: dict[str, Any], baselines: dict[str, dict[str, float]]) -> str:
    """Test figures of the model beside those of the simple predictors, as aligned text."""
    rows = {"this model": test} | {f"{name} predictor": figures for name, figures in baselines.items()}
    lines = [f"{'':22}" + "".join(f"{column.replace('_', ' '):>16}" for column in _COLUMNS)]
    for name, figures in rows.items():
        cells = (_cell(figures.get(column)) for column in _COLUMNS)
        lines.append(f"{name:22}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _opening_line(plan: TrainingPlan, engine: ExpertParallelEngine, first_step: int) -> str:
    config, schedule = plan.config, plan.schedule
    plus = "+" if config.model.permutation else ""
    size = config.parallel.expert_parallel_size
    parameters = sum(p.numel() for p in engine.module.parameters())
    start = f"from step {first_step} " if first_step else ""
    return (
        f"{config.model.gate.name}{plus}, {config.model.num_experts} experts over {size} of "
        f"{plan.environment.world_size} rank(s), ZeRO stage {engine.zero_optimization_stage()}, "
        f"{parameters:,} parameters on this rank, {torch.get_num_threads()} thread(s) each, "
        f"{schedule.total_steps} steps {start}of {schedule.batch_size} pairs -> {plan.run.root}"
    )

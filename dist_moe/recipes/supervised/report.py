"""Sentences and tables about a run for a person: its opening line, and the metrics at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dist_moe.engine.training import Trainer
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.tasks import Task

_HIDDEN = ("loss_by_batches",)
_MOST_COLUMNS = 10


def metrics_table(test: dict[str, Any], others: dict[str, dict[str, Any]]) -> str:
    """Return test metrics of the model beside others by name, as aligned text; a line per metric if many.

    What has no value is a dash, and lines below say why.
    """
    undefined = test.get("undefined", {})
    columns = [
        name
        for name, value in test.items()
        if (isinstance(value, (int, float)) or name in undefined) and name not in _HIDDEN
    ]
    rows = {"this model": test} | others
    cells = [["", *(column.replace("_", " ") for column in columns)]]
    cells += [[name, *(_cell(metrics.get(column)) for column in columns)] for name, metrics in rows.items()]
    if len(columns) > _MOST_COLUMNS:
        cells = [list(row) for row in zip(*cells, strict=True)]
    names, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [
        f"{name:{names}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(metrics, widths, strict=True))
        for name, *metrics in cells
    ]
    return "\n".join([*lines, *(f"{name} is undefined: {reason}" for name, reason in undefined.items())])


def layers_table(test: dict[str, Any]) -> str:
    """Return effective and dead experts of each layer as aligned text; empty for a model of one layer or none."""
    effective, dead = test["effective_experts_by_layer"], test["dead_experts_by_layer"]
    if len(effective) < 2:
        return ""
    width = max(map(len, effective))
    rows = [f"{name:{width}}  {n:>17.2f}  {dead[name]:>12}" for name, n in effective.items()]
    return "\n".join([f"{'':{width}}  effective experts  dead experts", *rows])


def predictor_rows(baselines: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return baselines under the names that a table shows."""
    return {f"{name} predictor": metrics for name, metrics in baselines.items()}


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def opening_line(config: SupervisedConfig, task: Task, trainer: Trainer, root: Path) -> str:
    """Return the sentence with which training begins: gate, experts, layout, size, length."""
    engine, world_size = trainer.engine, trainer.groups.environment.world_size
    layers, tokens = len(trainer.model.moe_layers), task.tokens_per_example
    start = f"from step {trainer.step} " if trainer.step else ""
    counts = {layer.experts.num_experts: None for layer in trainer.model.moe_layers.values()}
    several = f" in {'each of ' if len(counts) == 1 else ''}{layers} layers" if layers > 1 else ""
    experts = f"{config.gate_label}, {' and '.join(map(str, counts))} experts{several}"
    spread = f"{experts} over {config.parallel.expert_parallel_size} of {world_size} rank(s)"
    return (
        f"{spread if layers else f'dense, {world_size} rank(s)'}, ZeRO stage {engine.zero_optimization_stage()}, "
        f"{engine.num_parameters:,} parameters on this rank, {torch.get_num_threads()} thread(s) each, "
        f"{trainer.total_steps} step(s) {start}of {config.train.batch_size} examples"
        f"{f' of {tokens} tokens' if tokens > 1 else ''} -> {root}"
    )

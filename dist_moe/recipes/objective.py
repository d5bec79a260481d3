"""The loss of a step, shared out over ranks and micro-batches so that the layout cannot change it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.engine.loop import StepLoss
from dist_moe.models import ModelOutput
from dist_moe.recipes.problem import Problem


class WeightedObjective:
    """The weighted sum of the tasks' losses + the auxiliary losses.

    ``shares``: ranks times micro-batches per step. Every sum is divided by its size in the whole
    step, and multiplied by ``shares`` because the engine averages over exactly these.
    """

    def __init__(self, problem: Problem, weights: tuple[float, float], shares: int) -> None:
        self._problem = problem
        self._weights = weights
        self._shares = shares

    def __call__(self, model: nn.Module, batch: Any) -> StepLoss:
        output: ModelOutput = model(*batch.inputs)
        by_task = self._problem.task_losses(output, batch)
        task = self._problem.weighted(by_task, self._weights)
        share = len(batch) / batch.examples_in_step
        aux = {name: loss * share for name, loss in output.moe.aux.items()}
        total = torch.stack([task, *aux.values()]).sum()
        losses: dict[str, Tensor] = {"loss": task, "total_loss": total} | by_task | aux
        return StepLoss(total * self._shares, losses | _expert_counts(output, batch.examples_in_step))


def _expert_counts(output: ModelOutput, examples_in_step: int) -> dict[str, Any]:
    """``active_experts``: assignments per token and gate. ``load``: (E,) rows per expert."""
    moe = output.moe
    assignments = sum(route.num_assignments for route in moe.routes)
    load_E = moe.pairs.rows_per_expert_E
    return {
        "active_experts": load_E.new_tensor(assignments / (len(moe.routes) * examples_in_step), dtype=torch.double),
        "rows_computed": load_E.new_tensor(moe.rows_computed),
        "load": load_E,
    }

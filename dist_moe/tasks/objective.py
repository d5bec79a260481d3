"""The loss of a step, shared out over ranks and micro-batches so that the layout cannot change it; its precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dist_moe.engine.monitor.step_window import Sums
from dist_moe.engine.training import StepLoss
from dist_moe.models import ModelOutput
from dist_moe.tasks.task import Task


def at_least_fp32(x: Tensor) -> Tensor:
    """Return ``x`` in the precision in which losses are computed: its own, or fp32 if that is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def weighted_sum(losses: dict[str, Tensor], weights: tuple[float, ...]) -> Tensor:
    """Return the weighted sum of the targets' losses, given in the order of the weights."""
    return torch.stack([w * loss for w, loss in zip(weights, losses.values(), strict=True)]).sum()


class WeightedObjective:
    """The weighted sum of the targets' losses + the auxiliary losses.

    ``shares``: ranks times micro-batches per step. Every sum is divided by its size in the whole
    step, and multiplied by ``shares`` because the engine averages over exactly these. ``auxiliary``: whether the gates'
    auxiliary losses count; without, they are not recorded either.
    """

    def __init__(self, task: Task, weights: tuple[float, ...], shares: int, *, auxiliary: bool = True) -> None:
        self._task = task
        self._auxiliary = auxiliary
        self._weights = weights
        self.shares = shares

    def __call__(self, model: nn.Module, batch: Any) -> StepLoss:
        return self.of_output(model(*batch.inputs), batch)

    def of_output(self, output: ModelOutput, batch: Any) -> StepLoss:
        """Return the loss of what the model gave for ``batch``."""
        losses = self.losses(output, batch)
        sums: Sums = {**losses, **_expert_counts(output, batch.tokens_in_step)}
        return StepLoss(losses["total_loss"] * self.shares, sums)

    def losses(self, output: ModelOutput, batch: Any) -> dict[str, Tensor]:
        """Return the summands of the step that ``batch`` adds: ``loss``, weighted; ``total_loss``, with the auxiliary
        ones; then each target's loss and each auxiliary one by name."""
        by_target = self._task.task_losses(output, batch)
        weighted = weighted_sum(by_target, self._weights)
        # An auxiliary loss is a mean over this rank's tokens: it counts with their share of the step's.
        counted = output.aux if self._auxiliary else {}
        aux = {name: loss * (len(output.layers[0].outputs[0]) / batch.tokens_in_step) for name, loss in counted.items()}
        total = torch.stack([weighted, *aux.values()]).sum()
        return {"loss": weighted, "total_loss": total} | by_target | aux


def _expert_counts(output: ModelOutput, tokens_in_step: int) -> Sums:
    """Return ``active_experts``, assignments per token averaged over gates and layers, ``rows_computed``, and
    ``load``, (L, E) rows, 0 for experts that a layer lacks; 0, 0 and (0, 0) for a dense model."""
    layers = output.layers
    if not layers:
        load_LE = torch.zeros(0, 0, dtype=torch.int64, device=output.predictions[0].device)
        return {"active_experts": 0.0, "rows_computed": 0.0, "load": load_LE}
    routes = [route for layer in layers for route in layer.routes]
    assignments = sum(route.num_assignments for route in routes)
    return {
        "active_experts": assignments / (len(routes) * tokens_in_step),
        "rows_computed": float(sum(layer.rows_computed for layer in layers)),
        "load": pad_sequence([layer.pairs.rows_per_expert_E for layer in layers], batch_first=True),
    }

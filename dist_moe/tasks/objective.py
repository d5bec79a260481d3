"""The loss of a step, shared out over ranks and micro-batches so that the layout cannot change it; its precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dist_moe.engine.monitor.load import HISTOGRAM
from dist_moe.engine.monitor.step_window import Sums
from dist_moe.engine.training import StepLoss
from dist_moe.models import ModelOutput
from dist_moe.routing import Route
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
        sums: Sums = {**losses, **self._counts(output, batch.tokens_in_step)}
        return StepLoss(losses["total_loss"] * self.shares, sums)

    def _counts(self, output: ModelOutput, tokens_in_step: int) -> Sums:
        """Return ``tokens``; ``active_experts``, assignments per token averaged over gates and layers, and the
        histogram of these numbers; ``rows_computed``; and ``load``, (L, E) rows, 0 for experts that a layer lacks. For
        a dense model all but the tokens are 0 or empty."""
        layers, tokens = output.layers, tokens_in_step / self.shares
        if not layers:
            load_LE = torch.zeros(0, 0, dtype=torch.int64, device=output.predictions[0].device)
            return {"tokens": tokens, "active_experts": 0.0, "rows_computed": 0.0, "load": load_LE}
        routes = [route for layer in layers for route in layer.routes]
        size = max(route.num_slots for route in routes) + 1
        return {
            "tokens": tokens,
            "active_experts": sum(route.num_assignments for route in routes) / (len(routes) * tokens_in_step),
            HISTOGRAM: torch.stack([_histogram(route, size) for route in routes]).sum(dim=0),
            "rows_computed": float(sum(layer.rows_computed for layer in layers)),
            "load": pad_sequence([layer.pairs.rows_per_expert_E for layer in layers], batch_first=True),
        }

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


def _histogram(route: Route, size: int) -> Tensor:
    """Return (size,) int64: how many tokens of a route have 0, 1, 2, ... experts. The host waits for no device."""
    edges_T = torch.arange(route.num_tokens + 1, device=route.token_N.device)
    count_T = torch.searchsorted(route.token_N, edges_T).diff()
    return torch.zeros(size, dtype=torch.int64, device=count_T.device).index_add_(0, count_T, torch.ones_like(count_T))

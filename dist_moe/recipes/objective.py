"""The two-task loss, shared out over ranks and micro-batches so that the layout cannot change it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.data.batches import PairBatch
from dist_moe.engine.loop import StepLoss
from dist_moe.models import RecommenderOutput


class TwoTaskObjective:
    """w * BCE("watched") over all pairs + (1 - w) * MSE(stars) over the rated ones + auxiliary losses.

    ``shares``: ranks times micro-batches per step. Every sum is divided by its size in the whole
    step, and multiplied by ``shares`` because the engine averages over exactly these.
    """

    def __init__(self, watched_weight: float, shares: int) -> None:
        self._watched_weight = watched_weight
        self._shares = shares

    def __call__(self, model: nn.Module, batch: PairBatch) -> StepLoss:
        output: RecommenderOutput = model(batch.user_B, batch.item_B)
        bce, mse = _task_losses(output, batch)
        task = self._watched_weight * bce + (1 - self._watched_weight) * mse
        share = len(batch.user_B) / batch.pairs_in_step
        aux = {name: loss * share for name, loss in output.moe.aux.items()}
        total = torch.stack([task, *aux.values()]).sum()
        losses = {"loss": task, "total_loss": total, "bce": bce, "mse": mse} | aux
        return StepLoss(total * self._shares, losses | _expert_counts(output, batch.pairs_in_step))


def _task_losses(output: RecommenderOutput, batch: PairBatch) -> tuple[Tensor, Tensor]:
    watched_B = batch.rating_B > 0
    bce = F.binary_cross_entropy_with_logits(output.watched_logit_B.float(), watched_B.float(), reduction="sum")
    error_B = torch.where(watched_B, output.rating_B.float() - batch.rating_B, 0.0)
    return bce / batch.pairs_in_step, error_B.square().sum() / max(batch.rated_in_step, 1)


def _expert_counts(output: RecommenderOutput, pairs_in_step: int) -> dict[str, Any]:
    """``active_experts``: assignments per token and gate. ``load``: (E,) rows per expert."""
    moe = output.moe
    assignments = sum(route.num_assignments for route in moe.routes)
    load_E = moe.pairs.rows_per_expert_E
    return {
        "active_experts": load_E.new_tensor(assignments / (len(moe.routes) * pairs_in_step), dtype=torch.double),
        "rows_computed": load_E.new_tensor(moe.rows_computed),
        "load": load_E,
    }

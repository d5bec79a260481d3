"""Evaluate a recommender on a table of pairs that all ranks share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_moe.data.batches import PairBatch, shard_batches
from dist_moe.data.movielens import PairTable
from dist_moe.engine.collectives import gather_columns, sum_over_ranks
from dist_moe.engine.process_groups import ProcessGroups
from dist_moe.models import Recommender
from dist_moe.recipes.metrics import two_task_figures

EVAL_BATCH = 4096


@torch.no_grad()
def evaluate(model: Recommender, pairs: PairTable, watched_weight: float, groups: ProcessGroups) -> dict[str, Any]:
    """Figures over all of ``pairs``, the same on every rank. Collective over all ranks.

    Besides the losses: ``active_experts``, assignments per token averaged over the gates, and per
    gate in ``active_experts_by_gate``; ``dead_experts``, how many experts get no token of any gate.
    """
    was_training = model.training
    model.eval()
    if model.permutation is not None:
        model.permutation.begin_evaluation()
    predictions, load_GE = _predict(model, pairs, groups)
    model.train(was_training)
    probability_N, rating_N = predictions.cpu().numpy()
    figures = two_task_figures(probability_N, rating_N, np.asarray(pairs.rating_N), watched_weight)
    return figures | _expert_figures(load_GE, len(pairs))


def _predict(model: Recommender, pairs: PairTable, groups: ProcessGroups) -> tuple[Tensor, Tensor]:
    """(2, N) probability of "watched" and stars; (G, E) tokens per gate and expert; over all ranks."""
    rank, world_size = groups.environment.rank, groups.environment.world_size
    load_GE = torch.zeros(len(model.moe.gates), model.moe.experts.num_experts, device=groups.device)
    predictions = []
    for index_B in shard_batches(pairs, EVAL_BATCH, rank=rank, world_size=world_size):
        batch = PairBatch.take(pairs, index_B, len(pairs), 0).to(groups.device)
        output = model(batch.user_B, batch.item_B)
        predictions.append(torch.stack([output.watched_logit_B.double().sigmoid(), output.rating_B.double()]))
        load_GE += torch.stack([route.tokens_per_slot for route in output.moe.routes])
    width = -(-len(pairs) // world_size)
    gathered = gather_columns(torch.cat(predictions, dim=1), width)
    return gathered[:, : len(pairs)], sum_over_ranks(load_GE)


def _expert_figures(load_GE: Tensor, tokens: int) -> dict[str, Any]:
    by_gate = (load_GE.sum(dim=1) / tokens).tolist()
    return {
        "active_experts": sum(by_gate) / len(by_gate),
        "active_experts_by_gate": by_gate,
        "dead_experts": int((load_GE.sum(dim=0) == 0).sum()),
    }

"""Evaluate a model on a table of examples that all ranks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_moe.data.batches import shard_batches
from dist_moe.engine.health.activity import ACTIVITY
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.models import MoEModel
from dist_moe.parallel import current_world, gather_columns, sum_over_ranks
from dist_moe.recording import recording
from dist_moe.tasks.task import Task


@torch.no_grad()
def evaluate(
    task: Task, model: MoEModel, part: Any, weights: tuple[float, ...], groups: ProcessGroups
) -> dict[str, Any]:
    """Figures over all of ``part``, the same on every rank. Collective over all ranks.

    Besides the task's own: ``active_experts``, assignments per token averaged over gates and layers, and for
    each gate in ``active_experts_by_gate``; ``dead_experts``, how many experts get no token of any gate.
    """
    was_training = model.training
    model.eval()
    model.begin_evaluation()
    with recording(None):  # gates record training steps only
        columns, load_LGE, tokens = _observe(task, model, part, groups)
    model.train(was_training)
    figures: dict[str, Any] = dict(task.figures(columns.cpu().numpy(), part, weights))
    return figures | expert_figures(load_LGE, tokens)


def _observe(task: Task, model: MoEModel, part: Any, groups: ProcessGroups) -> tuple[Tensor, Tensor, int]:
    """(C, N) observed columns; (L, G, E) tokens per layer, gate and expert; tokens of a gate; over all ranks."""
    world = current_world()
    layers = list(model.moe_layers.values())
    gates, experts = (len(layers[0].gates), layers[0].experts.num_experts) if layers else (0, 0)
    load_LGE = torch.zeros(len(layers), gates, experts, device=groups.device)
    tokens = torch.zeros((), dtype=torch.int64, device=groups.device)
    columns = []
    for index_B in shard_batches(part, task.eval_batch, rank=world.rank, world_size=world.size):
        batch = part.batch(index_B, index_B).to(groups.device)
        output = model(*batch.inputs)
        ACTIVITY.beat()
        columns.append(task.observe(output, batch))
        for load_GE, layer in zip(load_LGE, output.layers, strict=True):
            load_GE += torch.stack([route.tokens_per_slot for route in layer.routes])
        if output.layers:
            tokens += output.layers[0].routes[0].num_tokens
    width = -(-len(part) // world.size)
    gathered = gather_columns(torch.cat(columns, dim=1), width)
    return gathered[:, : len(part)], sum_over_ranks(load_LGE), int(sum_over_ranks(tokens))


def expert_figures(load_LGE: Tensor, tokens: int) -> dict[str, Any]:
    """From (L, G, E) tokens per layer, gate and expert, of ``tokens`` tokens; see :func:`evaluate`.

    Of a dense model, without layers, all are 0.
    """
    by_gate = (load_LGE.flatten(0, 1).sum(dim=1) / max(tokens, 1)).tolist()
    return {
        "active_experts": sum(by_gate) / max(len(by_gate), 1),
        "active_experts_by_gate": by_gate,
        "dead_experts": int((load_LGE.sum(dim=1) == 0).sum()),
    }

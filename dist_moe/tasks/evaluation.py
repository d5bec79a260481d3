"""Evaluate a model on a table of examples that all ranks share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_moe.data.batches import shard_batches
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.engine.monitor.load import effective_experts
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.parallel import current_world, gather_columns, sum_over_ranks
from dist_moe.recording import recording
from dist_moe.tasks.task import Metrics, Task, Watch

PARTS = {"train": "training", "val": "validation", "test": "test"}
"""Parts of a task by the names of their fields: what sentences call their examples."""


@torch.no_grad()
def evaluate(
    task: Task, model: MoEModel, part: Any, weights: tuple[float, ...], groups: ProcessGroups
) -> dict[str, Any]:
    """Return metrics over all of ``part``, the same on every rank. Collective over all ranks.

    Besides the task's own: ``active_experts``, assignments per token averaged over gates and layers, and for
    each gate in ``active_experts_by_gate``; ``effective_experts``, exp(entropy of a layer's load over all its gates),
    the mean over layers, and ``dead_experts``, how many experts get no token of any gate, both for each layer in
    ``..._by_layer``; and what the task's own :meth:`~Task.watch` has seen. What has no value is None, see
    :func:`with_reasons`.
    """
    was_training = model.training
    model.eval()
    model.begin_evaluation()
    with recording(None), task.watch(model) as watch:  # gates record training steps only
        observed, load_LGE, tokens = _observe(task, model, part, groups, watch)
    model.train(was_training)
    columns = observed.cpu().numpy()
    metrics = with_reasons(task.metrics(columns, part, weights), task.undefined(part, weights))
    return metrics | _finite(watch.end(columns, part)) | expert_metrics(load_LGE, tokens)


def evaluate_baselines(task: Task, part: Any, weights: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    """Return the metrics of predictors that a model must beat, by name; what has no value is None."""
    undefined = task.undefined(part, weights)
    return {name: with_reasons(metrics, undefined) for name, metrics in task.baselines(part, weights).items()}


def with_reasons(metrics: Metrics, undefined: Mapping[str, str]) -> dict[str, Any]:
    """Return metrics with None for those without a value, and why, by name, under "undefined" if there are any.

    ``undefined``: the reasons that the labels give, see :meth:`Task.undefined`; whatever else is not finite gives its
    own. The loss stays a number, for what compares it.
    """
    reasons = {name: reason for name, reason in undefined.items() if name in metrics}
    for name, value in metrics.items():
        if not math.isfinite(value):
            reasons.setdefault(name, f"the model's is {value}")
    settled: dict[str, Any] = {name: None if name in reasons and name != "loss" else v for name, v in metrics.items()}
    return settled | ({"undefined": reasons} if reasons else {})


def label_warnings(task: Task, weights: tuple[float, ...]) -> list[str]:
    """Return a sentence for every part of the data whose labels leave something without a value."""
    warnings = []
    for part, called in PARTS.items():
        reasons: dict[str, list[str]] = {}
        for name, reason in task.undefined(getattr(task, part), weights).items():
            reasons.setdefault(reason, []).append(name)
        warnings += [f"warning: {called} examples: {why}; no {', '.join(names)}" for why, names in reasons.items()]
    return warnings


def check_parts(task: Task) -> None:
    """Raise UserError for a part of the data without examples: nothing could be trained, chosen or tested."""
    for part, called in PARTS.items():
        if len(getattr(task, part)) == 0:
            raise UserError(f"data: there are no {called} examples; give more data, or another split (see 'data')")


def check_selection(task: Task, weights: tuple[float, ...], by: str) -> None:
    """Raise UserError where the validation loss, by which ``by`` chooses, says nothing."""
    reason = task.undefined(task.val, weights).get("loss")
    if reason is not None:
        raise UserError(
            f"{by} chooses by the validation loss, which has no value: {reason}; give other target_weights or more data"
        )


def _finite(value: Any) -> Any:
    """Return ``value`` with None for numbers, at any depth, that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _observe(
    task: Task, model: MoEModel, part: Any, groups: ProcessGroups, watch: Watch
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return (C, N) observed columns; for each layer by name (G, E) tokens per gate and expert; tokens of a gate
    of the first layer; over all ranks."""
    world = current_world()
    load_LGE = {
        name: torch.zeros(len(layer.gates), layer.experts.num_experts, device=groups.device)
        for name, layer in model.moe_layers.items()
    }
    tokens = torch.zeros((), dtype=torch.int64, device=groups.device)
    columns = []
    for index_B in shard_batches(part, task.eval_batch, rank=world.rank, world_size=world.size):
        batch = part.batch(index_B, index_B).to(groups.device)
        output = model(*batch.inputs)
        ACTIVITY.beat()
        watch.see(output)
        columns.append(task.observe(output, batch))
        for load_GE, layer in zip(load_LGE.values(), output.layers, strict=True):
            load_GE += torch.stack([route.tokens_per_slot for route in layer.routes])
        if output.layers:
            tokens += output.layers[0].routes[0].num_tokens
    width = -(-len(part) // world.size)
    gathered = gather_columns(torch.cat(columns, dim=1), width)
    load_LGE = {name: sum_over_ranks(load_GE) for name, load_GE in load_LGE.items()}
    return gathered[:, : len(part)], load_LGE, int(sum_over_ranks(tokens))


def expert_metrics(load_LGE: Mapping[str, Tensor], tokens: int) -> dict[str, Any]:
    """Return the metrics of experts, see :func:`evaluate`; for a dense model all are 0.

    ``load_LGE``: for each layer by name (G, E) tokens per gate and expert. ``tokens``: of a gate of the first layer.
    """
    by_gate = [load for load_GE in load_LGE.values() for load in (load_GE.sum(dim=1) / max(tokens, 1)).tolist()]
    load_LE = {name: load_GE.sum(dim=0).cpu() for name, load_GE in load_LGE.items()}
    effective = {name: float(effective_experts(load_E.numpy())) for name, load_E in load_LE.items()}
    dead = {name: int((load_E == 0).sum()) for name, load_E in load_LE.items()}
    return {
        "active_experts": sum(by_gate) / max(len(by_gate), 1),
        "active_experts_by_gate": by_gate,
        "effective_experts": sum(effective.values()) / max(len(effective), 1),
        "effective_experts_by_layer": effective,
        "dead_experts": sum(dead.values()),
        "dead_experts_by_layer": dead,
    }

"""The memory that a run will need on each rank, before anything of it exists: the model is built without storage.

Exact: parameters, masters and optimizer states, from shapes, the padding of DeepSpeed's flat buffers
included. At most: what stage 3 brings together while a step lasts. Estimated: activations (activations.py),
from the widths of what a step keeps per token and per dispatched row; the largest expert-parallel rank counts,
under an even load and in the worst case (every token of the group goes to the experts of one rank, in every layer).

ZeRO stage 3 holds slices of every parameter, each padded to its number of ranks, and those parameters that it brings
together. It keeps small parameters whole (``stage3_param_persistence_threshold``), and others from one use to the next
if that is near (``stage3_max_reuse_distance``, 1e9 numbers if it is not set: from the second step on a model of that
size is whole on every rank while a step lasts).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_moe.engine.deepspeed.config import parameter_dtype, zero_stage
from dist_moe.engine.deepspeed.engine import is_expert_parameter, mark_experts
from dist_moe.engine.deepspeed.optimizers import has_shape
from dist_moe.engine.deepspeed.schedules import first_states
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.planning.activations import Load, RowsPerToken, bytes_per_example
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.runs import find_weights
from dist_moe.recipes.supervised.size import planned_model
from dist_moe.search import SlotTable
from dist_moe.tasks.task import Task

STAGES = (0, 1, 2, 3)
ALIGNMENT = 2
"""DeepSpeed pads each flat buffer to a multiple of this times the ranks over which it is partitioned."""

_FP32 = 4

Share = Callable[[nn.Parameter], int]
"""Number of ranks over which a parameter is sliced."""

_DEFAULTS = {
    "stage3_param_persistence_threshold": 1e5,
    "stage3_model_persistence_threshold": sys.maxsize,
    "stage3_max_reuse_distance": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
}
_AT_ONCE = 2
"""Modules of which a backward pass may need the parameters at the same time: two inputs of one operation."""


@dataclass(frozen=True)
class StatePlan:
    """Bytes per rank at one ZeRO stage. ``padding``: part of the parameters that belongs to none. ``gradients``:
    at their largest, when the backward pass ends. ``bucket``: in which DeepSpeed reduces them
    (``zero_optimization.reduce_bucket_size``); a CPU pays only for as much of it as gradients fill.
    At stage 3 parameters are slices; ``kept``: those that are whole beside their slices all the time;
    ``gathered``: these and those that are so within a step, at most."""

    stage: int
    dense_parameters: int
    expert_parameters: int
    gradients: int
    masters: int
    optimizer: int
    bucket: int
    padding: int
    kept: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        """Bytes of everything but buffers and activations."""
        parameters = self.dense_parameters + self.expert_parameters
        return parameters + self.gradients + self.masters + self.optimizer + self.bucket + self.gathered


@dataclass(frozen=True)
class LoadPlan:
    """A micro-batch at one load. ``experts_per_token``: different ones of a layer, over its gates.
    ``received_rows``: in all MoE layers, on the rank that gets most. ``sent_per_step``: bytes that the busiest rank
    sends in the flat exchanges of a step, all MoE layers and micro-batches, forward and backward.
    ``largest_batch``: global, that fits the memory given."""

    load: str
    experts_per_token: int
    received_rows: int
    sent_per_step: int
    dispatch: int
    activations: int
    largest_batch: int | None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a rank needs. ``states``: by ZeRO stage. ``loads``: for the configured batch. ``tokens``: of a rank
    and micro-batch. ``buffers``: bytes. ``teachers``: of models in fp32 that the trained one follows. ``search``: at
    most, while a configured table search lasts, beside parameters and passes. ``stage``: the configured one."""

    ranks: int
    expert_parallel_size: int
    tokens: int
    moe_layers: int
    stage: int
    buffers: int
    teachers: int
    search: int
    states: tuple[StatePlan, ...]
    loads: tuple[LoadPlan, ...]

    @property
    def state(self) -> StatePlan:
        """The states at the configured stage."""
        return self.states[self.stage]

    def plain(self) -> dict[str, Any]:
        """Return the plan as plain content for JSON."""
        return asdict(self)


def plan_memory(config: SupervisedConfig, task: Task, ranks: int, memory: int | None = None) -> MemoryPlan:
    """Return the plan for ``ranks`` processes, of ``memory`` bytes each. Raises UserError if they do not fit."""
    config = config.fitted(ranks)
    config.check(ranks)
    size = config.parallel.expert_parallel_size
    model = planned_model(config, task, size)
    mark_experts(model, "experts")
    states = tuple(_states(model, config, stage, ranks, size) for stage in STAGES)
    buffers = _buffer_bytes(model)
    teachers = sum(_teacher_bytes(run, task, size) for run in config.recipe.teachers)
    stage = zero_stage(config.deepspeed)
    left = None if memory is None else memory - states[stage].total - buffers - teachers
    layers = model.moe_layers.values()
    experts = max((layer.experts.num_experts for layer in layers), default=0)
    hard = min(experts, config.model.experts_per_token * max((len(layer.gates) for layer in layers), default=0))
    cases: dict[str, tuple[int, Load]] = {"no experts": (0, lambda n: RowsPerToken.evenly(0, size))}
    if layers:  # of n experts, perhaps fewer than others
        cases = {
            "k experts per token, even load": (hard, lambda n: RowsPerToken.evenly(min(hard, n), size)),
            "k experts per token, all to one rank": (
                hard,
                lambda n: RowsPerToken.at_worst(min(hard, n), n // size, size),
            ),
            "all experts per token": (experts, lambda n: RowsPerToken.at_worst(n, n // size, size)),
        }
    loads = tuple(_load(name, model, config, task, ranks, *case, left) for name, case in cases.items())
    search = _search_bytes(model, config, task, ranks)
    tokens = round(config.train.batch_size // (ranks * config.accumulation) * task.example_shape().tokens)
    return MemoryPlan(ranks, size, tokens, len(layers), stage, buffers, teachers, search, states, loads)


def _buffer_bytes(model: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def _search_bytes(model: MoEModel, config: SupervisedConfig, task: Task, ranks: int) -> int:
    """Return what the largest table search takes on a rank: fp64 copies of the model (not at stage 3), and results."""
    layers, tokens = list(model.moe_layers.values()), task.example_shape().tokens
    needed = [search.bytes_needed(layers, tokens, ranks) for search in config.table_searches]
    parameters = sum(p.numel() for p in model.parameters()) if zero_stage(config.deepspeed) < 3 else 0
    return max(needed) + 8 * parameters if needed else 0


def _teacher_bytes(run: Path, task: Task, size: int) -> int:
    """Return the bytes of the model of a finished run on a rank, its experts over ``size`` of them."""
    try:
        weights = find_weights(run)
    except UserError as error:
        raise UserError(f"the memory of the model that is followed counts, and is not known yet: {error}") from error
    model = planned_model(weights.config, task, size)
    return _FP32 * sum(p.numel() for p in model.parameters()) + _buffer_bytes(model)


def optimizer_states(config: SupervisedConfig) -> tuple[int, int]:
    """Return the number of states of a parameter's shape; and the bytes of the others, per tensor that is owned."""
    tensors = [value for value in first_states(config.deepspeed).values() if isinstance(value, Tensor)]
    return sum(map(has_shape, tensors)), sum(t.element_size() for t in tensors if not has_shape(t))


def _states(model: nn.Module, config: SupervisedConfig, stage: int, ranks: int, size: int) -> StatePlan:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in trained if is_expert_parameter(p) == expert] for expert in (False, True)]
    shares = (ranks, ranks // size)
    low = parameter_dtype(config.deepspeed).itemsize
    kinds, scalar_bytes = optimizer_states(config)
    counts = [sum(p.numel() for p in group) for group in groups]
    zero = config.deepspeed.get("zero_optimization", {})
    kept = gathered = bucket = 0
    if stage > 0:
        bucket = int(zero.get("reduce_bucket_size", 5e8)) * (2 if zero.get("overlap_comm", False) else 1)
    owners = sum(1 for count in counts if count)  # flat tensors, each with an optimizer state of its own
    if stage == 0:
        held, parts, owners = counts, counts, len(trained)
    elif stage == 3:
        parts = [sum(_slice(p.numel(), share) for p in group) for group, share in zip(groups, shares, strict=True)]
        held = [part * share for part, share in zip(parts, shares, strict=True)]
        kept, gathered = _gathered_elements(model, lambda p: shares[is_expert_parameter(p)], zero)
        bucket = min(bucket, sum(counts))  # whole gradients, not a buffer that waits for them
    else:
        parts = [ALIGNMENT * _slice(count, ALIGNMENT * share) for count, share in zip(counts, shares, strict=True)]
        held = [part * share for part, share in zip(parts, shares, strict=True)]
    dense, experts = parts if stage == 3 else held
    return StatePlan(
        stage,
        dense_parameters=low * dense,
        expert_parameters=low * experts,
        gradients=low * sum(parts if stage in (2, 3) else counts) + (low * sum(parts) if stage == 1 else 0),
        masters=0 if stage == 0 and low == _FP32 else _FP32 * sum(parts),
        optimizer=kinds * _FP32 * sum(parts) + scalar_bytes * owners,
        bucket=low * bucket,
        padding=low * (sum(held) - sum(counts)),
        kept=low * kept,
        gathered=low * gathered,
    )


def _slice(count: int, share: int) -> int:
    return -(-count // share)


def _gathered_elements(model: nn.Module, share: Share, zero: dict[str, Any]) -> tuple[int, int]:
    """Return how many numbers are whole on a rank beside its slices: always, and at most during a step.

    ``zero``: the section ``zero_optimization``. A parameter that is not shared is its own slice.
    """
    size = {name: int(zero.get(name, default)) for name, default in _DEFAULTS.items()}
    whole = {id(p): _slice(p.numel(), share(p)) * share(p) for p in model.parameters() if share(p) > 1}
    # Those that DeepSpeed keeps whole, in the order of its choice, and the tables, which searches read.
    kept = {id(p) for module in model.modules() if isinstance(module, SlotTable) for p in module.parameters()}
    total = 0
    for parameter in model.parameters():
        fits = parameter.numel() + total <= size["stage3_model_persistence_threshold"]
        if fits and parameter.numel() <= size["stage3_param_persistence_threshold"]:
            kept.add(id(parameter))
            total += parameter.numel()
    kept &= whole.keys()
    of_modules = sorted(
        sum(whole.get(id(p), 0) for p in module.parameters(recurse=False) if id(p) not in kept)
        for module in model.modules()
    )
    near = size["stage3_max_reuse_distance"] + size["stage3_prefetch_bucket_size"]
    always = sum(whole[key] for key in kept)
    return always, min(sum(whole.values()), always + sum(of_modules[-_AT_ONCE:]) + near)


def _load(
    name: str,
    model: MoEModel,
    config: SupervisedConfig,
    task: Task,
    ranks: int,
    per_token: int,
    load: Load,
    left: int | None,
) -> LoadPlan:
    size, accumulation = config.parallel.expert_parallel_size, config.accumulation
    dispatch, others = bytes_per_example(model, config, task.example_shape(), load, size)
    examples = config.train.batch_size // (ranks * accumulation)
    tokens = round(examples * task.example_shape().tokens)
    sent, received = 0.0, 0  # sent: numbers per token, rows and results, and the gradients of both
    for layer in model.moe_layers.values():
        rows = load(layer.experts.num_experts)
        received += rows.received
        dim, out_dim = layer.experts.dim, layer.experts.out_dim
        again = 2 if config.model.activation_checkpointing else 1
        sent += rows.leaving * (dim * again + out_dim) + rows.arriving * (dim + out_dim)
    return LoadPlan(
        name,
        experts_per_token=per_token,
        received_rows=received * tokens,
        sent_per_step=round(sent * parameter_dtype(config.deepspeed).itemsize * tokens) * accumulation,
        dispatch=dispatch * examples,
        activations=(dispatch + others) * examples,
        largest_batch=None if left is None else max(0, left // (dispatch + others)) * ranks * accumulation,
    )

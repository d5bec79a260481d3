"""What a run will need on each rank, before anything of it exists: the model is built without storage.

Exact: parameters, masters and optimizer states, from shapes, the padding of DeepSpeed's flat buffers
included. At most: what stage 3 brings together while a step lasts. Estimated: activations (activation_plan.py),
from the widths of what a step keeps per token and per dispatched row; the largest expert-parallel rank counts,
under an even load and in the worst case (every token of the group goes to the experts of one rank, in every layer).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.engine.deepspeed.checks import optimizer_on_one_number
from dist_moe.engine.deepspeed.config import parameter_dtype, zero_stage
from dist_moe.engine.deepspeed.engine import is_expert_parameter, mark_experts
from dist_moe.layer import MoE
from dist_moe.models import MoEModel
from dist_moe.parallel import SingleWorld
from dist_moe.planning.activations import Sent, bytes_per_example
from dist_moe.planning.sharded_memory import gathered_elements, slice_elements
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.tasks import build_model
from dist_moe.tasks.task import Task

STAGES = (0, 1, 2, 3)
ALIGNMENT = 2
"""DeepSpeed pads each flat buffer to a multiple of this times the ranks over which it is partitioned."""

_FP32 = 4


@dataclass(frozen=True)
class StatePlan:
    """Bytes per rank at one ZeRO stage. ``padding``: of the parameters, what belongs to none. ``gradients``:
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
        parameters = self.dense_parameters + self.expert_parameters
        return parameters + self.gradients + self.masters + self.optimizer + self.bucket + self.gathered


@dataclass(frozen=True)
class LoadPlan:
    """A micro-batch at one load. ``experts_per_token``: different ones of a layer, over its gates.
    ``received_rows``: of all MoE layers, on the rank that gets most. ``sent_per_step``: bytes that the busiest rank
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
    """``states``: by ZeRO stage. ``loads``: for the configured batch. ``tokens``: of a rank and micro-batch.
    ``buffers``: bytes. ``stage``: configured."""

    ranks: int
    expert_parallel_size: int
    tokens: int
    moe_layers: int
    stage: int
    buffers: int
    states: tuple[StatePlan, ...]
    loads: tuple[LoadPlan, ...]

    @property
    def state(self) -> StatePlan:
        return self.states[self.stage]

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class _PlannedWorld(SingleWorld):
    """Of several ranks, of which only the number is real: nothing is exchanged in a plan."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


def plan_memory(config: SupervisedConfig, task: Task, ranks: int, memory: int | None = None) -> MemoryPlan:
    """For ``ranks`` processes, of ``memory`` bytes each. Raises UserError if the layout does not fit them."""
    config = config.fitted(ranks)
    config.check(ranks)
    size = config.parallel.expert_parallel_size
    model = planned_model(config, task, size)
    mark_experts(model, "experts")
    states = tuple(_states(model, config, stage, ranks, size) for stage in STAGES)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    stage = zero_stage(config.deepspeed)
    left = None if memory is None else memory - states[stage].total - buffers
    loads = tuple(
        _load(name, model, config, task, ranks, per_token, worst, left)
        for name, per_token, worst in _cases(model, config)
    )
    tokens = _tokens(config.train.batch_size // (ranks * config.accumulation), task)
    return MemoryPlan(ranks, size, tokens, len(model.moe_layers), stage, buffers, states, loads)


def planned_model(config: SupervisedConfig, task: Task, size: int = 1) -> MoEModel:
    """A rank's part of the model, its experts over ``size`` ranks, without storage."""
    with torch.device("meta"):
        return build_model(config, task, _PlannedWorld(size))


def only_layer(model: MoEModel) -> MoE:
    """The MoE layer of a model that has one."""
    (layer,) = model.moe_layers.values()
    return layer


def _tokens(examples: int, task: Task) -> int:
    return round(examples * task.example_shape().tokens)


def _states(model: nn.Module, config: SupervisedConfig, stage: int, ranks: int, size: int) -> StatePlan:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in trained if is_expert_parameter(p) == expert] for expert in (False, True)]
    shares = (ranks, ranks // size)
    low = bytes_per_parameter(config)
    kinds, scalar_bytes = optimizer_states(config)
    counts = [sum(p.numel() for p in group) for group in groups]
    kept = gathered = 0
    bucket = _bucket_elements(config) if stage > 0 else 0
    if stage == 0:
        held, parts = counts, counts
        masters = 0 if low == _FP32 else _FP32 * sum(counts)
        owners = len(trained)
    elif stage == 3:
        parts = [slice_elements(group, share) for group, share in zip(groups, shares, strict=True)]
        held = [part * share for part, share in zip(parts, shares, strict=True)]
        masters = _FP32 * sum(parts)
        owners = sum(1 for count in counts if count)
        zero = config.deepspeed.get("zero_optimization", {})
        kept, gathered = gathered_elements(model, lambda p: shares[is_expert_parameter(p)], zero)
        bucket = min(bucket, sum(counts))  # whole gradients, not a buffer that waits for them
    else:
        held = [_padded(count, ALIGNMENT * share) for count, share in zip(counts, shares, strict=True)]
        parts = [padded // share for padded, share in zip(held, shares, strict=True)]
        masters = _FP32 * sum(parts)
        owners = sum(1 for count in counts if count)
    states = kinds * _FP32 * sum(parts) + scalar_bytes * owners
    dense, experts = parts if stage == 3 else held
    gradients = low * sum(parts if stage in (2, 3) else counts)
    return StatePlan(
        stage,
        low * dense,
        low * experts,
        gradients + (low * sum(parts) if stage == 1 else 0),
        masters,
        states,
        low * bucket,
        low * (sum(held) - sum(counts)),
        low * kept,
        low * gathered,
    )


def _bucket_elements(config: SupervisedConfig) -> int:
    section = config.deepspeed.get("zero_optimization", {})
    return int(section.get("reduce_bucket_size", 5e8)) * (2 if section.get("overlap_comm", False) else 1)


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def bytes_per_parameter(config: SupervisedConfig) -> int:
    """Of parameters as the model computes with them, and of activations: 2 with bf16 or fp16, else 4."""
    return parameter_dtype(config.deepspeed).itemsize


def optimizer_states(config: SupervisedConfig) -> tuple[int, int]:
    """States of a parameter's shape; and bytes of those without a shape, per tensor that the optimizer owns."""
    optimizer = optimizer_on_one_number(config.deepspeed)
    (number,) = optimizer.param_groups[0]["params"]
    number.grad = torch.ones_like(number)
    optimizer.step()
    tensors = [value for value in optimizer.state[number].values() if isinstance(value, Tensor)]
    return sum(t.dim() > 0 for t in tensors), sum(t.element_size() for t in tensors if t.dim() == 0)


def _cases(model: MoEModel, config: SupervisedConfig) -> list[tuple[str, int, bool]]:
    """Name, experts per token, whether all go to one rank."""
    if not model.moe_layers:
        return [("no experts", 0, False)]
    experts = config.model.num_experts
    gates = max(len(layer.gates) for layer in model.moe_layers.values())
    hard = min(experts, config.model.experts_per_token * gates)
    return [
        ("k experts per token, even load", hard, False),
        ("k experts per token, all to one rank", hard, True),
        ("all experts per token", experts, True),
    ]


def _load(
    name: str,
    model: MoEModel,
    config: SupervisedConfig,
    task: Task,
    ranks: int,
    per_token: int,
    worst: bool,
    left: int | None,
) -> LoadPlan:
    size, accumulation = config.parallel.expert_parallel_size, config.accumulation
    sent = Sent.at_worst(per_token, config.model.num_experts // size, size) if worst else Sent.evenly(per_token, size)
    dispatch, others = bytes_per_example(model, config, task.example_shape(), sent, size)
    examples = config.train.batch_size // (ranks * accumulation)
    tokens, layers = _tokens(examples, task), len(model.moe_layers)
    return LoadPlan(
        name,
        per_token,
        sent.received * tokens * layers,
        round(_sent_per_token(model, config, sent) * tokens) * accumulation,
        dispatch * examples,
        (dispatch + others) * examples,
        None if left is None else max(0, left // (dispatch + others)) * ranks * accumulation,
    )


def _sent_per_token(model: MoEModel, config: SupervisedConfig, sent: Sent) -> float:
    """Bytes per token of the rank: rows there and gradients of results, results back and gradients of rows."""
    width, recompute = bytes_per_parameter(config), config.model.activation_checkpointing
    numbers = 0.0
    for layer in model.moe_layers.values():
        dim, out_dim = layer.experts.dim, layer.experts.out_dim
        numbers += sent.leaving * (dim * (2 if recompute else 1) + out_dim) + sent.arriving * (dim + out_dim)
    return numbers * width

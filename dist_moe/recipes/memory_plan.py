"""What a run will need on each rank, before anything of it exists: the model is built without storage.

Exact: parameters, masters and optimizer states, from shapes, the padding of DeepSpeed's flat buffers
included. At most: what stage 3 brings together while a step lasts. Estimated: activations, from the widths of
what a step keeps per token and per dispatched row; the largest expert-parallel rank counts, under an even load
and in the worst case (every token of the group goes to the experts of one rank).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.engine.deepspeed_checks import optimizer_on_one_number
from dist_moe.engine.deepspeed_config import zero_stage
from dist_moe.engine.expert_parallel_engine import is_expert_parameter, mark_experts
from dist_moe.engine.precision import parameter_dtype
from dist_moe.errors import UserError
from dist_moe.experts import ConvBank, DenseReLUBank, ExpertBank
from dist_moe.gates import Gate
from dist_moe.layer import MoE
from dist_moe.models import MoEModel, Transformer
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.config import RunConfig
from dist_moe.recipes.models import build_model
from dist_moe.recipes.problem import Problem
from dist_moe.recipes.sharded_memory import gathered_elements, slice_elements

STAGES = (0, 1, 2, 3)
ALIGNMENT = 2
"""DeepSpeed pads each flat buffer to a multiple of this times the ranks over which it is partitioned."""

_FP32, _INT64 = 4, 8
_GATE_TENSORS = 8
"""Tensors of shape (tokens, branches, slots) that a gate keeps for its backward pass, about."""


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
    """Activations of a micro-batch at one load. ``experts_per_token``: different ones, over all gates.
    ``received_rows``: on the rank that gets most. ``largest_batch``: global, that fits the memory given."""

    load: str
    experts_per_token: int
    received_rows: int
    dispatch: int
    activations: int
    largest_batch: int | None


@dataclass(frozen=True)
class MemoryPlan:
    """``states``: by ZeRO stage. ``loads``: for the configured batch. ``buffers``: bytes. ``stage``: configured."""

    ranks: int
    expert_parallel_size: int
    tokens: int
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


def plan_memory(config: RunConfig, problem: Problem, ranks: int, memory: int | None = None) -> MemoryPlan:
    """For ``ranks`` processes, of ``memory`` bytes each. Raises UserError if the layout does not fit them."""
    config = config.fitted(ranks)
    config.check(ranks)
    size = config.parallel.expert_parallel_size
    with torch.device("meta"):
        model = build_model(config, problem, _PlannedWorld(size))
    mark_experts(model, "experts")
    accumulation = int(config.deepspeed.get("gradient_accumulation_steps", 1))
    tokens = config.train.batch_size // (ranks * accumulation)
    states = tuple(_states(model, config, stage, ranks, size) for stage in STAGES)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    stage = zero_stage(config.deepspeed)
    left = None if memory is None else memory - states[stage].total - buffers
    loads = tuple(
        _load(name, model, config, tokens, size, per_token, worst, left, ranks * accumulation)
        for name, per_token, worst in _cases(model, config)
    )
    return MemoryPlan(ranks, size, tokens, stage, buffers, states, loads)


def only_layer(model: MoEModel) -> MoE:
    """The MoE layer of a model that has one token per example. Raises UserError if it is a transformer."""
    if isinstance(model, Transformer):
        raise UserError("model.name=transformer: no plan can be made for it; 'dist-moe plan' knows the other models")
    (layer,) = model.moe_layers.values()
    return layer


def _states(model: nn.Module, config: RunConfig, stage: int, ranks: int, size: int) -> StatePlan:
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


def _bucket_elements(config: RunConfig) -> int:
    section = config.deepspeed.get("zero_optimization", {})
    return int(section.get("reduce_bucket_size", 5e8)) * (2 if section.get("overlap_comm", False) else 1)


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def bytes_per_parameter(config: RunConfig) -> int:
    """Of parameters as the model computes with them, and of activations: 2 with bf16 or fp16, else 4."""
    return parameter_dtype(config.deepspeed).itemsize


def optimizer_states(config: RunConfig) -> tuple[int, int]:
    """States of a parameter's shape; and bytes of those without a shape, per tensor that the optimizer owns."""
    optimizer = optimizer_on_one_number(config.deepspeed)
    (number,) = optimizer.param_groups[0]["params"]
    number.grad = torch.ones_like(number)
    optimizer.step()
    tensors = [value for value in optimizer.state[number].values() if isinstance(value, Tensor)]
    return sum(t.dim() > 0 for t in tensors), sum(t.element_size() for t in tensors if t.dim() == 0)


def _cases(model: MoEModel, config: RunConfig) -> list[tuple[str, int, bool]]:
    """Name, experts per token, whether all go to one rank."""
    experts = config.model.num_experts
    per_gate = int(getattr(config.model.gate, "k", experts))
    hard = min(experts, per_gate * len(only_layer(model).gates))
    return [
        ("k experts per token, even load", hard, False),
        ("k experts per token, all to one rank", hard, True),
        ("all experts per token", experts, True),
    ]


def _load(
    name: str,
    model: MoEModel,
    config: RunConfig,
    tokens: int,
    size: int,
    per_token: int,
    worst: bool,
    left: int | None,
    shares: int,
) -> LoadPlan:
    bank = only_layer(model).experts
    received = min(per_token, bank.num_local_experts) * size if worst else per_token
    dispatch, activations = _bytes_per_token(model, config, per_token, received, size)
    largest = None if left is None else max(0, left // (dispatch + activations)) * shares
    return LoadPlan(name, per_token, received * tokens, dispatch * tokens, (dispatch + activations) * tokens, largest)


def _bytes_per_token(model: MoEModel, config: RunConfig, sent: int, received: int, size: int) -> tuple[int, int]:
    """Of the exchange, there and back; and of everything else, the gradients of the experts' rows included."""
    bank, width = only_layer(model).experts, bytes_per_parameter(config)
    rows_in = bank.dim * (sent + (2 * received if size > 1 else 0))
    rows_out = bank.out_dim * (sent + received) if size > 1 else 0
    dispatch = width * (rows_in + rows_out)
    gates = [gate for gate in only_layer(model).gates if isinstance(gate, Gate)]
    gating = _FP32 * _GATE_TENSORS * sum(gate.num_branches * gate.num_experts for gate in gates)
    pairs = sent * (4 * _INT64 + _FP32 * len(gates))
    experts = width * received * _elements_per_row(bank)
    heads = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    around = width * (bank.dim + len(gates) * bank.out_dim + heads)
    return dispatch, gating + pairs + experts + around


def _elements_per_row(bank: ExpertBank) -> int:
    """What a bank keeps of one row for its backward pass, and the two gradients that exist beside it there."""
    if isinstance(bank, DenseReLUBank):
        return bank.out_dim * (5 if bank.dropout else 3)
    if isinstance(bank, ConvBank):
        first, second = (int(bias.shape[1]) for bias in (bank.conv1_bias, bank.conv2_bias))
        side = bank.side - 4
        pooled = side // 2
        maps = (25 + first) * side**2 + 2 * first * pooled**2 + second * (pooled - 4) ** 2
        return maps + 2 * second * bank.pooled_side**2 + 2 * bank.dense1_bias.shape[1] + 2 * bank.out_dim
    return 2 * (bank.dim + bank.out_dim)

"""The numbers of a training step: what a rank computes and moves, from the configuration, without data or devices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from dist_moe.engine.deepspeed.config import zero_stage
from dist_moe.experts import ExpertBank
from dist_moe.gates import Gate
from dist_moe.models import MoEModel
from dist_moe.recipes.supervised.config import SupervisedConfig


@dataclass(frozen=True)
class Work:
    """The work of a model with one MoE layer, or of the layer. FLOPs are those of the forward pass; backward there are
    twice as many.

    ``dim``, ``out_dim``: widths of the rows that go to an expert and come back. ``k``: experts per token and gate.
    ``expert_flops``: of a row. ``expert_elements``: numbers of a row that elementwise operations of an expert read
    and write, forward and backward. ``dense_flops``, ``dense_elements``: of a token, everything but the experts.
    ``slots``: numbers of a token among which all gates choose. ``expert_parameters``: of all experts. ``states``: of
    the optimizer, per parameter. ``stage``: of ZeRO. ``value_bytes``: of an activation. ``recompute``: whether the
    dispatch is done again in the backward pass.
    """

    dim: int
    out_dim: int
    experts: int
    gates: int
    k: float
    expert_flops: float
    expert_elements: float
    dense_flops: float
    dense_elements: float
    slots: int
    expert_parameters: int
    dense_parameters: int
    states: int = 2
    stage: int = 1
    value_bytes: int = 4
    recompute: bool = False


_LINEAR_PASSES = 8
"""Memory accesses per output number of a linear layer: bias, activation and their gradients."""

_GATE_PASSES = 24
"""Memory accesses per (token, branch, slot) of a gate: about eight tensors, each written, read, and read twice
backward, less what is done on fewer of them."""

_TOKEN_PASSES = 6
"""Memory accesses per number of a token: made by embeddings or layers before, joined, and its gradients added."""


def work_of_layer(
    bank: ExpertBank, gates: list[Gate], k: float, *, value_bytes: int = 4, recompute: bool = False
) -> Work:
    """Return the work of an MoE layer alone; ``bank`` with any of its experts."""
    hyperplanes = sum(p.numel() for gate in gates for p in gate.parameters() if p.dim() > 1)
    slots = sum(gate.num_branches * gate.num_experts for gate in gates)
    return Work(
        dim=bank.dim,
        out_dim=bank.out_dim,
        experts=bank.num_experts,
        gates=len(gates),
        k=k,
        expert_flops=bank.flops_per_row,
        expert_elements=bank.accesses_per_row,
        dense_flops=2.0 * hyperplanes,
        dense_elements=float(_GATE_PASSES * slots),
        slots=slots,
        expert_parameters=bank.parameters_per_expert * bank.num_experts,
        dense_parameters=sum(p.numel() for gate in gates for p in gate.parameters()),
        value_bytes=value_bytes,
        recompute=recompute,
    )


def work_of_model(model: MoEModel, config: SupervisedConfig, k: float, states: int, value_bytes: int) -> Work:
    """Return the work of a whole training step of ``config``; ``states``: of the optimizer, per parameter.

    ``model``: with one MoE layer; it may be without storage. ``k``: experts per token and gate.
    """
    (moe,) = model.moe_layers.values()
    layer = work_of_layer(moe.experts, moe.each_gate, k)
    experts = {id(parameter) for parameter in moe.experts.parameters()}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    outputs = sum(linear.out_features for linear in linears)
    return replace(
        layer,
        dense_flops=layer.dense_flops + sum(2.0 * linear.weight.numel() for linear in linears),
        dense_elements=layer.dense_elements + _LINEAR_PASSES * outputs + _TOKEN_PASSES * layer.dim,
        dense_parameters=sum(p.numel() for p in model.parameters() if id(p) not in experts and p.requires_grad),
        states=states,
        stage=zero_stage(config.deepspeed),
        value_bytes=value_bytes,
        recompute=config.model.activation_checkpointing,
    )

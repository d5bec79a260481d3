"""What a training step computes and moves on a rank, as numbers: from the configuration, without data or devices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from dist_moe.engine.deepspeed.config import zero_stage
from dist_moe.experts import ConvBank, ExpertBank
from dist_moe.gates import Gate
from dist_moe.models import MoEModel
from dist_moe.planning.memory import only_layer
from dist_moe.recipes.supervised.config import SupervisedConfig


@dataclass(frozen=True)
class Work:
    """Of a model with one MoE layer, or of the layer. FLOPs are of the forward pass; backward there are twice as many.

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

    def with_k(self, k: float | None) -> Work:
        """With a measured number of experts per token and gate; None: as configured."""
        return self if k is None else replace(self, k=k)


_LINEAR_PASSES = 8
"""Of each output of a linear layer: bias, activation and their gradients read or write it about so often."""

_GATE_PASSES = 24
"""Of each (token, branch, slot) of a gate: about eight tensors, each written, read, and read twice backward, less
what is done on fewer of them."""

_TOKEN_PASSES = 6
"""Of each number of a token: made by embeddings or layers before, joined, and its gradients added."""


def work_of_layer(
    bank: ExpertBank, gates: list[Gate], k: float, *, value_bytes: int = 4, recompute: bool = False
) -> Work:
    """Of an MoE layer alone; ``bank`` with any of its experts."""
    parameters = sum(parameter[0].numel() for parameter in bank.parameters()) * bank.num_experts
    hyperplanes = sum(p.numel() for gate in gates for p in gate.parameters() if p.dim() > 1)
    slots = sum(gate.num_branches * gate.num_experts for gate in gates)
    return Work(
        dim=bank.dim,
        out_dim=bank.out_dim,
        experts=bank.num_experts,
        gates=len(gates),
        k=k,
        expert_flops=_flops_per_row(bank),
        expert_elements=_elements_per_row(bank),
        dense_flops=2.0 * hyperplanes,
        dense_elements=float(_GATE_PASSES * slots),
        slots=slots,
        expert_parameters=parameters,
        dense_parameters=sum(p.numel() for gate in gates for p in gate.parameters()),
        value_bytes=value_bytes,
        recompute=recompute,
    )


def work_of_model(model: MoEModel, config: SupervisedConfig, states: int, value_bytes: int) -> Work:
    """Of a whole training step of ``config``; ``model`` may be without storage. ``states``: of the optimizer."""
    k = config.model.experts_per_token
    layer = work_of_layer(only_layer(model).experts, only_layer(model).each_gate, k)
    experts = {id(parameter) for parameter in only_layer(model).experts.parameters()}
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


def _flops_per_row(bank: ExpertBank) -> float:
    """Every weight of a dense expert is multiplied once a row, a filter once for each place of its map."""
    matrices = {name: p[0].numel() for name, p in bank.named_parameters() if p.dim() > 2}
    if isinstance(bank, ConvBank):
        first = bank.side - 4
        second = first // 2 - 4
        matrices["conv1_weight"] *= first**2
        matrices["conv2_weight"] *= second**2
    return 2.0 * sum(matrices.values())


def _elements_per_row(bank: ExpertBank) -> float:
    """Activations: read and written forward, read twice and written backward; dropout as many again."""
    if isinstance(bank, ConvBank):
        first, second = (int(bias.shape[1]) for bias in (bank.conv1_bias, bank.conv2_bias))
        side = bank.side - 4
        return 5.0 * ((25 + first) * side**2 + 2 * second * (side // 2 - 4) ** 2)
    dropout = 10 * bank.out_dim if getattr(bank, "dropout", 0) else 0
    hidden = sum(int(p.shape[2]) for p in bank.parameters() if p.dim() == 3)
    return float(5 * hidden + dropout)

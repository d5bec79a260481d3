"""Random small layers in fp64, whole or split over ranks, and their naive evaluation."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet, Gate, TopK
from dist_moe.layer import MoE, MoEOutput
from dist_moe.parallel import World
from dist_moe.search import PermutationSearch
from tests.helpers.oracle import (
    naive_experts,
    naive_gate,
    naive_mix,
    naive_permutation_entropy,
    naive_relabel,
    naive_sinkhorn,
)

STAGE_STEPS = 4
ENTROPY_WEIGHT = 0.3
PERMUTATION_WEIGHT = 0.2


@dataclass(frozen=True)
class Case:
    """``hardness``: the spread of the split values in units of gamma; large ones saturate all splits."""

    gate: Literal["comet", "top_k"] = "comet"
    num_gates: int = 1
    num_experts: int = 8
    k: int = 2
    dim: int = 3
    hidden: int = 4
    gamma: float = 1.0
    hardness: float = 0.6
    permutation: Literal["none", "hard", "soft"] = "none"
    tokens: int = 6
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    num_experts = draw(st.integers(2, 17))
    values: dict[str, Any] = {
        "gate": draw(st.sampled_from(["comet", "top_k"])),
        "num_gates": draw(st.integers(1, 3)),
        "num_experts": num_experts,
        "k": draw(st.integers(1, min(num_experts, 3))),
        "dim": draw(st.integers(1, 4)),
        "hidden": draw(st.integers(1, 3)),
        "gamma": draw(st.sampled_from([0.001, 0.1, 1.0, 10.0])),
        "hardness": draw(st.sampled_from([0.1, 0.5, 1.0, 1000.0])),
        "permutation": draw(st.sampled_from(["none", "hard", "soft"])),
        "tokens": draw(st.integers(0, 5)),
        "seed": draw(st.integers(0, 2**20)),
    }
    return Case(**(values | fixed))


@dataclass(frozen=True)
class Layer:
    gates: list[Gate]
    experts: DenseReLUBank
    search: PermutationSearch | None

    def leaves(self) -> dict[str, Tensor]:
        """Every parameter, under a name that does not depend on the rank."""
        gates = {f"gate{i}.{name}": p for i, gate in enumerate(self.gates) for name, p in gate.named_parameters()}
        experts = {f"experts.{name}": p for name, p in self.experts.named_parameters()}
        return gates | experts | ({"relaxed": self.search.relaxed} if self.search else {})

    def moe(self, world: World | None = None) -> MoE:
        return MoE(self.gates, self.experts, self.search, world)

    def of_rank(self, rank: int, num_ranks: int) -> Layer:
        """A copy with all gates and this rank's share of the experts."""
        per_rank = self.experts.num_experts // num_ranks
        ids = range(rank * per_rank, (rank + 1) * per_rank)
        share = DenseReLUBank(self.experts.dim, self.experts.out_dim, self.experts.num_experts, ids).double()
        with torch.no_grad():
            share.weight.copy_(self.experts.weight[list(ids)])
            share.bias.copy_(self.experts.bias[list(ids)])
        return Layer(deepcopy(self.gates), share, deepcopy(self.search))


def build_layer(case: Case) -> Layer:
    torch.manual_seed(case.seed)
    gates = [build_gate(case) for _ in range(case.num_gates)]
    experts = DenseReLUBank(case.dim, case.hidden, case.num_experts, range(case.num_experts)).double()
    torch.nn.init.normal_(experts.bias)
    return Layer(gates, experts, build_search(case))


def build_gate(case: Case) -> Gate:
    if case.gate == "top_k":
        top_k = TopK(case.dim, case.num_experts, case.k).double()
        torch.nn.init.normal_(top_k.bias)
        return top_k
    comet = Comet(case.dim, case.num_experts, case.k, case.gamma, ENTROPY_WEIGHT).double()
    spread = case.gamma * case.hardness
    for parameter in (comet.split_weight, comet.split_bias):
        torch.nn.init.normal_(parameter, std=spread / (case.dim + 1) ** 0.5)
    for parameter in (comet.leaf_weight, comet.leaf_bias):
        torch.nn.init.normal_(parameter)
    return comet


def build_search(case: Case) -> PermutationSearch | None:
    if case.permutation == "none":
        return None
    search = PermutationSearch(
        case.num_experts, STAGE_STEPS, PERMUTATION_WEIGHT, temperature=(1e-1, 1e-2), iterations=(3, 7)
    ).double()
    search.step.fill_(1 if case.permutation == "soft" else STAGE_STEPS)
    search.table.copy_(torch.randperm(case.num_experts))
    return search


def build_tokens(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    return torch.randn(case.tokens, case.dim, dtype=torch.float64, generator=generator).requires_grad_()


def build_cotangents(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(case.seed + 2)
    shape = (case.tokens, case.hidden)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(case.num_gates)]


def naive_mixtures(layer: Layer, x_TD: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One (T, E) mixture per gate, after the permutation, and the auxiliary losses."""
    pairs = [naive_gate(gate, x_TD) for gate in layer.gates]
    mixtures = [mixture for mixture, _ in pairs]
    aux = {name: sum(gate_aux[name] for _, gate_aux in pairs) for name in pairs[0][1]}
    if layer.search is None:
        return mixtures, aux
    if int(layer.search.step) >= STAGE_STEPS:
        table = layer.search.table.tolist()
        return [naive_relabel(m, table) for m in mixtures], aux | {"permutation": x_TD.new_zeros(())}
    progress = int(layer.search.step) / STAGE_STEPS
    soft = naive_sinkhorn(layer.search.relaxed / 10 ** (-1 - progress), int(3 + 4 * progress))
    penalty = PERMUTATION_WEIGHT * naive_permutation_entropy(soft)
    return [naive_mix(m, soft) for m in mixtures], aux | {"permutation": penalty}


def naive_layer(layer: Layer, x_TD: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    mixtures, aux = naive_mixtures(layer, x_TD)
    return [naive_experts(mixture, x_TD, layer.experts) for mixture in mixtures], aux


def loss_of(outputs: list[Tensor], aux: dict[str, Tensor], cotangents: list[Tensor]) -> Tensor:
    task = sum((y * c).sum() for y, c in zip(outputs, cotangents, strict=True))
    return task + sum(aux.values())


def loss_of_moe(output: MoEOutput, cotangents: list[Tensor]) -> Tensor:
    return loss_of(list(output.outputs), output.aux, cotangents)

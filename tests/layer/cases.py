"""Random small layers in fp64, whole or split over ranks, and their naive evaluation."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet, DSelectK, Gate, HashRouting, TopK
from dist_moe.layer import MoE, MoEOutput
from dist_moe.parallel import Placement, World
from dist_moe.search import PermutationSearch, SlotTable, give_branches_slots
from tests.helpers.branches import naive_branch_mix, naive_branch_relabel, naive_branch_sum
from tests.helpers.oracle import naive_experts, naive_gate, naive_permutation_entropy, naive_sinkhorn

STAGE_STEPS = 4
ENTROPY_WEIGHT = 0.3
PERMUTATION_WEIGHT = 0.2
IDS = 30


@dataclass(frozen=True)
class Case:
    """``hardness``: the spread of the split values in units of gamma; large ones saturate all splits.

    ``permutation``: "through" learns straight through hard tables; "map" is a slot map, many to one, from
    ``num_slots`` slots (None: as many as experts). ``masked``: every gate has slots that it must not choose.
    ``per_gate``, ``per_branch``: whether every gate, every tree, has one of its own. ``recompute``: whether the
    experts' activations are forgotten.
    """

    gate: Literal["comet", "top_k", "dselect_k", "hash"] = "comet"
    num_gates: int = 1
    num_experts: int = 8
    k: int = 2
    dim: int = 3
    hidden: int = 4
    gamma: float = 1.0
    hardness: float = 0.6
    permutation: Literal["none", "hard", "soft", "through", "map"] = "none"
    num_slots: int | None = None
    masked: bool = False
    per_gate: bool = False
    per_branch: bool = False
    recompute: bool = False
    tokens: int = 6
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    num_experts = draw(st.integers(2, 17))
    permutation = draw(st.sampled_from(["none", "hard", "soft", "through", "map"]))
    num_slots = draw(st.integers(2, 17)) if permutation == "map" else None
    values: dict[str, Any] = {
        "gate": draw(st.sampled_from(["comet", "top_k", "dselect_k", "hash"])),
        "num_gates": draw(st.integers(1, 3)),
        "num_experts": num_experts,
        "k": draw(st.integers(1, min(num_slots or num_experts, 3))),
        "dim": draw(st.integers(1, 4)),
        "hidden": draw(st.integers(1, 3)),
        "gamma": draw(st.sampled_from([0.001, 0.1, 1.0, 10.0])),
        "hardness": draw(st.sampled_from([0.1, 0.5, 1.0, 1000.0])),
        "permutation": permutation,
        "num_slots": num_slots,
        "masked": draw(st.booleans()),
        "per_gate": draw(st.booleans()),
        "per_branch": draw(st.booleans()),
        "recompute": draw(st.booleans()),
        "tokens": draw(st.integers(0, 5)),
        "seed": draw(st.integers(0, 2**20)),
    }
    return Case(**(values | fixed))


@dataclass(frozen=True)
class Layer:
    gates: list[Gate]
    experts: DenseReLUBank
    search: SlotTable | None
    recompute: bool = False

    def leaves(self) -> dict[str, Tensor]:
        """Every parameter, under a name that does not depend on the rank."""
        gates = {f"gate{i}.{name}": p for i, gate in enumerate(self.gates) for name, p in gate.named_parameters()}
        experts = {f"experts.{name}": p for name, p in self.experts.named_parameters()}
        return gates | experts | self.relaxed()

    def relaxed(self) -> dict[str, Tensor]:
        return {"relaxed": self.search.relaxed} if isinstance(self.search, PermutationSearch) else {}

    def moe(self, world: World | None = None, placement: Placement | None = None) -> MoE:
        return MoE(self.gates, self.experts, self.search, world, placement=placement, recompute_experts=self.recompute)

    def of_rank(self, rank: int, num_ranks: int, placement: Placement | None = None) -> Layer:
        """A copy with all gates and this rank's share of the experts."""
        ids = (placement or Placement.identity(self.experts.num_experts, num_ranks)).experts_of(rank)
        share = DenseReLUBank(self.experts.dim, self.experts.out_dim, self.experts.num_experts, ids).double()
        with torch.no_grad():
            share.weight.copy_(self.experts.weight[list(ids)])
            share.bias.copy_(self.experts.bias[list(ids)])
        return Layer(deepcopy(self.gates), share, deepcopy(self.search), self.recompute)


def build_layer(case: Case) -> Layer:
    torch.manual_seed(case.seed)
    gates = [build_gate(case) for _ in range(case.num_gates)]
    for g, gate in enumerate(gates):
        if case.masked:
            gate.allow((torch.arange(gate.num_experts) + g) % 3 != 1)
    experts = DenseReLUBank(case.dim, case.hidden, case.num_experts, range(case.num_experts)).double()
    torch.nn.init.normal_(experts.bias)
    search = build_search(case, gates)
    if search is not None:
        give_branches_slots(gates, search)
    return Layer(gates, experts, search, case.recompute)


def build_gate(case: Case) -> Gate:
    slots = case.num_slots or case.num_experts
    if case.gate == "hash":
        return HashRouting(case.dim, slots, torch.ones(IDS), seed=case.seed)
    if case.gate == "top_k":
        top_k = TopK(case.dim, slots, case.k).double()
        torch.nn.init.normal_(top_k.bias)
        return top_k
    kind = Comet if case.gate == "comet" else DSelectK
    gate = kind(case.dim, slots, case.k, case.gamma, ENTROPY_WEIGHT).double()
    for name, parameter in gate.named_parameters():
        hardens = name.startswith(("split", "bit"))
        std = case.gamma * case.hardness / (case.dim + 1) ** 0.5 if hardens else 1.0
        torch.nn.init.normal_(parameter, std=std)
    return gate


def build_search(case: Case, gates: list[Gate]) -> SlotTable | None:
    if case.permutation == "none":
        return None
    branches = gates[0].num_branches if case.per_branch else 1
    if case.permutation == "map":
        table = SlotTable(
            case.num_experts, case.num_gates, num_slots=case.num_slots, per_gate=case.per_gate, branches=branches
        )
        table.table.random_(case.num_experts)
        return table
    search = PermutationSearch(
        case.num_experts,
        STAGE_STEPS,
        case.num_gates,
        entropy_weight=PERMUTATION_WEIGHT,
        temperature=(1e-1, 1e-2),
        iterations=(3, 7),
        per_gate=case.per_gate,
        branches=branches,
        forward="hard" if case.permutation == "through" else "soft",
    ).double()
    search.step.fill_(STAGE_STEPS if case.permutation == "hard" else 1)
    search.table.copy_(torch.rand_like(search.soft[..., 0]).argsort(-1))
    return search


def build_tokens(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    return torch.randn(case.tokens, case.dim, dtype=torch.float64, generator=generator).requires_grad_()


def build_ids(case: Case) -> Tensor:
    return torch.randint(IDS, (case.tokens,), generator=torch.Generator().manual_seed(case.seed + 3))


def build_cotangents(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(case.seed + 2)
    shape = (case.tokens, case.hidden)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(case.num_gates)]


def naive_mixtures(layer: Layer, x_TD: Tensor, ids_T: Tensor | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One (T, E) mixture per gate, after the slot map, and the auxiliary losses."""
    pairs = [naive_gate(gate, x_TD, ids_T) for gate in layer.gates]
    mixtures = [mixture for mixture, _ in pairs]
    aux = {name: sum(gate_aux[name] for _, gate_aux in pairs) for name in pairs[0][1]}
    search = layer.search
    if search is None:
        return mixtures, aux
    of_gate = range(len(mixtures)) if search.per_gate else [0] * len(mixtures)
    if not isinstance(search, PermutationSearch) or int(search.step) >= STAGE_STEPS:
        tables, experts = [search.table[p] for p in of_gate], layer.experts.num_experts
        mixtures = [naive_branch_relabel(m, table_KS, experts) for m, table_KS in zip(mixtures, tables, strict=True)]
        return mixtures, aux | ({"permutation": x_TD.new_zeros(())} if layer.relaxed() else {})
    soft = naive_soft(search)
    penalties = [naive_permutation_entropy(matrix) for matrix in soft.flatten(0, 1)]
    aux |= {"permutation": PERMUTATION_WEIGHT * sum(penalties, x_TD.new_zeros(())) / len(penalties)}
    if search.straight_through:
        return [naive_through(m, soft[p], search.table[p]) for m, p in zip(mixtures, of_gate, strict=True)], aux
    return [naive_branch_mix(m, soft[p]) for m, p in zip(mixtures, of_gate, strict=True)], aux


def naive_soft(search: PermutationSearch) -> Tensor:
    """(P, K, n, n), one Sinkhorn matrix after another."""
    progress = int(search.step) / STAGE_STEPS
    logits = search.relaxed / 10 ** (-1 - progress)
    matrices = [naive_sinkhorn(matrix, int(3 + 4 * progress)) for matrix in logits.flatten(0, 1)]
    return torch.stack(matrices).view_as(search.relaxed)


def naive_through(mixture_TS: Tensor, matrix_KEE: Tensor, table_KE: Tensor) -> Tensor:
    """The values of the table; R's gradient is that of the soft sum, on the pairs that the table uses."""
    hard_TE = naive_branch_relabel(mixture_TS, table_KE)
    soft_TE = naive_branch_sum(mixture_TS.detach(), matrix_KEE) * (hard_TE.detach() != 0)
    return hard_TE + (soft_TE - soft_TE.detach())


def naive_layer(layer: Layer, x_TD: Tensor, ids_T: Tensor | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    mixtures, aux = naive_mixtures(layer, x_TD, ids_T)
    return [naive_experts(mixture, x_TD, layer.experts) for mixture in mixtures], aux


def loss_of(outputs: list[Tensor], aux: dict[str, Tensor], cotangents: list[Tensor]) -> Tensor:
    task = sum((y * c).sum() for y, c in zip(outputs, cotangents, strict=True))
    return task + sum(aux.values())


def loss_of_moe(output: MoEOutput, cotangents: list[Tensor]) -> Tensor:
    return loss_of(list(output.outputs), output.aux, cotangents)

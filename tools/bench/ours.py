"""Our own layer: as it is, and with a padded (T, K) table in place of the ragged assignment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_moe.experts import FeedForwardBank
from dist_moe.gates import TopK
from dist_moe.gates.base import gate_dtype
from dist_moe.gates.top_k import largest
from dist_moe.layer import MoE
from dist_moe.parallel import World, combine, dispatch, plan_dispatch
from tools.bench.candidate import Candidate, Gradients, Layer, grad_of, local_experts
from tools.bench.workloads import Material, Workload


class OurLayer(Layer):
    """``dist_moe.MoE`` with a Top-k gate and a bank of gated feed-forward experts."""

    def __init__(self, workload: Workload, given: Material, world: World) -> None:
        super().__init__()
        scores = "softmax_before" if workload.k == 1 else "softmax_after"  # what all peers do
        gate = TopK(workload.width, workload.experts, workload.k, scores=scores)
        gate.weight = nn.Parameter(given.router_ED.clone())
        gate.bias.requires_grad_(False)  # no peer has one
        self.moe = MoE(gate, bank(workload, given, world), world=world)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.moe(x_TD).outputs[0].to(x_TD.dtype)

    def gradients(self) -> Gradients:
        return {"router": grad_of(self.moe.gates[0].weight)} | gradients_of_bank(self.moe.experts)


class PaddedLayer(Layer):
    """Our bank behind tables of shape (T, K), the way of systems with a fixed k."""

    def __init__(self, workload: Workload, given: Material, world: World) -> None:
        super().__init__()
        self.k, self.normalise, self.world = workload.k, workload.k > 1, world
        self.router = nn.Parameter(given.router_ED.clone())
        self.experts = bank(workload, given, world)

    def forward(self, x_TD: Tensor) -> Tensor:
        precise_TD = x_TD.to(gate_dtype(x_TD))
        probability_TE = (precise_TD @ self.router.to(precise_TD.dtype).T).softmax(dim=-1)
        expert_TK = largest(probability_TE.detach(), self.k)
        weight_TK = probability_TE.gather(1, expert_TK)
        if self.normalise:
            weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
        return padded_mixture(x_TD, expert_TK, weight_TK, self.experts, self.world)

    def gradients(self) -> Gradients:
        return {"router": grad_of(self.router)} | gradients_of_bank(self.experts)


def padded_mixture(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, experts: nn.Module, world: World) -> Tensor:
    """Every entry of the table is dispatched and computed, whatever its weight."""
    tokens, k = expert_TK.shape
    order_N = expert_TK.flatten().argsort(stable=True)
    plan = plan_dispatch(torch.bincount(expert_TK.flatten(), minlength=experts.num_experts), world)
    results_NF = experts(dispatch(x_TD[order_N // k], plan, world), plan.rows_per_local_expert)
    back_N = torch.empty_like(order_N).index_copy(0, order_N, torch.arange(len(order_N)))
    results_TKF = combine(results_NF, plan, world)[back_N].view(tokens, k, -1)
    return (results_TKF * weight_TK.unsqueeze(2)).sum(dim=1).to(x_TD.dtype)


def bank(workload: Workload, given: Material, world: World) -> FeedForwardBank:
    """This rank's experts with the given weights."""
    here = local_experts(workload, world)
    ids = range(here.start, here.stop)
    made = FeedForwardBank(workload.width, workload.hidden, workload.experts, ids, activation="silu", gated=True)
    made.up, made.gate, made.down = (
        nn.Parameter(weight[here].clone()) for weight in (given.up_EDF, given.gate_EDF, given.down_EFD)
    )
    return made


def gradients_of_bank(experts: FeedForwardBank) -> Gradients:
    assert experts.gate is not None
    return {name: grad_of(p) for name, p in (("gate", experts.gate), ("up", experts.up), ("down", experts.down))}


CANDIDATES = (Candidate("ours", OurLayer), Candidate("ours, padded (T, K)", PaddedLayer))

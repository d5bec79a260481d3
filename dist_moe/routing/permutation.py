"""Slot -> expert: a permutation, hard (a table) or soft (a doubly stochastic matrix).

Convention of the COMET paper's code: P[s, e] = 1 means that slot s is relabelled as expert e, so
that g'_e = sum_s g_s P[s, e]. A gate whose K branches have slots of their own (slot j * n + i is
leaf i of tree j) takes K permutations, one per branch; the branches' shares of an expert add up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_moe.routing.route import Route


@dataclass(frozen=True)
class HardPermutation:
    """``table_KE``: (K, n) int64, each row a permutation of 0..n-1; slot i of branch j is expert
    ``table_KE[j, i]``."""

    table_KE: Tensor

    def apply(self, route: Route) -> Route:
        """Relabel the slots of ``route``; its weights, and hence its sparsity, are kept."""
        expert_N = self.table_KE.flatten()[route.slot_N]
        branches, num_experts = self.table_KE.shape
        if branches == 1:
            return replace(route, slot_N=expert_N)
        return Route.merge(route.token_N, expert_N, route.weight_N, route.num_tokens, num_experts, route.aux)


@dataclass(frozen=True)
class SoftPermutation:
    """``matrix_KEE``: (K, n, n), non-negative, rows and columns summing to about 1; differentiable."""

    matrix_KEE: Tensor

    def apply(self, route: Route) -> Route:
        """Mix the slots, keeping each token's total: every token may now reach every expert."""
        with torch.autocast(route.weight_N.device.type, enabled=False):
            branches, num_experts, _ = self.matrix_KEE.shape
            mixed_TE = mix(route.dense().view(-1, branches, num_experts), self.matrix_KEE)
        return Route.from_dense(mixed_TE, route.aux)


@dataclass(frozen=True)
class StraightThroughPermutation:
    """Routes by ``table_KE`` (K, n) and learns ``matrix_KEE`` (K, n, n), of which it is the rounding.

    The weights are those of the table; their gradient is that of the linear mixture sum_s g_s P[s, e]
    for the (token, expert) pairs that the table uses. So routing stays sparse while R learns, from the
    experts that a token visits anyway.
    """

    matrix_KEE: Tensor
    table_KE: Tensor

    def apply(self, route: Route) -> Route:
        hard = HardPermutation(self.table_KE).apply(route)
        branches, num_experts, _ = self.matrix_KEE.shape
        with torch.autocast(route.weight_N.device.type, enabled=False):
            slots_TKE = route.dense().detach().view(-1, branches, num_experts)
            matrix_KEE = self.matrix_KEE.to(slots_TKE.dtype)
            through_TE = torch.einsum("tks,kse->te", slots_TKE, matrix_KEE - matrix_KEE.detach())
        return replace(hard, weight_N=hard.weight_N + through_TE[hard.token_N, hard.slot_N])


def mix(weight_TKE: Tensor, matrix_KEE: Tensor) -> Tensor:
    """(T, K, n) branches and (K, n, n) matrices -> (T, n), each row scaled to the sum it had.

    The scaling makes up for a Sinkhorn iteration that has not converged. The paper's code divides by
    the new sum, which is the same for rows that sum to 1.
    """
    mixed_TE = torch.einsum("tks,kse->te", weight_TKE, matrix_KEE.to(weight_TKE.dtype))
    before_T1 = weight_TKE.sum(dim=(1, 2)).unsqueeze(1)
    after_T1 = mixed_TE.sum(dim=1, keepdim=True)
    return mixed_TE * (before_T1 / torch.where(after_T1 > 0, after_T1, 1))


Permutation = HardPermutation | SoftPermutation | StraightThroughPermutation

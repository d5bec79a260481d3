"""Slot -> expert: a slot map (a table, many to one allowed), or a relaxed permutation (a doubly stochastic matrix).

Convention of the COMET paper's code: P[s, e] = 1 means that slot s is relabelled as expert e, so
that g'_e = sum_s g_s P[s, e]. Slots that meet in one expert add up their weights; an expert without a slot
gets no token. A gate whose K branches have slots of their own (slot j * S + i is slot i of branch j) takes K
maps, one per branch; the branches' shares of an expert add up, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_moe.routing.route import Route


@dataclass(frozen=True)
class HardMap:
    """``table_KS``: (K, S) int64 in 0..num_experts-1; slot i of branch j is expert ``table_KS[j, i]``.

    ``merges``: whether two slots of a token may meet in one expert, so that equal pairs must be looked for, for
    which the host waits for a device. False only for a single branch whose slots have different experts.
    """

    table_KS: Tensor
    num_experts: int
    merges: bool

    def apply(self, route: Route) -> Route:
        """Return ``route`` over experts instead of slots; a token's weights on slots of the same expert add up."""
        expert_N = self.table_KS.flatten()[route.slot_N]
        if self.merges:
            return Route.merge(route.token_N, expert_N, route.weight_N, route.num_tokens, self.num_experts, route.aux)
        return replace(route, slot_N=expert_N, num_slots=self.num_experts)


@dataclass(frozen=True)
class SoftPermutation:
    """``matrix_KEE``: (K, n, n), non-negative, rows and columns summing to about 1; differentiable."""

    matrix_KEE: Tensor

    def apply(self, route: Route) -> Route:
        """Return the route of mixed slots, each token's total kept: every token may now reach every expert."""
        with torch.autocast(route.weight_N.device.type, enabled=False):
            branches, num_experts, _ = self.matrix_KEE.shape
            mixed_TE = mix(route.dense().view(-1, branches, num_experts), self.matrix_KEE)
        return Route.from_dense(mixed_TE, route.aux)


@dataclass(frozen=True)
class StraightThroughPermutation:
    """Routes by ``hard``, a permutation per branch, and learns ``matrix_KEE`` (K, n, n), of which it is the rounding.

    The weights are those of the table; their gradient is that of the linear mixture sum_s g_s P[s, e]
    for the (token, expert) pairs that the table uses. So routing stays sparse while R learns, from the
    experts that a token visits anyway.
    """

    matrix_KEE: Tensor
    hard: HardMap

    def apply(self, route: Route) -> Route:
        """Return ``route`` over experts instead of slots, with gradients to the matrix."""
        hard = self.hard.apply(route)
        branches, num_experts, _ = self.matrix_KEE.shape
        with torch.autocast(route.weight_N.device.type, enabled=False):
            slots_TKE = route.dense().detach().view(-1, branches, num_experts)
            matrix_KEE = self.matrix_KEE.to(slots_TKE.dtype)
            through_TE = torch.einsum("tks,kse->te", slots_TKE, matrix_KEE - matrix_KEE.detach())
        return replace(hard, weight_N=hard.weight_N + through_TE[hard.token_N, hard.slot_N])


SlotMap = HardMap | SoftPermutation | StraightThroughPermutation


def check_tables(table_PKS: Tensor, num_experts: int) -> list[bool]:
    """Return, for each of P tables (K, S), whether it merges: see :class:`HardMap`. The host waits for the device.

    Raises ValueError if a table names an expert outside 0..num_experts-1.
    """
    outside = table_PKS[(table_PKS < 0) | (table_PKS >= num_experts)]
    if outside.numel():
        raise ValueError(f"a slot map names expert {int(outside[0])}; allowed: 0..{num_experts - 1}")
    if table_PKS.shape[1] > 1:
        return [True] * len(table_PKS)
    return (table_PKS.sort(dim=-1).values.diff(dim=-1) == 0).flatten(1).any(dim=1).tolist()


def mix(weight_TKS: Tensor, matrix_KSE: Tensor) -> Tensor:
    """Return the (T, E) mix of (T, K, S) branches by (K, S, E) matrices, each row scaled to the sum it had.

    The scaling makes up for a Sinkhorn iteration that has not converged. The paper's code divides by
    the new sum, which is the same for rows that sum to 1.
    """
    mixed_TE = torch.einsum("tks,kse->te", weight_TKS, matrix_KSE.to(weight_TKS.dtype))
    before_T1 = weight_TKS.sum(dim=(1, 2)).unsqueeze(1)
    after_T1 = mixed_TE.sum(dim=1, keepdim=True)
    return mixed_TE * (before_T1 / torch.where(after_T1 != 0, after_T1, 1))

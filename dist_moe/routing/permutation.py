"""Slot -> expert: a permutation, hard (a table) or soft (a doubly stochastic matrix).

Convention of the COMET paper's code: P[s, e] = 1 means that slot s is relabelled as expert e, so
that g'_e = sum_s g_s P[s, e].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_moe.routing.route import Route


@dataclass(frozen=True)
class HardPermutation:
    """``table_S``: (S,) int64, a permutation of 0..S-1; slot s is expert ``table_S[s]``."""

    table_S: Tensor

    def apply(self, route: Route) -> Route:
        """Relabel the slots of ``route``; its weights, and hence its sparsity, are kept."""
        return replace(route, slot_N=self.table_S[route.slot_N])


@dataclass(frozen=True)
class SoftPermutation:
    """``matrix_SS``: (S, S), non-negative, rows and columns summing to about 1; differentiable."""

    matrix_SS: Tensor

    def apply(self, route: Route) -> Route:
        """Mix the slots and divide by the row sum: every token may now reach every expert.

        The division makes up for a Sinkhorn iteration that has not converged.
        """
        with torch.autocast(route.weight_N.device.type, enabled=False):
            mixed_TS = route.dense() @ self.matrix_SS.to(route.weight_N.dtype)
        row_sum_T1 = mixed_TS.sum(dim=1, keepdim=True)
        normalised_TS = mixed_TS / torch.where(row_sum_T1 > 0, row_sum_T1, 1)
        return Route.from_dense(normalised_TS, route.aux)


Permutation = HardPermutation | SoftPermutation

"""The pairs of a single route: without a search for pairs that two gates want, and without waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_moe.kernels import stable_order
from dist_moe.routing.route import Route


def by_expert(route: Route) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``token_N``, ``expert_N``, ``weight_1N`` and ``rows_per_expert_E``, sorted by expert, then by token.

    A route has no pair twice and is sorted by token, so that a stable sort by slot is all it takes. How many
    pairs there are is known beforehand: the host asks the device for nothing.
    """
    order_N = stable_order(route.slot_N, route.num_slots)
    expert_N = route.slot_N.index_select(0, order_N)
    weight_1N = route.weight_N.index_select(0, order_N).unsqueeze(0)
    return route.token_N.index_select(0, order_N), expert_N, weight_1N, counts_of_sorted(expert_N, route.num_slots)


def counts_of_sorted(expert_N: Tensor, num_experts: int) -> Tensor:
    """(E,) int64 counts of the values of ``expert_N``, which rise. For ``bincount`` a device would be waited for."""
    return torch.searchsorted(expert_N, torch.arange(num_experts + 1, device=expert_N.device)).diff()

"""The union of several gates' routes over the same experts: each (token, expert) pair once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_moe.kernels import stable_order
from dist_moe.routing.route import Route


@dataclass(frozen=True)
class Pairs:
    """The distinct (token, expert) pairs that any gate wants, sorted by expert, then by token.

    ``token_N``, ``expert_N``: int64. ``weight_GN``: each gate's weight for each pair,
    differentiable, exactly 0 where the gate does not want it. ``rows_per_expert_E``: (E,) int64.
    Where experts do not live in the order of their ids, "expert" is the position at which an expert
    lives until :meth:`renamed` gives the pairs, in the order which they have, their experts' ids.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_GN: Tensor
    rows_per_expert_E: Tensor
    num_tokens: int

    @classmethod
    def none(cls, num_gates: int, num_experts: int, device: torch.device) -> Pairs:
        """Return no pair at all: what is dispatched where a layer's results are computed otherwise."""
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        weight_GN = torch.zeros(num_gates, 0, device=device)
        return cls(nothing, nothing, weight_GN, nothing.new_zeros(num_experts), 0)

    def renamed(self, name_E: Tensor) -> Pairs:
        """Return the pairs in their order, with expert e called ``name_E[e]`` ((E,), a permutation)."""
        rows_per_expert_E = torch.empty_like(self.rows_per_expert_E).index_copy(0, name_E, self.rows_per_expert_E)
        return replace(self, expert_N=name_E[self.expert_N], rows_per_expert_E=rows_per_expert_E)

    @property
    def num_pairs(self) -> int:
        """Number of (token, expert) pairs."""
        return self.token_N.numel()


def union_of_routes(routes: list[Route]) -> Pairs:
    """Return the pairs of routes whose slots are experts already (that is, after the slot map).

    Raises ValueError when the routes speak of different tokens or experts.
    """
    num_tokens, num_experts = routes[0].num_tokens, routes[0].num_slots
    if any((r.num_tokens, r.num_slots) != (num_tokens, num_experts) for r in routes):
        sizes = [(r.num_tokens, r.num_slots) for r in routes]
        raise ValueError(f"routes over the same experts must agree on (tokens, experts), got {sizes}")
    if len(routes) == 1:
        # No pair twice, sorted by token: a stable sort by expert is all it takes. How many pairs there are is known
        # beforehand, so the host asks the device for nothing.
        route, order_N = routes[0], stable_order(routes[0].slot_N, num_experts)
        token_N, expert_N, weight_N = (
            x.index_select(0, order_N) for x in (route.token_N, route.slot_N, route.weight_N)
        )
        return Pairs(token_N, expert_N, weight_N.unsqueeze(0), _counts_of_sorted(expert_N, num_experts), num_tokens)
    keys = [route.slot_N * num_tokens + route.token_N for route in routes]
    key_N = torch.unique(torch.cat(keys), sorted=True)
    expert_N = torch.div(key_N, max(num_tokens, 1), rounding_mode="floor")
    weights = [
        route.weight_N.new_zeros(key_N.numel()).index_put((torch.searchsorted(key_N, key),), route.weight_N)
        for route, key in zip(routes, keys, strict=True)
    ]
    return Pairs(
        token_N=key_N - expert_N * num_tokens,
        expert_N=expert_N,
        weight_GN=torch.stack(weights),
        rows_per_expert_E=_counts_of_sorted(expert_N, num_experts),
        num_tokens=num_tokens,
    )


def _counts_of_sorted(expert_N: Tensor, num_experts: int) -> Tensor:
    """Return (E,) int64 counts of the values of ``expert_N``, which rise. ``bincount`` would wait for the device."""
    return torch.searchsorted(expert_N, torch.arange(num_experts + 1, device=expert_N.device)).diff()

"""Route: which token goes to which slot, with which weight.

Shape suffixes, here and everywhere: T tokens, D model width, F expert hidden width, E experts,
S slots, K trees / top-k, N assignments, G gates, R ranks, B batch, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dist_moe.kernels import sums_at


@dataclass(frozen=True)
class Route:
    """The non-zero entries of a (tokens, slots) mixture, grouped by token in ascending order.

    ``token_N``, ``slot_N``: int64 indices, no pair twice. ``weight_N``: the weights, positive and
    differentiable. ``num_tokens``, ``num_slots``: the size of the dense matrix, which the indices
    alone do not tell. ``aux``: the gate's auxiliary losses by name, each a scalar already
    multiplied by its coefficient and averaged over this route's tokens.
    """

    token_N: Tensor
    slot_N: Tensor
    weight_N: Tensor
    num_tokens: int
    num_slots: int
    aux: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_dense(cls, weight_TS: Tensor, aux: dict[str, Tensor] | None = None) -> Route:
        """Return the route that holds exactly the non-zeros of ``weight_TS`` (T, S)."""
        token_N, slot_N = weight_TS.detach().nonzero(as_tuple=True)
        num_tokens, num_slots = weight_TS.shape
        return cls(token_N, slot_N, weight_TS[token_N, slot_N], num_tokens, num_slots, aux or {})

    @classmethod
    def from_choices(
        cls, slot_TK: Tensor, weight_TK: Tensor, num_slots: int, aux: dict[str, Tensor] | None = None
    ) -> Route:
        """Return the route of k different slots per token, ``slot_TK`` in any order, with their weights.

        Its size is known without a look at the values, so the host does not wait for a device. A weight that
        is 0 by underflow stays: it changes no sum and no gradient, but costs a row.
        """
        (num_tokens, k), device = slot_TK.shape, slot_TK.device
        slot_TK, order_TK = slot_TK.sort(dim=1)
        token_N = torch.arange(num_tokens, device=device).unsqueeze(1).expand(num_tokens, k).flatten()
        weight_N = weight_TK.gather(1, order_TK).flatten()
        return cls(token_N, slot_TK.flatten(), weight_N, num_tokens, num_slots, aux or {})

    @classmethod
    def merge(
        cls,
        token_N: Tensor,
        slot_N: Tensor,
        weight_N: Tensor,
        num_tokens: int,
        num_slots: int,
        aux: dict[str, Tensor] | None = None,
    ) -> Route:
        """Return the route of assignments in any order, in which the weights of a repeated pair add up."""
        key_N, place_N = torch.unique(token_N * num_slots + slot_N, return_inverse=True)
        merged_N = sums_at(weight_N, place_N, key_N.numel())
        token_N = torch.div(key_N, num_slots, rounding_mode="floor")
        return cls(token_N, key_N - token_N * num_slots, merged_N, num_tokens, num_slots, aux or {})

    def heaviest(self, limit: int) -> Route:
        """Return each token's ``limit`` heaviest assignments (ties: the lower slot), divided by their sum."""
        by_weight_N = self.weight_N.detach().argsort(descending=True, stable=True)
        order_N = by_weight_N[self.token_N[by_weight_N].argsort(stable=True)]
        count_T = torch.bincount(self.token_N, minlength=self.num_tokens)
        place_N = torch.arange(self.num_assignments, device=self.token_N.device)
        place_N = place_N - (count_T.cumsum(0) - count_T)[self.token_N]
        kept_N = torch.zeros_like(self.token_N, dtype=torch.bool).index_put((order_N,), place_N < limit)
        kept = self.keep(kept_N)
        sum_T = sums_at(kept.weight_N, kept.token_N, kept.num_tokens)
        return replace(kept, weight_N=kept.weight_N / sum_T[kept.token_N])

    def keep(self, kept_N: Tensor) -> Route:
        """Return the route of the assignments where ``kept_N`` (N,) is true, with their weights."""
        if kept_N.all():
            return self
        return replace(self, token_N=self.token_N[kept_N], slot_N=self.slot_N[kept_N], weight_N=self.weight_N[kept_N])

    @property
    def num_assignments(self) -> int:
        """N, the number of (token, slot) pairs."""
        return self.token_N.numel()

    @property
    def tokens_per_slot(self) -> Tensor:
        """Return (S,) int64: how many tokens each slot receives."""
        return torch.bincount(self.slot_N, minlength=self.num_slots)

    def dense(self) -> Tensor:
        """Return the (T, S) matrix of weights, zero where a token does not use a slot; differentiable."""
        zeros_TS = self.weight_N.new_zeros(self.num_tokens, self.num_slots)
        return zeros_TS.index_put((self.token_N, self.slot_N), self.weight_N)

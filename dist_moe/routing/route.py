"""Route: which token goes to which slot, with which weight.

Shape suffixes, here and everywhere: T tokens, D model width, F expert hidden width, E experts,
S slots, K trees / top-k, N assignments, G gates, R ranks, B batch, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


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
        """The route that holds exactly the non-zeros of ``weight_TS`` (T, S)."""
        token_N, slot_N = weight_TS.detach().nonzero(as_tuple=True)
        num_tokens, num_slots = weight_TS.shape
        return cls(token_N, slot_N, weight_TS[token_N, slot_N], num_tokens, num_slots, aux or {})

    @property
    def num_assignments(self) -> int:
        return self.token_N.numel()

    @property
    def tokens_per_slot(self) -> Tensor:
        """(S,) int64: how many tokens each slot receives."""
        return torch.bincount(self.slot_N, minlength=self.num_slots)

    def dense(self) -> Tensor:
        """The (T, S) matrix of weights, zero where a token does not use a slot; differentiable."""
        zeros_TS = self.weight_N.new_zeros(self.num_tokens, self.num_slots)
        return zeros_TS.index_put((self.token_N, self.slot_N), self.weight_N)

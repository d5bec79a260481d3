"""Hash routing: a fixed table sends every id to one expert, whatever the token looks like.

Roller, Sukhbaatar, Szlam, Weston: Hash Layers for Large Sparse Models (NeurIPS 2021). In the COMET
comparison ("Hash-r") the id is the user's and the expert of each id is drawn uniformly, once.
"""

from __future__ import annotations

import random
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from dist_moe import kernels
from dist_moe.gates.base import GATES, Gate, GateContext, GateSettings, Mixture
from dist_moe.routing import Route

Assignment = Literal["random", "balanced"]
SEEDS_APART = 1_000_003
"""Between the seeds of two layers: runs with small seeds share no table."""


@GATES.register
class HashRoutingConfig(GateSettings):
    """The hash gate: one expert per token, by the token's id; nothing to learn."""

    stackable: ClassVar[bool] = True

    name: Literal["hash"] = "hash"
    assignment: Assignment = Field(
        "random",
        description="random: each id a uniformly drawn expert; balanced: frequent ids first, each drawn among the "
        "experts that are hardly fuller than the emptiest",
    )
    seed: int = Field(0, ge=0, description="seed of the assignment, the same for every task's gate")

    def of_layer(self, layer: int) -> Self:
        """Return the settings with a seed of the layer's own, so that every layer draws another table."""
        return self.model_copy(update={"seed": self.seed + SEEDS_APART * layer})

    def experts_per_token(self, num_experts: int) -> int:
        """Return 1: an id has one slot."""
        return HashRouting.k

    def build(self, dim: int, num_experts: int, context: GateContext) -> HashRouting:
        """Return the gate over the ids of the data. Raises ValueError if it has none."""
        if context.id_counts is None:
            raise ValueError("model.gate.name=hash: the data has no ids to route by; choose another gate")
        return HashRouting(dim, num_experts, context.id_counts, self.assignment, self.seed)


class HashRouting(Gate):
    """``table`` (ids,) int64, in the checkpoint: the expert of each id. No parameters.

    ``id_counts``: (ids,) how often each id occurs in the training data. "balanced" deals the ids out by
    :func:`balanced_assignment`. :meth:`allow` deals the ids of excluded slots out to the others, in turn.
    """

    can_exclude = True
    table: Tensor
    k = 1

    def __init__(
        self, dim: int, num_experts: int, id_counts: Tensor, assignment: Assignment = "random", seed: int = 0
    ) -> None:
        super().__init__(dim, num_experts)
        if assignment == "random":
            generator = torch.Generator().manual_seed(seed)
            table = torch.randint(num_experts, (id_counts.numel(),), generator=generator)
        else:
            table = balanced_assignment(id_counts, num_experts, seed)
        self.register_buffer("table", table)

    def allow(self, allowed_E: Tensor) -> None:
        """Exclude slots, and deal their ids out to the others in turn; see :meth:`Gate.allow`."""
        super().allow(allowed_E)
        homeless_N = (~allowed_E.to(self.table.device))[self.table].nonzero().squeeze(1)
        slots_A = allowed_E.nonzero().squeeze(1).to(self.table)
        self.table[homeless_N] = slots_A[torch.arange(len(homeless_N), device=self.table.device) % len(slots_A)]

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Mixture:
        """Return weight 1 for each id's slot."""
        expert_T11 = self._experts(x_TD, ids_T).view(-1, 1, 1)
        return Mixture((expert_T11 == torch.arange(self.num_experts, device=x_TD.device)).to(x_TD.dtype))

    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Route:
        """Return each id's slot, without a dense mixture. Raises ValueError for ids that the table does not have."""
        expert_T = self._experts(x_TD, ids_T)
        token_T = torch.arange(len(x_TD), device=x_TD.device)
        return Route(token_T, expert_T, x_TD.new_ones(len(x_TD)), len(x_TD), self.num_slots)

    def _experts(self, x_TD: Tensor, ids_T: Tensor | None) -> Tensor:
        if ids_T is None:
            raise ValueError("hash routing needs ids_T, the tokens' ids, and got None")
        if ids_T.shape != (len(x_TD),) or ids_T.is_floating_point() or ids_T.dtype == torch.bool:
            raise ValueError(f"ids_T must be {len(x_TD)} integers, got {tuple(ids_T.shape)} of {ids_T.dtype}")
        ids_T = ids_T.long()
        if kernels.on_device_path(ids_T):  # an error without words, but the host does not wait to see it
            torch._assert_async(((ids_T >= 0) & (ids_T < len(self.table))).all())
        elif ids_T.numel() and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < len(self.table):
            span = f"{int(ids_T.min())}..{int(ids_T.max())}"
            raise ValueError(f"ids_T must lie in 0..{len(self.table) - 1}, the ids of the table, got {span}")
        return self.table[ids_T]


def balanced_assignment(id_counts: Tensor, num_experts: int, seed: int = 0) -> Tensor:
    """Return (ids,) int64 experts, given the ids' counts: loads are nearly equal, and ``seed`` draws who shares one.

    In order of falling counts (ties: the lower id) an id goes to one of the experts whose load exceeds the smallest by
    less than the id's own count. Rare ids come last and fill up what frequent ones left uneven.
    """
    table = torch.empty(id_counts.numel(), dtype=torch.int64)
    counts, draw, loads = id_counts.tolist(), random.Random(seed), [0] * num_experts
    for each in sorted(range(len(counts)), key=lambda each: (-counts[each], each)):
        full = min(loads) + max(counts[each], 1)
        expert = draw.choice([expert for expert, load in enumerate(loads) if load < full])
        table[each] = expert
        loads[expert] += counts[each]
    return table

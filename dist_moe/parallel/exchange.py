"""Exchange: how token rows reach their experts, and weighted sums of results come back.

``FlatExchange`` sends every (token, expert) pair to the rank of its expert and weighs the results where
the token lives. ``two_level_exchange`` (two_level.py) sends a token to a node once, and weighs there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_moe.kernels import RowCounts, TokenIndex, rows_of_tokens, weighted_scatter
from dist_moe.parallel.dispatch import combine, dispatch, plan_dispatch
from dist_moe.parallel.meanwhile import Meanwhile, nothing
from dist_moe.parallel.recompute import recomputed
from dist_moe.parallel.world import World
from dist_moe.routing import Pairs

LocalExperts = Callable[[Tensor, RowCounts], Tensor]
"""(N, D) rows sorted by local expert, and their counts -> (N, F), as a bank of experts does it."""


@dataclass(frozen=True)
class Mixed:
    """``sums_GTF``: per gate the weighted sums of the experts' results, in the precision of the weights.
    ``dtype``: that of the results. ``rows_computed``: rows that this rank's experts computed."""

    sums_GTF: Tensor
    dtype: torch.dtype
    rows_computed: int


class Exchange(Protocol):
    """Gives (T, D) tokens to the experts of their pairs and mixes the results. Collective over a world.

    The experts of ``pairs`` are positions: those of a rank are contiguous, the same number on each rank.
    Differentiable by tokens, weights and the experts' parameters. ``meanwhile`` is called once: while the first
    rows are under way if the exchange can wait for them later, else before they leave.
    """

    def __call__(self, x_TD: Tensor, pairs: Pairs, experts: LocalExperts, meanwhile: Meanwhile = nothing) -> Mixed: ...


class FlatExchange:
    """One all-to-all there and one back over all ranks of ``world``; a row per (token, expert) pair.

    ``recompute``: the rows dispatched and what the experts keep of them are forgotten, and made again in the
    backward pass.
    """

    def __init__(self, world: World, recompute: bool = False) -> None:
        self._world = world
        self._recompute = recompute

    def __call__(self, x_TD: Tensor, pairs: Pairs, experts: LocalExperts, meanwhile: Meanwhile = nothing) -> Mixed:
        meanwhile()
        plan = plan_dispatch(pairs.rows_per_expert_E, self._world, pairs.num_pairs)

        index = TokenIndex.of(pairs.token_N, pairs.num_tokens)

        def expert_rows(x_TD: Tensor) -> Tensor:
            rows_ND = dispatch(rows_of_tokens(x_TD, index), plan, self._world)
            return experts(rows_ND, plan.rows_per_local_expert)

        computed_NF = (recomputed if self._recompute else _plainly)(expert_rows, x_TD)
        results_NF = combine(computed_NF, plan, self._world)
        sums_GTF = weighted_scatter(results_NF, pairs.weight_GN, index)
        return Mixed(sums_GTF, results_NF.dtype, sum(plan.receive_rows))


def _plainly(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    return function(*arguments)

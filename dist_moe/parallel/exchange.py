"""How token rows reach their experts, and weighted sums of results come back: the interface, and the flat exchange.

``FlatExchange`` sends every (token, expert) pair to the rank of its expert and weighs the results where
the token lives; ``OverlappedExchange`` (overlapped.py) does so in chunks, beside the experts' arithmetic.
``two_level_exchange`` (two_level.py) sends a token to a node once, and weighs there.

Dispatch sends token rows to the ranks of their experts, combine brings results back on the same way:

    rows sorted by expert                 on the sending rank (experts of a rank are contiguous)
      | all-to-all, split by rank
    blocks (source rank, local expert)    on the receiving rank
      | regroup
    blocks (local expert, source rank)    what a bank of experts takes

Forward's plan serves the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_moe.kernels import RowCounts, TokenIndex, on_device_path, rows_of_tokens, weighted_scatter
from dist_moe.parallel.phase_clock import PhaseClock
from dist_moe.parallel.world import World
from dist_moe.routing import Pairs

LocalExperts = Callable[[Tensor, RowCounts], Tensor]
"""(N, D) rows sorted by local expert, and their counts -> (N, F), as a bank of experts does it."""

Meanwhile = Callable[[], None]
"""A computation that a rank does while rows travel."""


def nothing() -> None:
    """Do nothing while rows travel."""


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


@dataclass(frozen=True)
class DispatchPlan:
    """Numbers of rows that this rank sends to every expert, and receives for each of its own.

    ``send_rows``, ``receive_rows``: per rank, host integers. ``rows_per_local_expert``: after the regrouping;
    on an accelerator (E_local,) int64 that stays there.
    ``sent_RL``: rows that go to each rank for each of its experts. ``received_RL``: rows that come from each
    rank for each local expert.
    """

    send_rows: list[int]
    receive_rows: list[int]
    rows_per_local_expert: RowCounts
    sent_RL: list[list[int]]
    received_RL: list[list[int]]


def plan_dispatch(rows_per_expert_E: Tensor, world: World, num_rows: int | None = None) -> DispatchPlan:
    """Return the plan of a dispatch, from counts that the ranks exchange, the only metadata on the wire. Collective.

    ``rows_per_expert_E``: (E,) int64, this rank's rows for each global expert; E is divisible by
    the world's size. ``num_rows``: their sum, if the caller knows it: on an accelerator the host then waits
    once for the counts of several ranks, and never on one.
    """
    if world.size == 1 and num_rows is not None and on_device_path(rows_per_expert_E):
        return DispatchPlan([num_rows], [num_rows], rows_per_expert_E, [[num_rows]], [[num_rows]])
    send_RL = rows_per_expert_E.view(world.size, -1)
    one_row_each = [1] * world.size
    both = torch.stack([send_RL, world.exchange(send_RL, one_row_each, one_row_each)])
    sent_RL, received_RL = both.tolist()
    rows_L = both[1].sum(0) if on_device_path(both) else list(map(sum, zip(*received_RL, strict=True)))
    return DispatchPlan(list(map(sum, sent_RL)), list(map(sum, received_RL)), rows_L, sent_RL, received_RL)


def dispatch(x_ND: Tensor, plan: DispatchPlan, world: World) -> Tensor:
    """Send (N, D) rows, sorted by global expert, to their ranks; return this rank's (N', D), sorted by local expert."""
    return regrouped(world.all_to_all(x_ND, plan.send_rows, plan.receive_rows), plan.received_RL)


def combine(y_ND: Tensor, plan: DispatchPlan, world: World) -> Tensor:
    """Send (N', D) results, sorted by local expert, back to their tokens; return (N, D), sorted by global expert."""
    received_LR = list(zip(*plan.received_RL, strict=True))
    return world.all_to_all(regrouped(y_ND, received_LR), plan.receive_rows, plan.send_rows)


def regrouped(x_ND: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Sort blocks of ``rows[i][j]`` rows, which are sorted by i, then by j: by j, then by i.

    Whole blocks are copied, not rows, once forward and once backward; one row or column of blocks is as it is.
    """
    columns = len(rows[0])
    if min(len(rows), columns) == 1:
        return x_ND
    blocks = x_ND.split(list(chain(*rows)))
    return torch.cat([block for j in range(columns) for block in blocks[j::columns]])


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

        if self._recompute and torch.is_grad_enabled():
            # early_stop=False: torch would end the repetition once it has the tensors that this rank needs, which
            # may be before an all-to-all for which other ranks wait. use_reentrant=False: the other kind loses
            # gradients of tensors that reach the loss by another way.
            computed_NF = checkpoint(expert_rows, x_TD, use_reentrant=False, early_stop=False)
        else:
            computed_NF = expert_rows(x_TD)
        results_NF = combine(computed_NF, plan, self._world)
        sums_GTF = weighted_scatter(results_NF, pairs.weight_GN, index)
        return Mixed(sums_GTF, results_NF.dtype, sum(plan.receive_rows))


@dataclass(frozen=True)
class TimedExperts:
    """The experts ``inner`` between the marks 2 and 3 of ``clock``."""

    clock: PhaseClock
    inner: LocalExperts

    def __call__(self, x_ND: Tensor, rows_per_expert: RowCounts) -> Tensor:
        (x_ND,) = self.clock.mark("experts", "dispatch", x_ND)
        return self.clock.mark("combine", "experts", self.inner(x_ND, rows_per_expert))[0]


def timed(exchange: Exchange, clock: PhaseClock) -> Exchange:
    """Return ``exchange`` with the marks 1 to 4 of ``clock``; while that is off, the exchange itself."""
    if not clock.running:
        return exchange

    def exchange_and_mark(x_TD: Tensor, pairs: Pairs, experts: LocalExperts, meanwhile: Meanwhile = nothing) -> Mixed:
        x_TD, weight_GN = clock.mark("dispatch", "gate", x_TD, pairs.weight_GN)
        mixed = exchange(x_TD, replace(pairs, weight_GN=weight_GN), TimedExperts(clock, experts), meanwhile)
        return replace(mixed, sums_GTF=clock.mark(None, "combine", mixed.sums_GTF)[0])

    return exchange_and_mark

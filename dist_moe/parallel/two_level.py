"""The two-level exchange: a token crosses to a node once, however many of its experts live there.

    tokens of rank (node a, local rank i)
      | across nodes, to local rank i of each node b that holds experts of the token: one row per
      |   (token, node), with the list of (row, expert, weight per gate) of its pairs
    tokens of others on rank (b, i)
      | within node b, to the ranks of their experts: one row per (token, rank), with its list
    experts; per gate the weighted sums of a rank's results
      | within node b, back: one row per (token, rank, gate)
    per gate the sums of the node's ranks, on rank (b, i)
      | across nodes, back: one row per (token, node, gate)
    sums over nodes on rank (a, i)

Both levels are the same step, :class:`OncePerPart`. A rank has one peer in every node, the one of its own
local rank: what arrives in a node is spread over its ranks as the tokens are over those of the nodes they
come from. Sums travel, and are added, in the precision of the weights.

The order of collectives is the same on all ranks, forward and backward, because each needs what the one before it
brought: counts before rows, rows across before rows within, sums within before sums across. Tokens and the lists of
their pairs, which do not need each other, go together in one all-to-all (packed.py). A rank without tokens takes part
in each with zero rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_moe.parallel.exchange import Exchange, FlatExchange, LocalExperts, Meanwhile, Mixed, nothing
from dist_moe.parallel.overlapped import OverlappedExchange
from dist_moe.parallel.packed import exchange_packed
from dist_moe.parallel.world import Levels, SingleWorld, World
from dist_moe.routing import Pairs


def exchange_over(world: World, recompute_experts: bool = False, meanwhile: bool = False) -> Exchange:
    """Return the exchange that ``world`` asks for: in two levels where its ranks are divided into several nodes, else
    flat; overlapped with the experts if ``overlap_chunks`` > 1. Raises ValueError where these exclude each other.

    ``recompute_experts``: see ``FlatExchange``; with two levels, what arrives at a rank is kept. ``meanwhile``:
    there will be something to compute while rows travel; the flat exchange, if no experts are computed again, is
    then one that travels beside it.
    """
    chunks, levels = world.options.overlap_chunks, world.levels
    if isinstance(world, SingleWorld):
        return FlatExchange(world, recompute_experts)
    if chunks > 1 and (recompute_experts or levels is not None):
        raise ValueError("an overlapped exchange has neither two levels nor experts that are computed again")
    if levels is not None and levels.across.size > 1:
        return two_level_exchange(levels, recompute_experts)
    if chunks > 1 or (meanwhile and not recompute_experts):
        return OverlappedExchange(world, chunks)
    return FlatExchange(world, recompute_experts)


def two_level_exchange(levels: Levels, recompute_experts: bool = False) -> OncePerPart:
    """Return the two-level exchange over a world divided into nodes of equally many ranks, its experts in the order of
    its ranks."""
    here = FlatExchange(SingleWorld(), recompute_experts)
    alone = isinstance(levels.within, SingleWorld)
    return OncePerPart(levels.across, here if alone else OncePerPart(levels.within, here))


class OncePerPart:
    """Gives each part of the experts the tokens that need it, once each, and takes a sum per gate back.

    The experts are divided evenly into as many parts as ``across`` has ranks; the rank that receives a
    token for a part lets ``inside``, an exchange over that part's experts, do the rest.
    A gate whose weights in a part are all exactly 0 gets no row from it, and these weights no gradient:
    the pairs are other gates' (see :class:`Pairs`).
    """

    def __init__(self, across: World, inside: Exchange) -> None:
        self._across = across
        self._inside = inside

    def __call__(self, x_TD: Tensor, pairs: Pairs, experts: LocalExperts, meanwhile: Meanwhile = nothing) -> Mixed:
        meanwhile()
        outgoing = _group_by_part(pairs, self._across.size)
        ones = [1] * self._across.size
        both = torch.stack([outgoing.counts_R3, self._across.exchange(outgoing.counts_R3, ones, ones)])
        send, receive = (_PerPart(*of_side.t().tolist()) for of_side in both.cpu())
        rows_UD, arrived = _to_parts(x_TD, pairs, outgoing, send, receive, self._across)
        partial = self._inside(rows_UD, arrived, experts)
        wanted = _wanted_sums(arrived.weight_GN, arrived.token_N, arrived.num_tokens)
        sums_MF = partial.sums_GTF.flatten(0, 1).index_select(0, wanted.gate_M * arrived.num_tokens + wanted.row_M)
        back_MF = self._across.all_to_all(sums_MF, receive.sums, send.sums)
        shape = (len(pairs.weight_GN), pairs.num_tokens, back_MF.shape[1])
        place_M = outgoing.wanted.gate_M * pairs.num_tokens + outgoing.token_U[outgoing.wanted.row_M]
        sums_GTF = back_MF.new_zeros(shape).flatten(0, 1).index_add(0, place_M, back_MF).view(shape)
        return Mixed(sums_GTF, partial.dtype, partial.rows_computed)


@dataclass(frozen=True)
class _Sums:
    """The M (row, gate) whose sums travel back, sorted by row, then by gate."""

    row_M: Tensor
    gate_M: Tensor


@dataclass(frozen=True)
class _Outgoing:
    """The U distinct (part, token), sorted so; ``row_N``: of each pair, its place among those of its part.
    ``counts_R3``: per part the numbers of a :class:`_PerPart`."""

    token_U: Tensor
    row_N: Tensor
    wanted: _Sums
    counts_R3: Tensor


@dataclass(frozen=True)
class _PerPart:
    """Host integers: token rows, pairs and sums that belong to each part."""

    rows: list[int]
    pairs: list[int]
    sums: list[int]


def _group_by_part(pairs: Pairs, num_parts: int) -> _Outgoing:
    tokens = max(pairs.num_tokens, 1)
    part_N = pairs.expert_N // (len(pairs.rows_per_expert_E) // num_parts)
    key_U, unique_N = torch.unique(part_N * tokens + pairs.token_N, return_inverse=True)
    part_U = key_U // tokens
    rows_R = torch.bincount(part_U, minlength=num_parts)
    wanted = _wanted_sums(pairs.weight_GN, unique_N, len(key_U))
    counts = [
        rows_R,
        torch.bincount(part_N, minlength=num_parts),
        torch.bincount(part_U[wanted.row_M], minlength=num_parts),
    ]
    return _Outgoing(
        token_U=key_U - part_U * tokens,
        row_N=unique_N - (rows_R.cumsum(0) - rows_R)[part_N],
        wanted=wanted,
        counts_R3=torch.stack(counts, dim=1),
    )


def _wanted_sums(weight_GN: Tensor, row_N: Tensor, num_rows: int) -> _Sums:
    """Known at both ends without a word on the wire: the weights are the same, bit by bit."""
    used_NG = (weight_GN.detach() != 0).t().to(torch.int32)
    used_UG = used_NG.new_zeros(num_rows, len(weight_GN)).index_add(0, row_N, used_NG)
    return _Sums(*used_UG.nonzero(as_tuple=True))


def _to_parts(
    x_TD: Tensor, pairs: Pairs, outgoing: _Outgoing, send: _PerPart, receive: _PerPart, across: World
) -> tuple[Tensor, Pairs]:
    """The rows that arrive here from all ranks, and their pairs with the experts of this part."""
    per_part = len(pairs.rows_per_expert_E) // across.size
    key_N = outgoing.row_N * per_part + pairs.expert_N % per_part
    rows_UD, weight_NG, key_N = exchange_packed(
        (x_TD.index_select(0, outgoing.token_U), pairs.weight_GN.t(), key_N),
        [send.rows, send.pairs, send.pairs],
        [receive.rows, receive.pairs, receive.pairs],
        across,
    )
    return rows_UD, _arrived_pairs(key_N, weight_NG, receive, per_part)


def _arrived_pairs(key_N: Tensor, weight_NG: Tensor, receive: _PerPart, per_part: int) -> Pairs:
    """Sorted as pairs are, by expert, then by row; rows are counted over all source ranks."""
    rows_R, pairs_R = torch.tensor([receive.rows, receive.pairs], device=key_N.device)
    first_row_N = (rows_R.cumsum(0) - rows_R).repeat_interleave(pairs_R)
    expert_N, row_N = key_N % per_part, key_N // per_part + first_row_N
    num_rows = sum(receive.rows)
    order_N = (expert_N * max(num_rows, 1) + row_N).argsort()
    return Pairs(
        token_N=row_N[order_N],
        expert_N=expert_N[order_N],
        weight_GN=weight_NG.index_select(0, order_N).t().contiguous(),
        rows_per_expert_E=torch.bincount(expert_N, minlength=per_part),
        num_tokens=num_rows,
    )

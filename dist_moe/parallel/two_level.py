"""The two-level exchange: a token crosses to a node once, however many of its experts live there.

    tokens of rank (node a, local rank i)
      | across nodes, to local rank i of each node b that holds experts of the token: one row per
      |   (token, node), with the list of (row, expert, weight per gate) of its pairs
    tokens of others on rank (b, i)
      | within node b: flat exchange, weights applied on rank (b, i)
    per gate partial sums of this node's experts, on rank (b, i)
      | across nodes, back: one row per (token, node, gate)
    sums over nodes on rank (a, i)

A rank has one peer in every node, the one of its own local rank: what arrives in a node is spread over
its ranks as the tokens are over those of the nodes they come from. Partial sums travel, and are added,
in the precision of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_moe.parallel.exchange import Exchange, FlatExchange, LocalExperts, Mixed
from dist_moe.parallel.packed import exchange_packed
from dist_moe.parallel.world import Levels, ProcessWorld, World
from dist_moe.routing import Pairs


def exchange_over(world: World) -> Exchange:
    """What ``world`` asks for: two levels where its ranks are divided into several nodes, else flat."""
    if world.levels is None or world.levels.across.size == 1:
        return FlatExchange(world)
    return TwoLevelExchange(world.levels)


class TwoLevelExchange:
    """Over a world divided into nodes of equally many ranks, its experts in the order of its ranks.

    A gate whose weights at a node are all exactly 0 gets no row from it, and these weights no gradient:
    the pairs are other gates' (see :class:`Pairs`).
    """

    def __init__(self, levels: Levels) -> None:
        assert isinstance(levels.across, ProcessWorld)
        self._across = levels.across
        self._within = FlatExchange(levels.within)

    def __call__(self, x_TD: Tensor, pairs: Pairs, experts: LocalExperts) -> Mixed:
        outgoing = _group_by_node(pairs, self._across.size)
        counts = _exchange_counts(outgoing, self._across)
        rows_UD, arrived = _to_nodes(x_TD, pairs, outgoing, counts, self._across)
        partial = self._within(rows_UD, arrived, experts)
        wanted_M = _wanted_sums(arrived.weight_GN, arrived.token_N, arrived.num_tokens)
        sums_MF = partial.sums_GTF.flatten(0, 1).index_select(0, wanted_M.gate * arrived.num_tokens + wanted_M.row)
        back_MF = self._across.all_to_all(sums_MF, counts.receive.sums, counts.send.sums)
        num_gates = len(pairs.weight_GN)
        place_M = outgoing.wanted.gate * pairs.num_tokens + outgoing.token_U[outgoing.wanted.row]
        sums_TF = back_MF.new_zeros(num_gates * pairs.num_tokens, back_MF.shape[1]).index_add(0, place_M, back_MF)
        return Mixed(sums_TF.view(num_gates, pairs.num_tokens, back_MF.shape[1]), partial.dtype, partial.rows_computed)


@dataclass(frozen=True)
class _Sums:
    """The M (row, gate) whose partial sums travel back, sorted by row, then by gate."""

    row: Tensor
    gate: Tensor


@dataclass(frozen=True)
class _Outgoing:
    """The U distinct (node, token), sorted so; ``row_N``: of each pair, its place among those of its node."""

    token_U: Tensor
    row_N: Tensor
    wanted: _Sums
    counts_R3: Tensor


@dataclass(frozen=True)
class _PerNode:
    """Host integers: token rows, pairs and sums that belong to each node."""

    rows: list[int]
    pairs: list[int]
    sums: list[int]


@dataclass(frozen=True)
class _Counts:
    send: _PerNode
    receive: _PerNode


def _group_by_node(pairs: Pairs, num_nodes: int) -> _Outgoing:
    tokens = max(pairs.num_tokens, 1)
    node_N = pairs.expert_N // (len(pairs.rows_per_expert_E) // num_nodes)
    key_U, unique_N = torch.unique(node_N * tokens + pairs.token_N, return_inverse=True)
    node_U = key_U // tokens
    rows_R = torch.bincount(node_U, minlength=num_nodes)
    wanted = _wanted_sums(pairs.weight_GN, unique_N, len(key_U))
    counts = [
        rows_R,
        torch.bincount(node_N, minlength=num_nodes),
        torch.bincount(node_U[wanted.row], minlength=num_nodes),
    ]
    return _Outgoing(
        token_U=key_U - node_U * tokens,
        row_N=unique_N - (rows_R.cumsum(0) - rows_R)[node_N],
        wanted=wanted,
        counts_R3=torch.stack(counts, dim=1),
    )


def _wanted_sums(weight_GN: Tensor, row_N: Tensor, num_rows: int) -> _Sums:
    """Known at both ends without a word on the wire: the weights are the same, bit by bit."""
    used_NG = (weight_GN.detach() != 0).t().to(torch.int32)
    used_UG = used_NG.new_zeros(num_rows, len(weight_GN)).index_add(0, row_N, used_NG)
    return _Sums(*used_UG.nonzero(as_tuple=True))


def _exchange_counts(outgoing: _Outgoing, across: World) -> _Counts:
    both = torch.stack([outgoing.counts_R3, across.exchange_counts(outgoing.counts_R3)])
    send, receive = (_PerNode(*of_side.t().tolist()) for of_side in both.cpu())
    return _Counts(send, receive)


def _to_nodes(
    x_TD: Tensor, pairs: Pairs, outgoing: _Outgoing, counts: _Counts, across: ProcessWorld
) -> tuple[Tensor, Pairs]:
    """The rows that arrive here from all nodes, and their pairs with the experts of this node."""
    per_node = len(pairs.rows_per_expert_E) // across.size
    key_N = outgoing.row_N * per_node + pairs.expert_N % per_node
    send, receive = counts.send, counts.receive
    rows_UD, weight_NG, key_N = exchange_packed(
        (x_TD.index_select(0, outgoing.token_U), pairs.weight_GN.t(), key_N),
        [send.rows, send.pairs, send.pairs],
        [receive.rows, receive.pairs, receive.pairs],
        across,
    )
    return rows_UD, _arrived_pairs(key_N, weight_NG, receive, per_node)


def _arrived_pairs(key_N: Tensor, weight_NG: Tensor, receive: _PerNode, per_node: int) -> Pairs:
    """Sorted as pairs are, by expert, then by row; rows are counted over all source nodes."""
    rows_R, pairs_R = torch.tensor([receive.rows, receive.pairs], device=key_N.device)
    first_row_N = (rows_R.cumsum(0) - rows_R).repeat_interleave(pairs_R)
    expert_N, row_N = key_N % per_node, key_N // per_node + first_row_N
    num_rows = sum(receive.rows)
    order_N = (expert_N * max(num_rows, 1) + row_N).argsort()
    return Pairs(
        token_N=row_N[order_N],
        expert_N=expert_N[order_N],
        weight_GN=weight_NG.index_select(0, order_N).t().contiguous(),
        rows_per_expert_E=torch.bincount(expert_N, minlength=per_node),
        num_tokens=num_rows,
    )

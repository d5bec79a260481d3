"""The flat exchange in chunks of local experts: one chunk is computed while its neighbours are on their way.

    forward     send 0 | send 1 | arrive 0, experts 0, return 0 | send 2 | arrive 1, experts 1, return 1 | ... | sums
    backward    the same read from the right, with gradients

Every step that concerns the wire is a node of the autograd graph which takes a number and hands it on. This chain
makes their order, forward and backward, a matter of data: it is the same on all ranks whatever else autograd does.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.kernels import TokenIndex, weighted_scatter
from dist_moe.parallel.dispatch import plan_dispatch, regrouped
from dist_moe.parallel.exchange import LocalExperts, Mixed
from dist_moe.parallel.expert_parts import parts_of
from dist_moe.parallel.meanwhile import Meanwhile, nothing
from dist_moe.parallel.wire import decoded, encoded
from dist_moe.parallel.world import ExchangingWorld, Pending
from dist_moe.routing import Pairs


class OverlappedExchange:
    """As ``FlatExchange``, a row per (token, expert) pair, in ``chunks`` parts of about equally many experts.

    Results are those of the flat exchange to the bit where an expert computes each row by itself; gradients of
    tokens are added up chunk by chunk, so they are equal up to rounding. Costs two more all-to-alls
    each way per further chunk. At most one chunk per local expert is made.
    Raises ValueError unless ``chunks`` >= 1.
    """

    def __init__(self, world: ExchangingWorld, chunks: int) -> None:
        if chunks < 1:
            raise ValueError(f"chunks={chunks}: there is at least one")
        self._world = world
        self._chunks = chunks

    def __call__(self, x_TD: Tensor, pairs: Pairs, experts: LocalExperts, meanwhile: Meanwhile = nothing) -> Mixed:
        plan = plan_dispatch(pairs.rows_per_expert_E, self._world)
        local = len(plan.rows_per_local_expert)
        parts = _parts(local, self._chunks)
        chunks = [_Chunk(part, plan.sent_RL, plan.received_RL) for part in parts]
        experts_of = parts_of(experts, [len(part) for part in parts])
        tokens = pairs.token_N.split([n for of_rank in plan.sent_RL for n in of_rank])
        link = x_TD.new_zeros((), dtype=torch.float32)
        there = [_Trip(self._world, chunk.send, chunk.receive) for chunk in chunks]
        back = [_Trip(self._world, chunk.receive, chunk.send) for chunk in chunks]

        def send(link: Tensor, c: int) -> Tensor:
            token_N = torch.cat([tokens[e] for e in chunks[c].experts])
            return _Leave.apply(x_TD.index_select(0, token_N), link, there[c])

        link = send(link, 0)
        meanwhile()  # autograd works backwards: its gradients are computed while those of chunk 0 travel back
        for c, chunk in enumerate(chunks):
            if c + 1 < len(chunks):
                link = send(link, c + 1)
            arrived_ND, link = _Arrive.apply(link, there[c])
            computed_NF = experts_of[c](regrouped(arrived_ND, chunk.received), chunk.rows_per_expert)
            link = _Leave.apply(regrouped(computed_NF, chunk.received_by_expert), link, back[c])
        blocks: dict[int, Tensor] = {}
        for chunk, trip in zip(chunks, back, strict=True):
            returned_NF, link = _Arrive.apply(link, trip)
            blocks |= zip(chunk.experts, returned_NF.split(chunk.sent), strict=True)
        results_NF = torch.cat([blocks[e] for e in sorted(blocks)])
        sums_GTF = weighted_scatter(results_NF, pairs.weight_GN, TokenIndex.of(pairs.token_N, pairs.num_tokens))
        return Mixed(sums_GTF, results_NF.dtype, sum(plan.receive_rows))


def _parts(count: int, parts: int) -> list[range]:
    """0..count - 1 in at most ``parts`` ranges, none of them empty."""
    parts = min(parts, count)
    bounds = [count * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


class _Chunk:
    """The local experts ``part`` of every rank. ``experts``: their global positions; ``sent``: rows for each."""

    def __init__(self, part: range, sent_RL: list[list[int]], received_RL: list[list[int]]) -> None:
        local = len(received_RL[0])
        self.experts = [rank * local + expert for rank in range(len(sent_RL)) for expert in part]
        sent = [of_rank[part.start : part.stop] for of_rank in sent_RL]
        self.sent = [n for of_rank in sent for n in of_rank]
        self.send = [sum(of_rank) for of_rank in sent]
        self.received = [of_rank[part.start : part.stop] for of_rank in received_RL]
        self.received_by_expert = [list(of_expert) for of_expert in zip(*self.received, strict=True)]
        self.receive = [sum(of_rank) for of_rank in self.received]
        self.rows_per_expert = [sum(of_expert) for of_expert in self.received_by_expert]


class _Trip:
    """Rows on their way, then their gradients on the way back: what leaves at one node arrives at another."""

    def __init__(self, world: ExchangingWorld, send_rows: list[int], receive_rows: list[int]) -> None:
        self.world, self.send_rows, self.receive_rows = world, send_rows, receive_rows
        self.flows = False
        self._under_way: Pending | None = None
        self._like: Tensor | None = None

    def leave(self, x_ND: Tensor, backward: bool = False) -> None:
        form = self.world.wire.gradients if backward else self.world.wire.rows
        sizes = (self.receive_rows, self.send_rows) if backward else (self.send_rows, self.receive_rows)
        self._like = x_ND[:0]
        self._under_way = self.world.begin_exchange(encoded(x_ND, form), *sizes)

    def arrive(self, backward: bool = False) -> Tensor:
        assert self._under_way is not None
        assert self._like is not None
        form = self.world.wire.gradients if backward else self.world.wire.rows
        rows = decoded(self._under_way.wait(), form, self._like)
        self._under_way = None
        return rows


class _Leave(torch.autograd.Function):
    """(rows, link) -> link; where gradients of the rows arrive."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, link: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.flows = ctx.needs_input_grad[0]
        trip.leave(x_ND)
        return link.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, Tensor, None]:
        return ctx.trip.arrive(backward=True) if ctx.trip.flows else None, grad_link, None


class _Arrive(torch.autograd.Function):
    """link -> (rows, link); where gradients of the rows leave."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        x_ND = trip.arrive()
        if not trip.flows:
            ctx.mark_non_differentiable(x_ND)
        return x_ND, link.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor, grad_link: Tensor) -> tuple[Tensor, None]:
        if ctx.trip.flows:
            ctx.trip.leave(grad_ND, backward=True)
        return grad_link, None

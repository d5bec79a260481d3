"""The flat exchange in chunks of local experts: one chunk is computed while its neighbours are on their way.

    forward     send 0 | send 1 | arrive 0, experts 0, return 0 | send 2 | arrive 1, experts 1, return 1 | ... | sums
    backward    the same read from the right, with gradients

Where the chunks are at each moment, if there are three:

    moment                   on the way there    in the experts    on the way back
    send 0                   0
    send 1                   0, 1
    arrive 0, experts 0      1                   0
    return 0                 1                                     0
    send 2                   1, 2                                  0
    arrive 1, experts 1      2                   1                 0
    return 1                 2                                     0, 1
    arrive 2, experts 2                          2                 0, 1
    return 2                                                       0, 1, 2

A chunk on its way has two buffers: the rows that are sent, dropped when they are awaited, and those that are received,
which the experts then take, or the weighted sums at the end.

Every step that concerns the wire is a node of the autograd graph which takes a number and hands it on. This chain
makes their order, forward and backward, a matter of data: it is the same on all ranks whatever else autograd does.
Without it, the backward nodes of two chunks would be independent, and autograd could begin chunk 1 on a rank while
another rank begins chunk 0: two collectives of one group in different orders, which wait for each other for ever.
"""

from __future__ import annotations

from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from dist_moe.kernels import RowCounts, TokenIndex, rows_of_tokens, weighted_scatter
from dist_moe.parallel.exchange import (
    LocalExperts,
    Meanwhile,
    Mixed,
    TimedExperts,
    nothing,
    plan_dispatch,
    regrouped,
)
from dist_moe.parallel.wire import decoded, encoded
from dist_moe.parallel.world import Pending, World
from dist_moe.routing import Pairs


class OverlappedExchange:
    """A flat exchange, a row per (token, expert) pair, in ``chunks`` parts of about equally many experts.

    Results are those of ``FlatExchange`` to the bit where an expert computes each row by itself; gradients of
    tokens are added up chunk by chunk, so they are equal up to rounding. Costs two more all-to-alls
    each way per further chunk. At most one chunk per local expert is made.
    Raises ValueError unless ``chunks`` >= 1.
    """

    def __init__(self, world: World, chunks: int) -> None:
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
        tokens = pairs.token_N.split(list(chain(*plan.sent_RL)))
        link = x_TD.new_zeros((), dtype=torch.float32)
        there = [_Trip(self._world, chunk.send, chunk.receive) for chunk in chunks]
        back = [_Trip(self._world, chunk.receive, chunk.send) for chunk in chunks]

        def send(link: Tensor, c: int) -> Tensor:
            token_N = torch.cat([tokens[e] for e in chunks[c].experts])
            return _Leave.apply(rows_of_tokens(x_TD, TokenIndex.of(token_N, len(x_TD))), link, there[c])

        link = send(link, 0)
        meanwhile()  # autograd works backwards: its gradients are computed while those of chunk 0 travel back
        for c, chunk in enumerate(chunks):
            # The next chunk leaves before this one is awaited: it travels while the experts of this one compute.
            if c + 1 < len(chunks):
                link = send(link, c + 1)
            arrived_ND, link = _Arrive.apply(link, there[c])
            rows_per_expert = plan.rows_per_local_expert[chunk.part.start : chunk.part.stop]
            computed_NF = experts_of[c](regrouped(arrived_ND, chunk.received), rows_per_expert)
            link = _Leave.apply(regrouped(computed_NF, chunk.received_by_expert), link, back[c])
        # Awaited last and in order; the first chunks have been back for long. Their rows are sorted by chunk and
        # expert, those of ``pairs`` by expert alone.
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
        self.part, local = part, len(received_RL[0])
        self.experts = [rank * local + expert for rank in range(len(sent_RL)) for expert in part]
        sent = [of_rank[part.start : part.stop] for of_rank in sent_RL]
        self.sent = list(chain(*sent))
        self.send = list(map(sum, sent))
        self.received = [of_rank[part.start : part.stop] for of_rank in received_RL]
        self.received_by_expert = list(zip(*self.received, strict=True))
        self.receive = list(map(sum, self.received))


class _Trip:
    """Rows on their way, then their gradients on the way back: what leaves at one node arrives at another.

        forward     _Leave --- begin_exchange ... wait ---> _Arrive
        backward    _Leave <--- wait ... begin_exchange --- _Arrive

    ``flows``: whether gradients of the rows are wanted; where no rank's tokens learn, nothing travels back.
    """

    def __init__(self, world: World, send_rows: list[int], receive_rows: list[int]) -> None:
        self._world, self._sizes, self._sizes_back = world, (send_rows, receive_rows), (receive_rows, send_rows)
        self.flows = False
        self._under_way: Pending | None = None
        self._like: Tensor | None = None

    def leave(self, x_ND: Tensor, backward: bool = False) -> None:
        """Begin to send rows, or their gradients, in the format of the wire; counted in the traffic."""
        world, wire = self._world, self._world.options.wire
        sizes = self._sizes_back if backward else self._sizes
        sent = encoded(x_ND, wire.gradients if backward else wire.rows)
        self._like = x_ND[:0]
        self._under_way = world.begin_exchange(sent, *sizes)
        world.traffic.add(sent, sizes[0], world.rank, world.node_of_rank)

    def arrive(self, backward: bool = False) -> Tensor:
        """Wait for what :meth:`leave` began, and return it in the dtype it had there."""
        assert self._under_way is not None
        assert self._like is not None
        wire = self._world.options.wire
        rows = decoded(self._under_way.wait(), wire.gradients if backward else wire.rows, self._like)
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


def parts_of(experts: LocalExperts, sizes: list[int]) -> list[LocalExperts]:
    """Return the first ``sizes[0]`` local experts, the next ``sizes[1]``, ...: each takes its own rows and counts.

    The parameters of a bank, whose axis 0 is the expert, are split once: the gradients of the parts are then put
    side by side, without a full stack of gradients for each part. Where that is not possible (another callable, or
    parameters that are sharded until the bank is called) each part is the whole bank with no rows for the rest, whose
    gradients are added up.
    """
    if isinstance(experts, TimedExperts):
        return [TimedExperts(experts.clock, part) for part in parts_of(experts.inner, sizes)]
    if isinstance(experts, nn.Module) and all(len(p) == sum(sizes) for p in experts.parameters()):
        pieces = {name: p.split(sizes) for name, p in experts.named_parameters()}

        def piece(i: int, x_ND: Tensor, rows_per_expert: RowCounts) -> Tensor:
            weights = {name: split[i] for name, split in pieces.items()}
            result: Tensor = functional_call(experts, weights, (x_ND, rows_per_expert))
            return result

        return [partial(piece, i) for i in range(len(sizes))]

    def alone(i: int, x_ND: Tensor, rows_per_expert: RowCounts) -> Tensor:
        before, after = sum(sizes[:i]), sum(sizes[i + 1 :])
        if isinstance(rows_per_expert, Tensor):
            return experts(x_ND, F.pad(rows_per_expert, (before, after)))
        return experts(x_ND, [0] * before + rows_per_expert + [0] * after)

    return [partial(alone, i) for i in range(len(sizes))]

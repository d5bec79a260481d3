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
brought: counts before rows, rows across before rows within, sums within before sums across. A rank without tokens takes
part in each with zero rows. Tokens and the lists of their pairs, which do not need each other, go together in one
all-to-all, forward and backward: two exchanges would be two nodes of the autograd graph, and nothing but autograd's own
order would say which comes first on which rank. If two ranks disagreed, each would wait in one collective for a rank
that waits in the other. One Function has one place in the order:

    forward, rank a to rank b     | tokens for b | their weights | their keys |       as bytes
    backward, rank b to rank a    | gradients of tokens | gradients of weights |      integers have none
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.kernels import TokenIndex, rows_of_tokens, sums_at
from dist_moe.parallel.exchange import Exchange, FlatExchange, LocalExperts, Meanwhile, Mixed, nothing
from dist_moe.parallel.overlapped import OverlappedExchange
from dist_moe.parallel.wire import decoded, encoded
from dist_moe.parallel.world import ExchangeOptions, Levels, ProcessWorld, SingleWorld, Traffic, World
from dist_moe.routing import Pairs

Splits = list[list[int]]
"""splits[p][r]: rows of tensor p for, or from, rank r."""


def exchange_over(
    world: World, recompute_experts: bool = False, meanwhile: bool = False, at_once: bool = False
) -> Exchange:
    """Return the exchange that ``world`` asks for: in two levels where its ranks are divided into several nodes, else
    flat; overlapped with the experts if ``overlap_chunks`` > 1. Raises ValueError where these exclude each other.

    ``recompute_experts``: see ``FlatExchange``; with two levels, what arrives at a rank is kept. ``meanwhile``:
    there will be something to compute while rows travel; the flat exchange, if no experts are computed again, is
    then one that travels beside it. ``at_once``: the experts must see all of their rows at once, and once: nothing is
    overlapped with them, and they cannot be computed again.
    """
    chunks, levels = 1 if at_once else world.options.overlap_chunks, world.levels
    if at_once and recompute_experts:
        raise ValueError("experts whose rows depend on each other cannot be computed again for the backward pass")
    if isinstance(world, SingleWorld):
        return FlatExchange(world, recompute_experts)
    if chunks > 1 and (recompute_experts or levels is not None):
        raise ValueError("an overlapped exchange has neither two levels nor experts that are computed again")
    if levels is not None and levels.across.size > 1:
        return two_level_exchange(levels, recompute_experts)
    if chunks > 1 or (meanwhile and not (recompute_experts or at_once)):
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
        across, num_parts = self._across, self._across.size
        per_part = len(pairs.rows_per_expert_E) // num_parts

        # The U distinct (part, token), sorted so; ``row_N``: of each pair, its row among those of its part.
        tokens = max(pairs.num_tokens, 1)
        part_N = pairs.expert_N // per_part
        key_U, unique_N = torch.unique(part_N * tokens + pairs.token_N, return_inverse=True)
        part_U, token_U = key_U // tokens, key_U % tokens
        rows_R = torch.bincount(part_U, minlength=num_parts)
        row_N = unique_N - (rows_R.cumsum(0) - rows_R)[part_N]
        wanted_row_M, wanted_gate_M = _wanted_sums(pairs.weight_GN, unique_N, len(key_U))

        # Per part the numbers of token rows, of pairs and of sums; on the host, which makes the buffers.
        pairs_R, sums_R = (torch.bincount(part, minlength=num_parts) for part in (part_N, part_U[wanted_row_M]))
        counts_R3, ones = torch.stack([rows_R, pairs_R, sums_R], dim=1), [1] * num_parts
        both = torch.stack([counts_R3, across.exchange(counts_R3, ones, ones)]).cpu()
        (rows, lists, sums), (rows_here, lists_here, sums_here) = (of_side.t().tolist() for of_side in both)

        # Tokens and the lists of their pairs: (row, expert) as one key, and the weights.
        rows_UD = rows_of_tokens(x_TD, TokenIndex.of(token_U, pairs.num_tokens))
        rows_UD, weight_NG, key_N = exchange_packed(
            (rows_UD, pairs.weight_GN.t(), row_N * per_part + pairs.expert_N % per_part),
            [rows, lists, lists],
            [rows_here, lists_here, lists_here],
            across,
        )

        # The pairs that arrived, sorted as pairs are, by expert, then by row; rows are counted over all source ranks.
        rows_here_R, lists_here_R = torch.tensor([rows_here, lists_here], device=key_N.device)
        first_row_N = (rows_here_R.cumsum(0) - rows_here_R).repeat_interleave(lists_here_R)
        expert_N, row_N = key_N % per_part, key_N // per_part + first_row_N
        num_rows = sum(rows_here)
        order_N = (expert_N * max(num_rows, 1) + row_N).argsort()
        arrived = Pairs(
            token_N=row_N[order_N],
            expert_N=expert_N[order_N],
            weight_GN=weight_NG.index_select(0, order_N).t().contiguous(),
            rows_per_expert_E=torch.bincount(expert_N, minlength=per_part),
            num_tokens=num_rows,
        )
        partial = self._inside(rows_UD, arrived, experts)

        # Back travel the sums that are wanted, and are added up by gate and token.
        row_M, gate_M = _wanted_sums(arrived.weight_GN, arrived.token_N, num_rows)
        sums_MF = partial.sums_GTF.flatten(0, 1).index_select(0, gate_M * num_rows + row_M)
        back_MF = across.all_to_all(sums_MF, sums_here, sums)
        gates, place_M = len(pairs.weight_GN), wanted_gate_M * pairs.num_tokens + token_U[wanted_row_M]
        sums_GTF = sums_at(back_MF, place_M, gates * pairs.num_tokens).unflatten(0, (gates, pairs.num_tokens))
        return Mixed(sums_GTF, partial.dtype, partial.rows_computed)


def _wanted_sums(weight_GN: Tensor, row_N: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The M (row, gate) whose sums travel back, sorted by row, then by gate; the weights tell both ends the same."""
    used_NG = (weight_GN.detach() != 0).t().to(torch.int32)
    used_UG = used_NG.new_zeros(num_rows, len(weight_GN)).index_add(0, row_N, used_NG)
    row_M, gate_M = used_UG.nonzero(as_tuple=True)
    return row_M, gate_M


def exchange_packed(tensors: tuple[Tensor, ...], sends: Splits, receives: Splits, world: World) -> tuple[Tensor, ...]:
    """Return the row blocks that arrive of every tensor: ``sends[p][r]`` rows of ``tensors[p]`` go to rank r.

    Differentiable by the floating-point tensors; gradients travel back in one all-to-all, too. In the
    traffic only rows of ``tensors[0]`` count as rows; the bytes of all count. These rows, and no other tensor,
    travel in the format of the world's wire.
    """
    return _Packed.apply(sends, receives, world, *tensors)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sends: Splits, receives: Splits, world: World, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sends, ctx.receives, ctx.world = sends, receives, world
        ctx.flows = ctx.needs_input_grad[3:]
        form = world.options.wire.rows
        sent = (encoded(tensors[0], form), *tensors[1:])
        rows, *lists = _exchange_bytes(sent, sends, receives, world)
        received = (decoded(rows, form, tensors[0]), *lists)
        _count(sent, sends, world, first=0)
        ctx.mark_non_differentiable(*(x for x, flow in zip(received, ctx.flows, strict=True) if not flow))
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places = [p for p, flow in enumerate(ctx.flows) if flow]
        form = ctx.world.options.wire.gradients
        flowing = tuple(encoded(grads[p], form) if p == 0 else grads[p] for p in places)
        sends, receives = [ctx.receives[p] for p in places], [ctx.sends[p] for p in places]
        back = dict(zip(places, _exchange_bytes(flowing, sends, receives, ctx.world), strict=True))
        if 0 in back:
            back[0] = decoded(back[0], form, grads[0])
        _count(flowing, sends, ctx.world, first=places[0])
        return None, None, None, *(back.get(p) for p in range(len(grads)))


def _exchange_bytes(tensors: tuple[Tensor, ...], sends: Splits, receives: Splits, world: World) -> tuple[Tensor, ...]:
    """Exchange the tensors as bytes: what a rank gets is, of every tensor in turn, its block."""
    widths = [x.shape[1:].numel() * x.element_size() for x in tensors]
    # In one row with the stride 1 that a view as bytes needs, and axes of size 1 need not have.
    flat = [x.contiguous().as_strided((x.numel(),), (1,)) for x in tensors]
    blocks = [
        numbers.view(torch.uint8).view(len(x), width).split(send)
        for x, numbers, width, send in zip(tensors, flat, widths, sends, strict=True)
    ]
    packed = torch.cat([block.flatten() for of_rank in zip(*blocks, strict=True) for block in of_rank])
    sent, got = _byte_splits(sends, widths), _byte_splits(receives, widths)
    parts = world.exchange(packed, [sum(s) for s in sent], [sum(g) for g in got]).split([n for g in got for n in g])
    return tuple(
        torch.cat(parts[p :: len(tensors)]).view(x.dtype).view(sum(receives[p]), *x.shape[1:])
        for p, x in enumerate(tensors)
    )


def _byte_splits(splits: Splits, widths: list[int]) -> list[list[int]]:
    """[rank][tensor]: bytes."""
    return [[n * width for n, width in zip(of_rank, widths, strict=True)] for of_rank in zip(*splits, strict=True)]


def _count(tensors: tuple[Tensor, ...], sends: Splits, world: World, first: int) -> None:
    """``first``: the place of ``tensors[0]`` among all; the tensor at place 0 holds the token rows."""
    for place, (x, send) in enumerate(zip(tensors, sends, strict=True), start=first):
        world.traffic.add(x, send, world.rank, world.node_of_rank, are_tokens=place == 0)


def ranks_per_node(node_of_rank: Sequence[int]) -> int | None:
    """Return m if the ranks are whole blocks of m, each block on a node of its own; None if they are not."""
    size = len(node_of_rank)
    per_node = size // len(set(node_of_rank))
    blocks = [node_of_rank[start : start + per_node] for start in range(0, size, per_node)]
    alike = all(len(set(block)) == 1 for block in blocks)
    return per_node if alike and len(blocks) == len(set(node_of_rank)) else None


def open_levels(
    worlds: Iterable[Sequence[int]],
    per_node: int,
    traffic: Traffic,
    options: ExchangeOptions | None = None,
    timeout: timedelta | None = None,
) -> Levels:
    """Open the levels of worlds that are divided into nodes of ``per_node`` ranks, and return those of this rank.

    ``worlds``: the (global) ranks of every world of the job that is divided so, this rank's among them, the
    same list on all ranks, for every rank takes part in opening every group. Groups of one rank are not opened.
    ``traffic``, ``options``: those of this rank's world. Collective over all ranks of the job.
    """
    rank = dist.get_rank()
    levels: dict[str, World] = {}
    for ranks in worlds:
        nodes = [ranks[start : start + per_node] for start in range(0, len(ranks), per_node)]
        for level, members in [("within", node) for node in nodes] + [
            ("across", peers) for peers in zip(*nodes, strict=True)
        ]:
            group = dist.new_group(list(members), timeout=timeout) if len(members) > 1 else None
            if rank in members:
                node_of_rank = range(len(members)) if level == "across" else None
                levels[level] = (
                    SingleWorld(traffic)
                    if group is None
                    else ProcessWorld(group, node_of_rank, traffic, options=options)
                )
    return Levels(**levels)

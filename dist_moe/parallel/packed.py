"""Several ragged tensors in one all-to-all, forward and backward: one collective, in one fixed place.

Two exchanges that do not depend on each other would be two nodes of the autograd graph, and nothing but
autograd's own order would say which comes first on which rank. If two ranks disagree, each waits in one collective
for a rank that waits in the other. One Function has one place in the order, forward and backward.

    forward, rank a to rank b     | tokens for b | their weights | their keys |       as bytes
    backward, rank b to rank a    | gradients of tokens | gradients of weights |      integers have none
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.parallel.wire import decoded, encoded
from dist_moe.parallel.world import World

Splits = list[list[int]]
"""splits[p][r]: rows of tensor p for, or from, rank r."""


def exchange_packed(tensors: tuple[Tensor, ...], sends: Splits, receives: Splits, world: World) -> tuple[Tensor, ...]:
    """Send row blocks of every tensor to their ranks: ``sends[p][r]`` rows of ``tensors[p]`` go to rank r.

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
    blocks = [
        _flat(x).view(torch.uint8).view(len(x), width).split(send)
        for x, width, send in zip(tensors, widths, sends, strict=True)
    ]
    packed = torch.cat([block.flatten() for of_rank in zip(*blocks, strict=True) for block in of_rank])
    sent, got = _byte_splits(sends, widths), _byte_splits(receives, widths)
    parts = world.exchange(packed, [sum(s) for s in sent], [sum(g) for g in got]).split([n for g in got for n in g])
    return tuple(
        torch.cat(parts[p :: len(tensors)]).view(x.dtype).view(sum(receives[p]), *x.shape[1:])
        for p, x in enumerate(tensors)
    )


def _flat(x: Tensor) -> Tensor:
    """Return all numbers in one row, with the stride 1 that a view as bytes needs and axes of size 1 need not have."""
    return x.contiguous().as_strided((x.numel(),), (1,))


def _byte_splits(splits: Splits, widths: list[int]) -> list[list[int]]:
    """[rank][tensor]: bytes."""
    return [[n * width for n, width in zip(of_rank, widths, strict=True)] for of_rank in zip(*splits, strict=True)]


def _count(tensors: tuple[Tensor, ...], sends: Splits, world: World, first: int) -> None:
    """``first``: the place of ``tensors[0]`` among all; the tensor at place 0 holds the token rows."""
    for place, (x, send) in enumerate(zip(tensors, sends, strict=True), start=first):
        world.traffic.add(x, send, world.rank, world.node_of_rank, are_tokens=place == 0)

"""Where the ranks of the job live, and sums over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.parallel.world import ProcessWorld, SingleWorld, World

_world_here: ContextVar[World | None] = ContextVar("world_here", default=None)


def job() -> World:
    """The world of all ranks of the job, whose rank this is.

    Within ``EmulatedWorld.run`` the emulated ranks; otherwise all processes of ``torch.distributed``;
    without a process group, or in one of a single process, this rank alone.
    """
    if (emulated := _world_here.get()) is not None:
        return emulated
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        assert dist.group.WORLD is not None
        return ProcessWorld(dist.group.WORLD)
    return SingleWorld()


@contextmanager
def job_is(world: World) -> Iterator[None]:
    """Within, and in this thread only, ``world`` is the job."""
    before = _world_here.set(world)
    try:
        yield
    finally:
        _world_here.reset(before)


def several_ranks() -> bool:
    """Whether this is one of several ranks of a job."""
    return job().size > 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of ``x`` over all ranks of the job, on every rank; with one rank, no collective is issued."""
    return job().sum(x)


def added_over_ranks(x: Tensor) -> Tensor:
    """:func:`sum_over_ranks`, differentiable: a rank's ``x`` gets the gradients that the sum has on all ranks.

    Whoever adds the ranks' losses gets the true gradient. Backward is a collective too.
    """
    world = job()
    return x if world.size == 1 else _Added.apply(x, world)


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.world.sum(grad.contiguous()), None

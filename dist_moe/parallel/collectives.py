"""The world in which this code runs, and collectives over all of its ranks; with one rank, none is issued."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dist_moe.parallel.world import ProcessWorld, SingleWorld, World

T = TypeVar("T")

_world_in_use: ContextVar[World | None] = ContextVar("world_in_use", default=None)


def current_world() -> World:
    """Return the world of all ranks of the job: this process or thread is one of them.

    Within :func:`use_world` (and so within ``EmulatedWorld.run``) the world given there; otherwise all processes of
    ``torch.distributed``; without a process group, or in one of a single process, this rank alone.
    """
    if (world := _world_in_use.get()) is not None:
        return world
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        assert dist.group.WORLD is not None
        return ProcessWorld(dist.group.WORLD)
    return SingleWorld()


@contextmanager
def use_world(world: World) -> Iterator[None]:
    """Make ``world`` the current one inside the block, in this thread only."""
    before = _world_in_use.set(world)
    try:
        yield
    finally:
        _world_in_use.reset(before)


def several_ranks() -> bool:
    """Whether the job has more than one rank."""
    return current_world().size > 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over all ranks, on every rank; not differentiable."""
    return current_world().sum(x)


def max_over_ranks(x: Tensor) -> Tensor:
    """Return the elementwise maximum of ``x`` over all ranks, on every rank, NaN where any rank has one; not
    differentiable."""
    # Not the backends' own reduction, which may lose a NaN: a comparison with it is false.
    return torch.stack(current_world().gather(x)).amax(dim=0)


def added_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over all ranks, differentiably: the gradient of a rank's ``x`` is the sum of the
    gradients that the result gets on all ranks.

    Whoever adds the ranks' losses gets the true gradient. Backward is a collective too.
    """
    world = current_world()
    return x if world.size == 1 else _Added.apply(x, world)


def gather_columns(x_CN: Tensor, width: int) -> Tensor:
    """Return the (C, N) blocks of all ranks side by side, in rank order; each is padded with 0 to ``width`` columns.

    With one rank the block is returned as it is.
    """
    world = current_world()
    return x_CN if world.size == 1 else torch.cat(world.gather(F.pad(x_CN, (0, width - x_CN.shape[1]))), dim=1)


def gather_objects(mine: T) -> list[T]:
    """Return every rank's (small, picklable) object, in rank order, on every rank."""
    return current_world().gather_objects(mine)


def wait_for_all() -> None:
    """Wait until every rank has come here."""
    current_world().barrier()


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.world.sum(grad.contiguous()), None

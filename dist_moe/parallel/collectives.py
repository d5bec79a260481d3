"""Where the ranks of the job live, and sums over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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

"""World: where ranks live, and the collectives they need; the current world, and collectives over all of its ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dist_moe.parallel.objects import object_bytes, object_of
from dist_moe.parallel.phase_clock import PhaseClock
from dist_moe.parallel.wire import RowFormat, Wire, decoded, encoded

T = TypeVar("T")


@dataclass
class Traffic:
    """Rows and bytes that this rank has sent to other ranks, forward and backward; rows it keeps are not counted.

    ``rows``, ``bytes``: to any other rank. ``rows_across_nodes``, ``bytes_across_nodes``: the part of them
    that went to another node; the rest stayed in the node.
    """

    rows: int = 0
    bytes: int = 0
    rows_across_nodes: int = 0
    bytes_across_nodes: int = 0

    def add(
        self,
        x: Tensor,
        send_rows: list[int],
        rank: int,
        node_of_rank: Sequence[int] | None = None,
        *,
        are_tokens: bool = True,
    ) -> None:
        """Count ``send_rows[r]`` rows of ``x`` that went from ``rank`` to rank r.

        ``node_of_rank``: None is one node for all. ``are_tokens=False``: metadata beside the token rows (lists of
        indices, weights), of which bytes are counted but no rows.
        """
        away, across = sum(send_rows) - send_rows[rank], 0
        if node_of_rank is not None:
            here = node_of_rank[rank]
            across = sum(rows for rows, node in zip(send_rows, node_of_rank, strict=True) if node != here)
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        self.bytes += away * row_bytes
        self.bytes_across_nodes += across * row_bytes
        if are_tokens:
            self.rows += away
            self.rows_across_nodes += across

    def counts(self) -> dict[str, int]:
        """Return the four numbers under the names by which a run records them."""
        return {
            "wire_rows": self.rows,
            "wire_bytes": self.bytes,
            "wire_rows_across_nodes": self.rows_across_nodes,
            "wire_bytes_across_nodes": self.bytes_across_nodes,
        }

    def reset(self) -> None:
        """Set all four numbers to 0."""
        self.rows = self.bytes = self.rows_across_nodes = self.bytes_across_nodes = 0


@dataclass(frozen=True)
class ExchangeOptions:
    """Options of the exchange of token rows over a world; the same on every rank.

    ``wire``: how rows are rounded while they travel. ``overlap_chunks``: parts, by expert, in which rows travel, so
    that one is computed while another is on its way.
    """

    wire: Wire = field(default_factory=Wire)
    overlap_chunks: int = 1


class World(ABC):
    """``size`` ranks that share the experts; this process is ``rank``. Counts its ``traffic``.

    ``node_of_rank``: the node on which each rank lives; None is one node for all. ``levels``: the same
    ranks by node, where token rows are to cross from node to node once; None exchanges them rank to rank.
    ``options``: see :class:`ExchangeOptions`. ``clock``: times the layers of this world, if it is started.

    Every method is a collective, which all ranks call in the same order. Only :meth:`all_to_all` is differentiable.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        node_of_rank: Sequence[int] | None = None,
        traffic: Traffic | None = None,
        *,
        levels: Levels | None = None,
        options: ExchangeOptions | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.node_of_rank = node_of_rank
        self.traffic = traffic or Traffic()
        self.levels = levels
        self.options = options or ExchangeOptions()
        self.clock = PhaseClock()

    def all_to_all(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """Exchange token rows along axis 0: ``send_rows[r]`` of them go to rank r, ``receive_rows[r]`` come from it.

        Differentiable: gradients travel back on the same way. Rows and gradients are rounded as ``options.wire``
        says, and counted in ``traffic``.
        """
        wire = self.options.wire
        return _AllToAll.apply(x_ND, send_rows, receive_rows, self, wire.rows, wire.gradients)

    @abstractmethod
    def exchange(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """Exchange rows of any dtype as :meth:`all_to_all` does, but values only: not rounded, not counted."""

    def begin_exchange(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Pending:
        """Begin an :meth:`exchange`, whose rows may still be under way on return."""
        return Pending(self.exchange(x_ND, send_rows, receive_rows))

    @abstractmethod
    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over all ranks."""

    @abstractmethod
    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's ``x``, which has the same shape on every rank."""

    @abstractmethod
    def gather(self, x: Tensor) -> list[Tensor]:
        """Return every rank's ``x``, of the same shape everywhere, in rank order."""

    def gather_objects(self, x: T) -> list[T]:
        """Return a copy of every rank's small object, in rank order; see :mod:`dist_moe.parallel.objects`.

        Raises TypeError for an object that has no text of its own kind.
        """
        mine = torch.frombuffer(bytearray(object_bytes(x)), dtype=torch.uint8)
        lengths = [int(n) for n in torch.cat(self.gather(torch.tensor([len(mine)]))).tolist()]
        padded = self.gather(F.pad(mine, (0, max(lengths) - len(mine))))
        return [object_of(x_B[:length].numpy().tobytes()) for x_B, length in zip(padded, lengths, strict=True)]

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank has come here."""


@dataclass(frozen=True)
class Levels:
    """``across``: this rank and its peers of the same local rank, one of each node, in node order.
    ``within``: the ranks of this node. Both count into the traffic of the world that they divide."""

    across: World
    within: World


@dataclass
class Pending:
    """Rows that arrive in ``received_ND``; ``work``: the collective that brings ``sent_ND``, if it still runs."""

    received_ND: Tensor
    sent_ND: Tensor | None = None
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """Return the rows. On a GPU the current stream waits for them, not the host."""
        if self.work is not None:
            self.work.wait()
        self.sent_ND = None
        return self.received_ND


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks in format ``form``. Its backward is itself, the way back, in ``form_back``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        send_rows: list[int],
        receive_rows: list[int],
        world: World,
        form: RowFormat | None,
        form_back: RowFormat | None,
    ) -> Tensor:
        ctx.way_back = receive_rows, send_rows, world, form_back, form
        sent = encoded(x_ND, form)
        received = world.exchange(sent, send_rows, receive_rows)
        world.traffic.add(sent, send_rows, world.rank, world.node_of_rank)
        return decoded(received, form, x_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return _AllToAll.apply(grad_ND, *ctx.way_back), None, None, None, None, None


class SingleWorld(World):
    """A world of one rank: nothing is exchanged and no collective is issued."""

    def __init__(self, traffic: Traffic | None = None) -> None:
        super().__init__(rank=0, size=1, traffic=traffic)

    def all_to_all(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """Return the rows as they are: not rounded, not counted."""
        return x_ND

    def exchange(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """Return the rows as they are."""
        return x_ND

    def sum(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """Return ``x`` alone."""
        return [x]

    def gather_objects(self, x: T) -> list[T]:
        """Return a copy of ``x`` alone; raises TypeError for whatever several ranks could not exchange."""
        return [object_of(object_bytes(x))]

    def barrier(self) -> None:
        """Return at once."""


class ProcessWorld(World):
    """The ranks of a ``torch.distributed`` process group, on any backend."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        node_of_rank: Sequence[int] | None = None,
        traffic: Traffic | None = None,
        *,
        levels: Levels | None = None,
        options: ExchangeOptions | None = None,
    ) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        super().__init__(rank, size, node_of_rank, traffic, levels=levels, options=options)
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessWorld:
        """Return itself: a copy of a layer is on the same rank, and process groups cannot be copied."""
        return self

    def exchange(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """Exchange rows by one all-to-all."""
        received_ND = x_ND.new_empty(sum(receive_rows), *x_ND.shape[1:])
        dist.all_to_all_single(received_ND, x_ND.contiguous(), receive_rows, send_rows, group=self.group)
        return received_ND

    def begin_exchange(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Pending:
        """Begin an all-to-all that goes on beside what this rank computes."""
        received_ND, sent_ND = x_ND.new_empty(sum(receive_rows), *x_ND.shape[1:]), x_ND.contiguous()
        work = dist.all_to_all_single(received_ND, sent_ND, receive_rows, send_rows, group=self.group, async_op=True)
        return Pending(received_ND, sent_ND, work)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum by an all-reduce of a copy."""
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def broadcast(self, x: Tensor) -> Tensor:
        """Return a copy of rank 0's ``x``."""
        taken = x.detach().contiguous().clone()
        dist.broadcast(taken, group=self.group, group_src=0)
        return taken

    def gather(self, x: Tensor) -> list[Tensor]:
        """Return copies by an all-gather."""
        mine = x.detach().contiguous()
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyones, mine, group=self.group)
        return everyones

    def barrier(self) -> None:
        """Wait at the barrier of the process group."""
        dist.barrier(self.group)


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
    """Return whether the job has more than one rank."""
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
    """Return every rank's small object, in rank order, on every rank; see :mod:`dist_moe.parallel.objects`."""
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

"""World: where the ranks of an expert-parallel group live, and the collectives they need."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.parallel.phase_clock import PhaseClock
from dist_moe.parallel.wire import RowFormat, Wire, decoded, encoded


@dataclass
class Traffic:
    """What this rank has sent to other ranks, forward and backward; rows it keeps are not counted.

    ``rows``, ``bytes``: to any other rank. ``rows_across_nodes``, ``bytes_across_nodes``: the part of them
    that went to another node; the rest stayed in the node.
    """

    rows: int = 0
    bytes: int = 0
    rows_across_nodes: int = 0
    bytes_across_nodes: int = 0

    def add(self, x: Tensor, send_rows: list[int], rank: int, node_of_rank: Sequence[int] | None = None) -> None:
        """``send_rows[r]`` rows of ``x`` went from ``rank`` to rank r; without ``node_of_rank``, in one node."""
        away, across = self._add_bytes(x, send_rows, rank, node_of_rank)
        self.rows += away
        self.rows_across_nodes += across

    def add_bytes(self, x: Tensor, send_rows: list[int], rank: int, node_of_rank: Sequence[int] | None = None) -> None:
        """The same for what is no token row, such as a list of indices and weights: bytes only."""
        self._add_bytes(x, send_rows, rank, node_of_rank)

    def _add_bytes(
        self, x: Tensor, send_rows: list[int], rank: int, node_of_rank: Sequence[int] | None
    ) -> tuple[int, int]:
        """Rows that left the rank, and those that left its node."""
        away, across = _leaving(send_rows, rank, node_of_rank)
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        self.bytes += away * row_bytes
        self.bytes_across_nodes += across * row_bytes
        return away, across

    def counts(self) -> dict[str, int]:
        """The four numbers under the names by which a run records them."""
        return {
            "wire_rows": self.rows,
            "wire_bytes": self.bytes,
            "wire_rows_across_nodes": self.rows_across_nodes,
            "wire_bytes_across_nodes": self.bytes_across_nodes,
        }

    def reset(self) -> None:
        self.rows = self.bytes = self.rows_across_nodes = self.bytes_across_nodes = 0


def _leaving(send_rows: list[int], rank: int, node_of_rank: Sequence[int] | None) -> tuple[int, int]:
    """Rows that leave the rank, and those of them that leave its node."""
    away = sum(send_rows) - send_rows[rank]
    if node_of_rank is None:
        return away, 0
    here = node_of_rank[rank]
    return away, sum(rows for rows, node in zip(send_rows, node_of_rank, strict=True) if node != here)


class World(ABC):
    """``size`` ranks that share the experts; this process is ``rank``. Counts its ``traffic``.

    ``node_of_rank``: the node on which each rank lives; None is one node for all. ``levels``: the same
    ranks by node, where token rows are to cross from node to node once; None exchanges them rank to rank.
    ``wire``: how rows are rounded while they travel. ``clock``: times the layers of this world, if it is started.
    ``overlap_chunks``: parts in which rows travel, so that one is computed while another is on its way.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        node_of_rank: Sequence[int] | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.node_of_rank = node_of_rank
        self.traffic = traffic or Traffic()
        self.levels: Levels | None = None
        self.wire = Wire()
        self.clock = PhaseClock()
        self.overlap_chunks = 1

    def use_wire(self, wire: Wire) -> None:
        """From now on rows travel so, between the ``levels`` too. The same on every rank."""
        self.wire = wire
        for level in (self.levels.across, self.levels.within) if self.levels is not None else ():
            level.use_wire(wire)

    @abstractmethod
    def exchange_counts(self, counts_RE: Tensor) -> Tensor:
        """Row r of ``counts_RE`` goes to rank r; row r of the result came from rank r."""

    @abstractmethod
    def all_to_all(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """Ragged exchange of rows along axis 0, differentiable: ``send_rows[r]`` rows go to rank r."""

    @abstractmethod
    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks, on every rank; not differentiable."""

    @abstractmethod
    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's ``x``, of the same shape everywhere, on every rank; not differentiable."""

    @abstractmethod
    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's ``x``, of the same shape everywhere, in rank order, on every rank; not differentiable."""


@dataclass(frozen=True)
class Levels:
    """``across``: this rank and its peers of the same local rank, one of each node, in node order.
    ``within``: the ranks of this node. Both count into the traffic of the world that they divide."""

    across: World
    within: World


class SingleWorld(World):
    """A world of one rank: nothing is exchanged and no collective is issued."""

    def __init__(self, traffic: Traffic | None = None) -> None:
        super().__init__(rank=0, size=1, traffic=traffic)

    def exchange_counts(self, counts_RE: Tensor) -> Tensor:
        return counts_RE

    def all_to_all(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        return x_ND

    def sum(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        return [x]


class ExchangingWorld(World):
    """A world in which rows really travel. Autograd sends their gradients back on the same way."""

    def all_to_all(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        return _AllToAll.apply(x_ND, send_rows, receive_rows, self)

    def carry(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int], form: RowFormat | None) -> Tensor:
        """The exchange of values in a format of the wire."""
        return decoded(self.exchange_rows(encoded(x_ND, form), send_rows, receive_rows), form, x_ND)

    def begin_exchange(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Pending:
        """:meth:`exchange_rows`, begun but perhaps not ended. All ranks begin theirs in the same order."""
        return Pending(self.exchange_rows(x_ND, send_rows, receive_rows))

    def exchange_rows(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """The exchange of :meth:`all_to_all`, of values only; counted in ``traffic``."""
        received_ND = self.move(x_ND, send_rows, receive_rows)
        self.traffic.add(x_ND, send_rows, self.rank, self.node_of_rank)
        return received_ND

    @abstractmethod
    def move(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """The exchange alone: neither differentiable nor counted."""


@dataclass
class Pending:
    """Rows that arrive in ``received_ND``; ``work``: the collective that brings ``sent_ND``, if it still runs."""

    received_ND: Tensor
    sent_ND: Tensor | None = None
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """The rows. On a GPU the current stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        self.sent_ND = None
        return self.received_ND


class ProcessWorld(ExchangingWorld):
    """The ranks of a ``torch.distributed`` process group, on any backend."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        node_of_rank: Sequence[int] | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), node_of_rank, traffic)
        self.group = group

    def exchange_counts(self, counts_RE: Tensor) -> Tensor:
        received_RE = torch.empty_like(counts_RE)
        dist.all_to_all_single(received_RE, counts_RE.contiguous(), group=self.group)
        return received_RE

    def sum(self, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def broadcast(self, x: Tensor) -> Tensor:
        taken = x.detach().contiguous().clone()
        dist.broadcast(taken, group=self.group, group_src=0)
        return taken

    def gather(self, x: Tensor) -> list[Tensor]:
        mine = x.detach().contiguous()
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyones, mine, group=self.group)
        return everyones

    def begin_exchange(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Pending:
        received_ND, sent_ND = x_ND.new_empty(sum(receive_rows), *x_ND.shape[1:]), x_ND.contiguous()
        work = dist.all_to_all_single(received_ND, sent_ND, receive_rows, send_rows, group=self.group, async_op=True)
        self.traffic.add(x_ND, send_rows, self.rank, self.node_of_rank)
        return Pending(received_ND, sent_ND, work)

    def move(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        received_ND = x_ND.new_empty(sum(receive_rows), *x_ND.shape[1:])
        dist.all_to_all_single(received_ND, x_ND.contiguous(), receive_rows, send_rows, group=self.group)
        return received_ND


class _AllToAll(torch.autograd.Function):
    """Gradients travel back along the way on which the rows came."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, send_rows: list[int], receive_rows: list[int], world: ExchangingWorld
    ) -> Tensor:
        ctx.send_rows, ctx.receive_rows, ctx.world = send_rows, receive_rows, world
        return world.carry(x_ND, send_rows, receive_rows, world.wire.rows)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        world = ctx.world
        return world.carry(grad_ND, ctx.receive_rows, ctx.send_rows, world.wire.gradients), None, None, None


def experts_of_rank(num_experts: int, world: World) -> range:
    """Global ids of the experts that live on this rank: contiguous, the same number on each rank.

    Raises ValueError when ``num_experts`` is not divisible by the size of the world.
    """
    if num_experts % world.size:
        raise ValueError(f"num_experts={num_experts} is not divisible by the {world.size} ranks of its world")
    per_rank = num_experts // world.size
    return range(world.rank * per_rank, (world.rank + 1) * per_rank)

"""The process groups of a job, all ranks, expert-parallel (EP) and expert-data-parallel (EDP), and its nodes."""

from __future__ import annotations

import gc
import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import groupby
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field

from dist_moe.config.settings import LARGEST_COUNT, Settings
from dist_moe.engine.deepspeed.config import import_deepspeed
from dist_moe.engine.launch.environment import LaunchEnvironment, launched_ranks_per_node
from dist_moe.engine.launch.meeting import on_own_interface, store_of_this_attempt
from dist_moe.engine.launch.transport import agree_on_transport
from dist_moe.errors import UserError
from dist_moe.parallel import (
    WIRES,
    ExchangeOptions,
    ProcessWorld,
    SingleWorld,
    Traffic,
    WireName,
    World,
    gather_objects,
    open_levels,
    ranks_per_node,
)

_YEAR_S = 31_536_000
_SHORTEST_STALL_S = 1.0
_NODE_NUMBER = ("GROUP_RANK", "CROSS_RANK")
"""Set by torchrun and TorchX; by DeepSpeed's launcher. They tell nodes apart even where host names are equal."""


class ParallelConfig(Settings):
    """The division of the ranks: world = expert-parallel size x expert-data-parallel size."""

    expert_parallel_size: int = Field(
        1,
        ge=1,
        le=LARGEST_COUNT,
        description="ranks over which the experts of a layer are split; divides the world and experts",
    )
    exchange: Literal["auto", "flat", "two_level"] = Field(
        "auto",
        description="how tokens reach their experts: flat sends a row per (token, expert) from rank to rank, two_level "
        "a row per (token, node), spread inside the node; auto is two_level where experts are split over several "
        "nodes with several ranks each, else flat",
    )
    ranks_per_node: int | None = Field(
        None,
        ge=1,
        description="take every that many consecutive ranks for a node, whatever machines they run on; divides the "
        "world (null: the nodes that the launcher started)",
    )
    wire_dtype: WireName | None = Field(
        None,
        description="how the exchange rounds tokens, results and their gradients while they travel: bf16, or fp8_e4m3 "
        "with a scale per row (gradients then in bf16); null sends them as they are",
    )
    overlap_chunks: int = Field(
        1,
        ge=1,
        description="parts, by expert, in which tokens travel, so that one is computed while another is on its way "
        "(1: all at once); above 1 the exchange is flat",
    )
    elastic: bool = Field(
        False,
        description="where expert_parallel_size does not divide the number of ranks, as after the loss of a machine, "
        "split the experts over the most ranks that do (false: refuse)",
    )
    timeout_s: int = Field(600, ge=1, le=_YEAR_S, description="seconds after which a collective that waits is an error")
    stall_s: float | None = Field(
        None,
        ge=0,
        description="seconds without any progress of a rank after which the job ends and the message names the rank "
        "(null: half of timeout_s; 0: never). Must exceed what a single evaluation batch or checkpoint file takes",
    )

    @property
    def stall_limit_s(self) -> float:
        """Seconds without progress that end the job; 0 for no watchdog."""
        return self.timeout_s / 2 if self.stall_s is None else self.stall_s

    def fitted(self, world_size: int) -> ParallelConfig:
        """Return this configuration for ``world_size`` ranks: itself, unless it does not fit and is ``elastic``."""
        divisors = (self.expert_parallel_size, self.ranks_per_node or 1)
        fits = all(world_size % divisor == 0 for divisor in divisors)
        return self if fits or not self.elastic else self.nearest_for(world_size)

    def check(self, world_size: int, num_experts: int, called: str | None = None) -> None:
        """Raise UserError unless the sizes divide each other; needs no process group.

        ``called``: how a message names the number of experts (None: ``model.num_experts``).
        """
        size = self.expert_parallel_size
        field = f"parallel.expert_parallel_size={size}"
        if world_size % size:
            allowed = _divisors(world_size, num_experts)
            raise UserError(
                f"{field} does not divide the {world_size} rank(s) of this job; allowed: {allowed}, or "
                f"parallel.elastic=true, which takes the largest of them by itself"
            )
        if num_experts % size:
            allowed = _divisors(world_size, num_experts)
            raise UserError(
                f"{field} does not divide {called or f'model.num_experts={num_experts}'}; allowed: {allowed}"
            )
        self._check_nodes(world_size)
        if 0 < self.stall_limit_s < _SHORTEST_STALL_S:
            raise UserError(
                f"parallel.stall_s={self.stall_limit_s:g} (null: half of parallel.timeout_s={self.timeout_s}) is "
                f"shorter than steps may take; give at least {_SHORTEST_STALL_S:g}, or 0 for no watchdog"
            )
        if self.stall_limit_s >= self.timeout_s:
            raise UserError(
                f"parallel.stall_s={self.stall_limit_s:g} must be below parallel.timeout_s={self.timeout_s}, or the "
                f"timeout of a collective comes first, which cannot tell who stalled"
            )

    def _check_nodes(self, world_size: int) -> None:
        per_node, size = self.ranks_per_node, self.expert_parallel_size
        if per_node is not None and world_size % per_node:
            allowed = _divisors(world_size, world_size)
            raise UserError(
                f"parallel.ranks_per_node={per_node} does not divide the {world_size} rank(s) of this job; "
                f"allowed: {allowed}"
            )
        if self.exchange == "two_level" and self.overlap_chunks > 1:
            raise UserError(
                f"parallel.overlap_chunks={self.overlap_chunks} does not go with parallel.exchange=two_level; choose "
                "parallel.overlap_chunks=1, or parallel.exchange=flat"
            )
        per_node = per_node or launched_ranks_per_node()
        if self.exchange == "two_level" and per_node and size % per_node and per_node % size:
            raise UserError(_uneven_nodes(size, f"{per_node} rank(s) per node"))

    def ranks_per_level(self, nodes: Sequence[Sequence[int]]) -> int | None:
        """Return the ranks per node in a two-level exchange; None for a flat one.

        ``nodes``: for every expert-parallel group the nodes of its ranks. Raises UserError if two levels are
        asked for and the groups are not all of whole nodes of the same size, or all within a node.
        """
        divisions = {ranks_per_node(of_group) for of_group in nodes}
        per_node = divisions.pop() if len(divisions) == 1 else None
        if self.exchange == "two_level" and per_node is None:
            raise UserError(_uneven_nodes(self.expert_parallel_size, f"the nodes of its ranks, {list(nodes)}"))
        if (
            self.exchange == "flat"
            or self.overlap_chunks > 1
            or per_node is None
            or per_node == self.expert_parallel_size
        ):
            return None
        return per_node if per_node > 1 or self.exchange == "two_level" else None

    def nearest_for(self, world_size: int) -> ParallelConfig:
        """Return the nearest configuration for another number of ranks, for a run that is to be looked at there."""
        even = self.ranks_per_node is not None and world_size % self.ranks_per_node == 0
        return self.model_copy(
            update={
                "expert_parallel_size": math.gcd(world_size, self.expert_parallel_size),
                "exchange": "auto" if self.exchange == "two_level" else self.exchange,
                "ranks_per_node": self.ranks_per_node if even else None,
            }
        )


def _uneven_nodes(expert_parallel_size: int, nodes: str) -> str:
    return (
        f"parallel.exchange=two_level needs groups of whole nodes, or groups within a node: "
        f"parallel.expert_parallel_size={expert_parallel_size} does not fit {nodes}; "
        f"choose a multiple or a divisor, or parallel.exchange=auto"
    )


def _divisors(world_size: int, num_experts: int) -> str:
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0 and num_experts % n == 0]
    return ", ".join(map(str, sizes))


@dataclass(frozen=True)
class ProcessGroups:
    """The open groups of a job, as this rank sees them.

    ``world``: the expert-parallel world of this rank. ``node_of_rank``: for every rank of the job the number of its
    node, from 0 in the order of ranks: as the launcher says, or as ``parallel.ranks_per_node`` pretends.
    ``copy``, ``copies``: which of the copies of its experts this rank holds, and how many ranks hold one.
    ``transport``: what tensors travel by, and why, in words. ``timeout``: of every collective of every group.
    """

    environment: LaunchEnvironment
    expert_parallel_size: int
    world: World
    node_of_rank: Sequence[int] = (0,)
    copy: int = 0
    copies: int = 1
    transport: str = ""
    timeout: timedelta = timedelta(minutes=10)

    @property
    def ranks_per_node(self) -> int:
        """The largest m such that every m consecutive ranks of each expert-parallel group share a node."""
        neighbours = [len(list(ranks)) for _, ranks in groupby(self.node_of_rank)]
        return math.gcd(self.expert_parallel_size, *neighbours)

    @property
    def device(self) -> torch.device:
        """The device on which this rank computes."""
        return self.environment.device

    @property
    def expert_group_name(self) -> str:
        """DeepSpeed's key for the expert groups of this size."""
        return f"ep_size_{self.expert_parallel_size}"


@contextmanager
def process_groups(
    environment: LaunchEnvironment, config: ParallelConfig, store: dist.Store | None = None
) -> Iterator[ProcessGroups]:
    """Open all groups, through DeepSpeed so that its engine knows them; close them at the end.

    ``store``: by which the ranks of ``environment`` find one another; None: as the launcher says.

    Raises UserError, on all ranks, if a two-level exchange is asked for on nodes that it does not fit, and LaunchError
    if the ranks do not find one another.
    """
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
    timeout, rank, size = timedelta(seconds=config.timeout_s), environment.rank, environment.world_size
    if store is None:
        store = store_of_this_attempt(environment, timeout)
    transport = agree_on_transport(environment, store)
    with on_own_interface():
        dist.init_process_group(transport.backend, timeout=timeout, store=store, rank=rank, world_size=size)
        try:
            yield replace(_expert_groups(environment, config, timeout), transport=transport.why, timeout=timeout)
        finally:
            import_deepspeed().comm.destroy_process_group()
            gc.collect()  # engines are cycles, and hold the groups' threads and sockets until they are collected


def _expert_groups(environment: LaunchEnvironment, config: ParallelConfig, timeout: timedelta) -> ProcessGroups:
    deepspeed = import_deepspeed()
    expert_parallel_size = config.expert_parallel_size
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    # DeepSpeed opens every group through this, also those of its engines, each with the backend's own timeout.
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=timeout)
    groups = deepspeed.utils.groups
    name = f"ep_size_{expert_parallel_size}"
    groups._create_expert_and_data_parallel(expert_parallel_size)
    ep_group = groups._get_expert_parallel_group(name)
    edp_group = groups._get_expert_data_parallel_group(name)
    node_of_rank = _node_of_every_rank(config.ranks_per_node)
    world = _expert_world(config, ep_group, node_of_rank) if expert_parallel_size > 1 else SingleWorld()
    copy, copies = dist.get_rank(edp_group), dist.get_world_size(edp_group)
    return ProcessGroups(environment, expert_parallel_size, world, node_of_rank, copy, copies)


def _expert_world(config: ParallelConfig, ep_group: dist.ProcessGroup, node_of_rank: Sequence[int]) -> ProcessWorld:
    """Return the world of this rank's experts, divided into nodes where the exchange is to have two levels."""
    size = config.expert_parallel_size
    groups = [range(start, start + size) for start in range(0, len(node_of_rank), size)]
    nodes = [[node_of_rank[rank] for rank in group] for group in groups]
    per_node, traffic = config.ranks_per_level(nodes), Traffic()
    options = ExchangeOptions(WIRES[config.wire_dtype], config.overlap_chunks)
    levels = None
    if per_node is not None:
        levels = open_levels(groups, per_node, traffic, options, timedelta(seconds=config.timeout_s))
    return ProcessWorld(ep_group, nodes[dist.get_rank() // size], traffic, levels=levels, options=options)


def _node_of_every_rank(ranks_per_node: int | None) -> list[int]:
    """Return for every rank of the job the number of its node, from 0 in the order of ranks.

    ``ranks_per_node``: nodes of that many consecutive ranks, wherever they run; None asks all ranks for the
    name of their node, in one collective.
    """
    if ranks_per_node is not None:
        return [rank // ranks_per_node for rank in range(dist.get_world_size())]
    numbers = [os.environ[name] for name in _NODE_NUMBER if name in os.environ]
    names = gather_objects(numbers[0] if numbers else socket.gethostname())
    in_order = list(dict.fromkeys(names))
    return [in_order.index(name) for name in names]

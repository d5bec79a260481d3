"""The process groups of a job: all ranks, the expert-parallel (EP) and expert-data-parallel (EDP) ones."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from pydantic import Field

from dist_moe.engine.deepspeed_setup import import_deepspeed
from dist_moe.engine.launch_environment import LaunchEnvironment
from dist_moe.errors import UserError
from dist_moe.parallel import ProcessWorld, SingleWorld, World
from dist_moe.settings import Settings


class ParallelConfig(Settings):
    """How the ranks are divided: world = expert-parallel size x expert-data-parallel size."""

    expert_parallel_size: int = Field(
        1,
        ge=1,
        description="ranks over which the experts of a layer are split; divides the world and experts",
    )
    timeout_s: int = Field(600, ge=1, description="seconds after which a collective that waits is an error")

    def check(self, world_size: int, num_experts: int) -> None:
        """Raise UserError unless the sizes divide each other; needs no process group."""
        size = self.expert_parallel_size
        field = f"parallel.expert_parallel_size={size}"
        if world_size % size:
            allowed = _divisors(world_size, num_experts)
            raise UserError(f"{field} does not divide the {world_size} rank(s) of this job; allowed: {allowed}")
        if num_experts % size:
            allowed = _divisors(world_size, num_experts)
            raise UserError(f"{field} does not divide model.num_experts={num_experts}; allowed: {allowed}")


def _divisors(world_size: int, num_experts: int) -> str:
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0 and num_experts % n == 0]
    return ", ".join(map(str, sizes))


@dataclass(frozen=True)
class ProcessGroups:
    """``world``: the expert-parallel world of this rank. ``is_expert_writer``: whether this rank is
    the one that speaks for its experts where several ranks hold copies of them."""

    environment: LaunchEnvironment
    expert_parallel_size: int
    world: World
    is_expert_writer: bool

    @property
    def device(self) -> torch.device:
        return self.environment.device

    @property
    def expert_group_name(self) -> str:
        """DeepSpeed's key for the expert groups of this size."""
        return f"ep_size_{self.expert_parallel_size}"


@contextmanager
def process_groups(environment: LaunchEnvironment, config: ParallelConfig) -> Iterator[ProcessGroups]:
    """Open all groups, through DeepSpeed so that its engine knows them; close them at the end."""
    _init_torch(environment, config)
    try:
        yield _expert_groups(environment, config.expert_parallel_size)
    finally:
        import_deepspeed().comm.destroy_process_group()
        gc.collect()  # engines are cycles, and hold the groups' threads and sockets until they are collected


def _init_torch(environment: LaunchEnvironment, config: ParallelConfig) -> None:
    if environment.device.type == "cuda":
        torch.cuda.set_device(environment.device)
    backend = environment.backend
    timeout = timedelta(seconds=config.timeout_s)
    if environment.launched:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def _expert_groups(environment: LaunchEnvironment, expert_parallel_size: int) -> ProcessGroups:
    deepspeed = import_deepspeed()
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    groups = deepspeed.utils.groups
    name = f"ep_size_{expert_parallel_size}"
    groups._create_expert_and_data_parallel(expert_parallel_size)
    ep_group = groups._get_expert_parallel_group(name)
    edp_rank = dist.get_rank(groups._get_expert_data_parallel_group(name))
    world = ProcessWorld(ep_group) if expert_parallel_size > 1 else SingleWorld()
    return ProcessGroups(environment, expert_parallel_size, world, edp_rank == 0)

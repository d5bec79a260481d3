"""Data parallelism by others around a layer, torch's DDP and FSDP: which ranks it averages over, and of what.

Such a wrapper averages gradients over its ranks. Those of experts that are split over R of these ranks are sums over
the R ranks' losses already, when the exchange has brought them back, and must be averaged only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_moe.kernels import RowCounts
from dist_moe.parallel.world import ProcessWorld, World


def ddp_around(world: World) -> DistributedDataParallel | None:
    """Return the DDP in whose forward pass this is, if it averages over other ranks of ``world``."""
    ddp = DistributedDataParallel._active_ddp_module
    return ddp if ddp is not None and _shares_ranks(dist.get_process_group_ranks(ddp.process_group), world) else None


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether ``module`` is part of what FSDP, ``fully_shard`` or the older class, manages."""
    return getattr(module, "_is_fsdp_managed_module", False) is True


def is_fully_sharded_alone(module: nn.Module) -> bool:
    """Return whether ``module`` was given to ``fully_shard`` by itself, not as a part of another."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import; without it nothing has been given to it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def shares_rows(parameter: Tensor, world: World) -> bool:
    """Return whether ``parameter`` is a DTensor that is spread over other ranks of ``world``."""
    mesh = getattr(parameter, "device_mesh", None)  # only a DTensor has one
    return mesh is not None and _shares_ranks(mesh.mesh.flatten().tolist(), world)


def replica_group(world: World, group: dist.ProcessGroup | None = None) -> dist.ProcessGroup | None:
    """Return the ranks of ``group`` (None: all) that hold copies of this rank's experts; None if no other does.

    Those in the same place of their expert-parallel worlds. Collective over ``group``, the first time.
    """
    size = dist.get_world_size(group)
    if size == world.size:
        return None
    known: dict[Any, dist.ProcessGroup] = vars(world).setdefault("_replica_groups", {})
    if group not in known:
        known[group] = _new_replica_group(world, group, size)
    return known[group]


def _new_replica_group(world: World, group: dist.ProcessGroup | None, size: int) -> dist.ProcessGroup:
    places = [torch.zeros(1, dtype=torch.int64, device=device_of(group)) for _ in range(size)]
    dist.all_gather(places, torch.full_like(places[0], world.rank), group=group)
    members = [rank for rank, place in enumerate(places) if int(place) == world.rank]
    whole = group or dist.group.WORLD
    assert whole is not None
    ranks = [dist.get_global_rank(whole, rank) for rank in members]
    return dist.new_group(ranks, use_local_synchronization=True)


def ranks_of_job() -> int:
    """Return the number of processes of ``torch.distributed``; 1 without."""
    return dist.get_world_size() if dist.is_initialized() else 1


def averaged_experts(experts: Callable[[Tensor, RowCounts], Tensor], ranks: int) -> Callable[..., Tensor]:
    """Return ``experts`` whose parameters get their gradients divided by ``ranks``; rows keep theirs.

    What comes back through the experts is divided, and what leaves them towards the rows multiplied again.
    """

    def averaged(x_ND: Tensor, rows_per_expert: RowCounts) -> Tensor:
        inside = _ScaledGradient.apply(x_ND, float(ranks))
        return _ScaledGradient.apply(experts(inside, rows_per_expert), 1.0 / ranks)

    return averaged


class _ScaledGradient(torch.autograd.Function):
    """The identity; its gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _shares_ranks(ranks: list[int], world: World) -> bool:
    if not isinstance(world, ProcessWorld):
        return False
    return len(set(ranks) & set(dist.get_process_group_ranks(world.group))) > 1


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Return the kind of device whose tensors the collectives of ``group`` take."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

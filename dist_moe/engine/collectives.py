"""Collectives over all ranks of the job; with one rank, none is issued."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")


def gather_columns(x_CN: Tensor, width: int) -> Tensor:
    """(C, N) blocks of all ranks side by side, in rank order; every block is padded to ``width``."""
    if dist.get_world_size() == 1:
        return x_CN
    padded = F.pad(x_CN, (0, width - x_CN.shape[1])).contiguous()
    blocks = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(blocks, padded)
    return torch.cat(blocks, dim=1)


def gather_objects(mine: T) -> list[T]:
    """Every rank's (small, picklable) object, in rank order, on every rank."""
    if dist.get_world_size() == 1:
        return [mine]
    everyones = [mine] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


def wait_for_all() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()

"""Whether there are several ranks at all, and sums over all of them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Whether this process is one of several ranks of a job."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of ``x`` over all ranks of the job, on every rank; with one rank, no collective is issued."""
    if not several_ranks():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total

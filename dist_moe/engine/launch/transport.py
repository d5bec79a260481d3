"""The choice of the transport between ranks: NCCL where each has a GPU of its own, gloo everywhere else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_moe.config.files import json_line, parse_json
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import LaunchError

GPU_BACKEND = "nccl"


@dataclass(frozen=True)
class Transport:
    """``backend``: of every process group, for ``torch.distributed``. ``why``: in words, with its name."""

    backend: str
    why: str


def agree_on_transport(environment: LaunchEnvironment, store: dist.Store) -> Transport:
    """Return how tensors travel, which all ranks of ``store`` decide together by the identity of their GPUs.

    Every rank may see one GPU alone, whose number says nothing then. Raises LaunchError, on all ranks, if some ranks
    have a GPU and others none.
    """
    store.set(f"gpu-of-rank-{environment.rank}", _identity(environment.device))
    if environment.is_rank_zero:
        names = [f"gpu-of-rank-{rank}" for rank in range(environment.world_size)]
        store.set("gpus", json_line([store.get(name).decode() for name in names]))
    return choose_transport(parse_json(store.get("gpus")))


def _identity(device: torch.device) -> str:
    """Return a name that no other GPU of any machine has; '' for a CPU."""
    return "" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


def choose_transport(gpu_of_rank: Sequence[str]) -> Transport:
    """Return how tensors travel between ranks with these GPUs, '' for none; see :func:`agree_on_transport`."""
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank, gpu in enumerate(gpu_of_rank):
        ranks_of[gpu].append(rank)
    without = ranks_of.pop("", [])
    if not ranks_of:
        return Transport("gloo", "gloo: no rank has a GPU")
    if without:
        raise LaunchError(
            f"rank(s) {_listed(without)} see no GPU, {len(gpu_of_rank) - len(without)} other(s) do: give every rank "
            f"one (CUDA_VISIBLE_DEVICES, --gpus-per-task), or hide them from all by CUDA_VISIBLE_DEVICES=''"
        )
    gpu, sharing = max(ranks_of.items(), key=lambda item: len(item[1]))
    if len(sharing) > 1:
        why = f"gloo, by way of the host: ranks {_listed(sharing)} share the GPU {gpu}, which NCCL refuses"
        return Transport("gloo", why)
    # Numbers about the run are on the host now and then: every group takes those as well.
    return Transport(f"cpu:gloo,cuda:{GPU_BACKEND}", f"NCCL: each of the {len(gpu_of_rank)} rank(s) has its own GPU")


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")

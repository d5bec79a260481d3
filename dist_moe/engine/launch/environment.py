"""What the launcher says: rank and world size from the environment, one process without any."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dist_moe.errors import UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_RANKS_OF_THIS_MACHINE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's name for it, the deepspeed launcher's


@dataclass(frozen=True)
class LaunchEnvironment:
    """``rank`` of ``world_size`` processes, ``local_rank`` on its machine.

    ``launched``: whether a launcher (torchrun, deepspeed, TorchX) started this process.
    ``local_world_size``: ranks on its machine; 0 where the launcher does not say.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False
    local_world_size: int = 0

    @classmethod
    def read(cls) -> LaunchEnvironment:
        """From RANK, WORLD_SIZE and LOCAL_RANK; UserError if only some of them are set or are wrong."""
        if not any(name in os.environ for name in _VARIABLES[:2]):
            return cls()
        rank, world_size, local_rank = (_integer(name) for name in _VARIABLES)
        if not 0 <= rank < world_size:
            raise UserError(f"RANK={rank} is not in 0..{world_size - 1} (WORLD_SIZE={world_size})")
        told = next((name for name in _RANKS_OF_THIS_MACHINE if name in os.environ), None)
        return cls(rank, world_size, local_rank, launched=True, local_world_size=_integer(told) if told else 0)

    @property
    def device(self) -> torch.device:
        """This process's GPU, by local rank, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @property
    def shares_gpu(self) -> bool:
        """Whether this machine has GPUs, but fewer than ranks."""
        return torch.cuda.is_available() and self.local_world_size > torch.cuda.device_count()

    @property
    def backend(self) -> str:
        """What the ranks exchange over: NCCL refuses two ranks on one GPU; gloo takes a GPU's tensors too, by
        way of the host."""
        return "nccl" if self.device.type == "cuda" and not self.shares_gpu else "gloo"

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


def _integer(name: str) -> int:
    value = os.environ.get(name)
    if value is None or not value.isdigit():
        raise UserError(
            f"environment variable {name}={value!r} is not a number, though a launcher set others of "
            f"{', '.join(_VARIABLES)}; start with torchrun, deepspeed or torchx, or with none of them set"
        )
    return int(value)

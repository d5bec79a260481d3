"""What the launcher says: rank and world size from the environment, one process without any."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dist_moe.errors import UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class LaunchEnvironment:
    """``rank`` of ``world_size`` processes, ``local_rank`` on its machine.

    ``launched``: whether a launcher (torchrun, deepspeed, TorchX) started this process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launched: bool = False

    @classmethod
    def read(cls) -> LaunchEnvironment:
        """From RANK, WORLD_SIZE and LOCAL_RANK; UserError if only some of them are set or are wrong."""
        if not any(name in os.environ for name in _VARIABLES[:2]):
            return cls()
        rank, world_size, local_rank = (_integer(name) for name in _VARIABLES)
        if not 0 <= rank < world_size:
            raise UserError(f"RANK={rank} is not in 0..{world_size - 1} (WORLD_SIZE={world_size})")
        return cls(rank, world_size, local_rank, launched=True)

    @property
    def device(self) -> torch.device:
        """This process's GPU, by local rank, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def _integer(name: str) -> int:
    value = os.environ.get(name)
    if value is None or not value.isdigit():
        raise UserError(
            f"environment variable {name}={value!r} is not a number, though a launcher set others of "
            f"{', '.join(_VARIABLES)}; start with torchrun, deepspeed or torchx, or with none of them set"
        )
    return int(value)

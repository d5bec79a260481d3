"""The launcher's variables (rank, world size, ranks per node; one process without any), signals, and memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from dist_moe.errors import UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""Set by torchrun and TorchX; by DeepSpeed's launcher."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER_TRIM = 2**31 - 1
_GROW_BY = 64 * 2**20


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process: ``rank`` of ``world_size``, ``local_rank`` on its machine.

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
        """Read RANK, WORLD_SIZE and LOCAL_RANK; UserError if only some of them are set or are wrong."""
        if not any(name in os.environ for name in _VARIABLES[:2]):
            return cls()
        rank, world_size, local_rank = (_integer(name) for name in _VARIABLES)
        if not 0 <= rank < world_size:
            raise UserError(f"RANK={rank} is not in 0..{world_size - 1} (WORLD_SIZE={world_size})")
        return cls(rank, world_size, local_rank, launched=True, local_world_size=launched_ranks_per_node() or 0)

    @property
    def device(self) -> torch.device:
        """This process's GPU, by local rank, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @property
    def backend(self) -> str:
        """The backend of ``torch.distributed``: NCCL, but gloo where ranks share a GPU, which NCCL refuses; gloo takes
        a GPU's tensors too, by way of the host."""
        shares_gpu = self.local_world_size > torch.cuda.device_count()
        return "nccl" if self.device.type == "cuda" and not shares_gpu else "gloo"

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def _integer(name: str) -> int:
    value = os.environ.get(name)
    if value is None or not value.isdigit():
        raise UserError(
            f"environment variable {name}={value!r} is not a number, though a launcher set others of "
            f"{', '.join(_VARIABLES)}; start with torchrun, deepspeed or torchx, or with none of them set"
        )
    return int(value)


def launched_ranks_per_node() -> int | None:
    """Return how many ranks the launcher started on this node; None if it does not say.

    Raises UserError if it says something that is no number above 0.
    """
    for name in _RANKS_HERE:
        value = os.environ.get(name)
        if value is not None:
            if not value.isdigit() or int(value) == 0:
                raise UserError(f"environment variable {name}={value!r} is not a number of ranks; unset it")
            return int(value)
    return None


class StopRequest:
    """A wish that training ends at the next safe place. ``signal_number``: the signal that asked, 0 while none has."""

    def __init__(self) -> None:
        self.signal_number = 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number == signal.SIGINT == number:
            raise KeyboardInterrupt  # asked twice at the keyboard: stop now, without a checkpoint
        self.signal_number = number


@contextmanager
def handling_signals(handlers: Mapping[int, Callable[[int, FrameType | None], Any] | int]) -> Iterator[None]:
    """Handle signals by ``handlers`` inside the block; outside, they do what they did before."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take SIGTERM and SIGINT inside the block for such a wish."""
    request = StopRequest()
    with handling_signals(dict.fromkeys((signal.SIGTERM, signal.SIGINT), request._remember)):
        yield request


def disable_malloc_trim() -> bool:
    """Ask glibc to reuse freed memory, for the rest of the process; False where there is no glibc.

    A step allocates and frees the same large tensors again and again. By default glibc maps each of them
    anew, and every page of it is faulted in and zeroed by the kernel again: where page faults are dear
    (virtual machines, sandboxes) that can cost more than the arithmetic.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER_TRIM), (_M_TOP_PAD, _GROW_BY))
    return min(mallopt(option, value) for option, value in options) == 1

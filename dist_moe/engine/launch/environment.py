"""The launcher's variables (rank, world size, ranks per node; one process without any), and memory."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_moe.errors import LaunchError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""Set by torchrun and TorchX; by DeepSpeed's launcher."""

EMULATED = "DIST_MOE_EMULATED"
"""Set in ranks that ``dist-moe train --emulate R`` has started: R."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER_TRIM = 2**31 - 1
_GROW_BY = 64 * 2**20


def typed_command() -> list[str]:
    """Return the words that were typed to start this process, or the emulation that it is a rank of.

    Our own command has its name alone, wherever it lies and however it was started.
    """
    program, *words = sys.argv
    path = Path(program)
    if path.name == "dist-moe" or path.parts[-2:] == ("dist_moe", "__main__.py"):
        program = "dist-moe"
    ranks = os.environ.get(EMULATED)
    return [program, *words[:1], "--emulate", ranks, *words[1:]] if ranks and words else [program, *words]


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
        """Read the launcher's variables; LaunchError if only some are set, are wrong or contradict each other."""
        _check_threads()
        if not any(name in os.environ for name in _VARIABLES[:2]):
            _allow_open_files(1)
            return cls()
        rank, world_size, local_rank = (_integer(name) for name in _VARIABLES)
        if not 0 <= rank < world_size:
            raise LaunchError(f"RANK={rank} is not in 0..{world_size - 1} (WORLD_SIZE={world_size})")
        here = launched_ranks_per_node() or 0
        if here and not (local_rank < here <= world_size):
            raise LaunchError(
                f"LOCAL_RANK={local_rank}, {_name_of_ranks_here()}={here} and WORLD_SIZE={world_size} contradict each "
                f"other: a machine has no more ranks than the job, and numbers its own from 0"
            )
        if any(name in os.environ for name in _MEETING):
            meeting_point()
        _allow_open_files(world_size)
        return cls(rank, world_size, local_rank, launched=True, local_world_size=here)

    @property
    def device(self) -> torch.device:
        """This process's GPU, by local rank among those that it sees, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def _number(text: str) -> int | None:
    """Return the number that plain digits write; None if they are none, or one that no launcher would give."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _integer(name: str) -> int:
    value = os.environ.get(name)
    number = None if value is None else _number(value)
    if number is None:
        raise LaunchError(
            f"environment variable {name}={value!r} is not a number, though a launcher set others of "
            f"{', '.join(_VARIABLES)}; start with torchrun, deepspeed or torchx, or with none of them set"
        )
    return number


def launched_ranks_per_node() -> int | None:
    """Return how many ranks the launcher started on this node; None if it does not say.

    Raises LaunchError if it says something that is no number above 0.
    """
    name = _name_of_ranks_here()
    if name is None:
        return None
    number = _number(os.environ[name])
    if not number:
        raise LaunchError(f"environment variable {name}={os.environ[name]!r} is not a number of ranks; unset it")
    return number


def _name_of_ranks_here() -> str | None:
    return next((name for name in _RANKS_HERE if name in os.environ), None)


def all_ranks_are_here() -> bool:
    """Return whether every rank of the job runs on this machine, as far as the launcher says."""
    environment = LaunchEnvironment.read()
    return environment.world_size in (1, environment.local_world_size)


def meeting_point() -> tuple[str, int]:
    """Return the address and port at which the launcher wants the ranks to meet.

    Raises LaunchError if it names none, or a port that there cannot be.
    """
    address, port = (os.environ.get(name, "").strip() for name in _MEETING)
    if not address:
        raise LaunchError(
            "environment variable MASTER_ADDR is missing or empty: it names the machine of rank 0; torchrun, deepspeed "
            "and torchx set it"
        )
    number = _number(port)
    if number is None or not 0 < number < 2**16:
        raise LaunchError(
            f"environment variable MASTER_PORT={port!r} is not a port, a number from 1 to 65535: it is where rank 0 "
            f"listens at MASTER_ADDR={address}; torchrun, deepspeed and torchx set it"
        )
    return address, number


def _check_threads() -> None:
    """Raise LaunchError for a number of threads that OpenMP would silently take for another."""
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if text and not all(_number(part.strip()) for part in text.split(",")):
        raise LaunchError(
            f"environment variable OMP_NUM_THREADS={text!r} is not a number of threads; set 1 or more, or unset it"
        )


def _allow_open_files(world_size: int) -> None:
    """Raise this process's own limit of open files, as far as it may; LaunchError if that cannot suffice.

    In every group a rank keeps a socket for each of its peers.
    """
    least, wanted = 64 + 2 * world_size, 256 + 16 * world_size
    soft, hard = (limit if limit >= 0 else wanted for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < wanted:
        soft = min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if soft < least:
        raise LaunchError(
            f"this process may have {soft} files open at once, and needs {least} or more: raise the limit (ulimit -n)"
        )


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

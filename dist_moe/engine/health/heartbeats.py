"""Signs of life: each rank writes to a file of its own what it is doing, others read it when in doubt.

Files, not collectives or a store: they outlive every process, and a run directory is shared by all ranks
anyway, as checkpoints are.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from dist_moe.config.files import json_line, parse_json
from dist_moe.parallel.stacks import stacks_of_threads

_WAITING_IN = frozenset(
    name for name in dir(distributed_c10d) if name.startswith(("all_", "reduce", "broadcast", "barrier", "gather"))
) | {"monitored_barrier", "scatter", "send", "recv", "scatter_object_list"}


class Activity:
    """The activity of this process: ``phase`` of training ``step`` (from 1). Written by the thread that trains only.

    ``marks`` grows with all progress. ``settled``: whether a first step is over, and with it whatever compiles on
    first use.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all steps, as at the start of a training."""
        self.step = 0
        self.phase = "start"
        self.marks = 0
        self.settled = False

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin a phase: data, forward, backward, optimizer, evaluation, checkpoint, ..."""
        self.phase = phase
        if step is not None:
            self.settled = self.settled or 0 < self.step < step
            self.step = step
        self.marks += 1

    def beat(self) -> None:
        """Count progress within a phase that takes long."""
        self.marks += 1


ACTIVITY = Activity()
"""The activity of this process."""


@dataclass(frozen=True)
class Process:
    """``pid`` on ``machine`` (its pid name space included), ``started`` at that many clock ticks after boot."""

    pid: int
    machine: str
    started: int

    @classmethod
    def this(cls) -> Process:
        """Return the process that asks."""
        return cls(os.getpid(), _machine(), _start_ticks(os.getpid()))

    def is_here(self) -> bool:
        """Return whether it still runs on this machine, and is not another that was given its pid."""
        return self.machine == _machine() and _start_ticks(self.pid) == self.started != -1

    def state(self) -> str:
        """Return its state in Linux's words, for example "T (stopped)"; empty if it cannot be seen from here."""
        if not self.is_here():
            return ""
        status = _read(f"/proc/{self.pid}/status")
        return next((line.partition(":")[2].strip() for line in status.splitlines() if line.startswith("State:")), "")


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life of a rank; ``beat`` counts them.

    ``idle_s``: seconds since the last progress. ``collectives``: issued so far. ``collective``: the one it waits in, or
    empty. ``ended``: it has left the training for good.
    """

    rank: int
    process: Process
    beat: int
    step: int
    phase: str
    idle_s: float
    collectives: int
    collective: str
    stack: str
    ended: bool = False


class Observer:
    """Describes the progress of the thread ``thread_id`` of this process, as ``rank``."""

    def __init__(self, rank: int, activity: Activity, thread_id: int) -> None:
        self._rank = rank
        self._activity = activity
        self._thread_id = thread_id
        self._process = Process.this()
        self._beat = 0
        self._progress: tuple[int, int] | None = None
        self._since = 0.0

    def look(self, now: float, ended: bool = False) -> Heartbeat:
        """Return the next heartbeat, at ``now`` seconds of a monotonic clock."""
        issued = collectives_issued()
        progress = (self._activity.marks, issued)
        if progress != self._progress:
            self._progress, self._since = progress, now
        self._beat += 1
        stacks = stacks_of_threads()
        stack = stacks.get(self._thread_id, [])
        waits_in = _collective_in(stack)
        in_backward = any("torch/autograd/" in entry.filename for entry in stack)
        if not waits_in and in_backward:  # on a GPU, autograd has threads of its own
            waits_in = next(filter(None, map(_collective_in, stacks.values())), "")
        return Heartbeat(
            self._rank,
            self._process,
            self._beat,
            self._activity.step,
            self._activity.phase,
            now - self._since,
            issued,
            waits_in,
            "".join(traceback.format_list(stack)),
            ended,
        )


def collectives_issued() -> int:
    """Return how many collectives this process has issued so far, over all backends of its groups. Issues none."""
    if not dist.is_initialized():
        return 0
    # A copy, as the main thread may be making groups. torch's stubs do not know their methods.
    groups: list[Any] = list(distributed_c10d._world.pg_map)
    backends = {group._get_backend(device) for group in groups for device in group._device_types}
    return sum(backend._get_sequence_number_for_group() for backend in backends)


def write_heartbeat(directory: Path, heartbeat: Heartbeat) -> None:
    """Replace the file of the heartbeat's rank. Raises OSError if the directory is gone or the disk is full."""
    path = _file_of(directory, heartbeat.rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json_line(asdict(heartbeat)), encoding="utf-8")
    partial.replace(path)


def read_heartbeat(directory: Path, rank: int) -> Heartbeat | None:
    """Return the last heartbeat that ``rank`` wrote; None before the first, and of a file that is none."""
    try:
        content = parse_json(_file_of(directory, rank).read_bytes())
        return Heartbeat(**(content | {"process": Process(**content["process"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _file_of(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:05d}.json"


def _collective_in(stack: Sequence[traceback.FrameSummary]) -> str:
    """Return the name of the collective in which a thread is, from its stack; empty if it is in none."""
    there = (entry.name for entry in reversed(stack) if entry.filename == distributed_c10d.__file__)
    return next((name for name in there if name in _WAITING_IN), "")


def _machine() -> str:
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _start_ticks(pid: int) -> int:
    """Return field 22 of /proc/PID/stat, by which a pid that was given again is known; -1 if it has ended."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if fields and fields[0] not in "ZX" else -1


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""

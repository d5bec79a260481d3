"""R ranks on one machine, started by ourselves: real processes, real collectives, no launcher to learn.

The ranks share the machine's CPU cores, or its GPUs (several on one GPU exchange over gloo). They meet at 127.0.0.1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from dist_moe.engine.launch.environment import EMULATED, LaunchEnvironment
from dist_moe.engine.launch.meeting import LOOPBACK, loopback_store
from dist_moe.engine.launch.signals import Interruption, StopRequest, stop_requests
from dist_moe.errors import UserError
from dist_moe.screen import say

SECONDS_BETWEEN_LOOKS = 0.1
PATIENCE_S = 30.0
"""Seconds for the other ranks to end after the first that failed; then they are killed."""
HURRY_S = 5.0
"""Seconds for all ranks to end after a second Ctrl-C."""


def check_emulation(num_ranks: int) -> None:
    """Raise UserError unless ``num_ranks`` >= 1 and no launcher has started this process."""
    if num_ranks < 1:
        raise UserError(f"--emulate {num_ranks}: at least 1 rank is needed")
    environment = LaunchEnvironment.read()
    if environment.launched:
        raise UserError(
            f"--emulate {num_ranks} starts the ranks itself, but this process is rank {environment.rank} of "
            f"{environment.world_size} that a launcher started; leave out the launcher, or --emulate"
        )


@contextmanager
def as_first_of(num_ranks: int) -> Iterator[None]:
    """Give this process the launch environment of rank 0 of ``num_ranks`` inside the block, to check a run for them."""
    before = dict(os.environ)
    os.environ |= _variables(0, num_ranks) | {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": "1"}  # nobody meets there
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


class _PassedOn(StopRequest):
    """A wish that goes on to the ranks, which have sessions of their own: a terminal's Ctrl-C comes here alone."""

    grace_s = 2 * HURRY_S

    def __init__(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        super().__init__()
        self._ranks = ranks

    def tell_latest(self) -> None:
        """Pass the signal, if one has come, on to the rank that was started last: the list did not know of it yet."""
        if self.signal_number:
            _send(self._ranks[-1:], self.signal_number)

    def take(self, number: int, frame: FrameType | None) -> None:
        """Remember the wish and pass the signal on."""
        _send(self._ranks, number)
        super().take(number, frame)


def run_ranks(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run ``python -m dist_moe ARGUMENTS`` on ``num_ranks`` processes of this machine; return their exit code.

    Every signal that asks a run to stop goes on to all ranks; those stop, and the result is 128 + signal. When a rank
    fails, the others are stopped, and the result is that rank's exit code. However this ends, no rank is left.
    """
    store = loopback_store()
    meeting = {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here already, rank 0 need not open one
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or "1",
        EMULATED: str(num_ranks),
    }
    command, ranks = [sys.executable, "-m", "dist_moe", *arguments], list[subprocess.Popen[bytes]]()
    request = _PassedOn(ranks)
    with stop_requests(request):
        try:
            for rank in range(num_ranks):
                if request.signal_number:  # it came while a rank was started
                    break
                environment = os.environ | _variables(rank, num_ranks) | meeting
                ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
                request.tell_latest()
            code = _first_failure(ranks) if ranks else 128 + request.signal_number
            patience_s = PATIENCE_S if code else 0.0
        except Interruption:
            code, patience_s = 128 + signal.SIGINT, HURRY_S
        finally:
            # What comes from here on changes nothing any more: the ranks have heard.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            _end(ranks, patience_s, tell=not request.signal_number)
    if not request.signal_number or not code:
        return code
    if not ranks or ranks[0].returncode < 0:  # it had no time to say so itself
        say(f"dist-moe: {Interruption(request.signal_number)}")
    return 128 + request.signal_number


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until a rank has failed or all have ended; return the exit code as a shell would give it."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if None not in codes:
            return 0
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _end(ranks: Sequence[subprocess.Popen[bytes]], patience_s: float, *, tell: bool) -> None:
    """Wait for the ranks to end, told to by SIGTERM if ``tell``; kill those that have not ended in time."""
    if tell:
        _send(ranks, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.wait(max(deadline - time.monotonic(), 0.0))
    _send(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def _send(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.killpg(rank.pid, number)


def _variables(rank: int, num_ranks: int) -> dict[str, str]:
    """Return the environment variables that a launcher would set for ``rank``."""
    numbers = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
    return {name: str(number) for name, number in numbers.items()}

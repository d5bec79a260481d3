"""R ranks on one machine, started by ourselves: real processes, real collectives, no launcher to learn.

The ranks share the machine's CPU cores, or its GPUs (several on one GPU exchange over gloo, see
`LaunchEnvironment.backend`). The processes are kept by the part of torch that keeps torchrun's.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.1
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


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
    of_rank_0 = _variables(0, num_ranks)
    os.environ |= of_rank_0
    try:
        yield
    finally:
        for name in of_rank_0:
            del os.environ[name]


def run_ranks(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run ``python -m dist_moe ARGUMENTS`` on ``num_ranks`` processes of this machine; return their exit code.

    Every SIGTERM and SIGINT goes on to all ranks; those stop, and the result is 128 + signal. When a
    rank fails, the others are stopped, and the result is that rank's exit code.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here already, rank 0 need not open one
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    handlers = {number: signal.getsignal(number) for number in PASSED_ON}  # torch installs others for good
    received: list[int] = []
    logging.disable(logging.ERROR)  # what torch says about its children: the ranks explain themselves
    try:
        ranks = start_processes(
            "dist-moe",
            sys.executable,
            args=dict.fromkeys(range(num_ranks), ("-m", "dist_moe", *arguments)),
            envs={rank: _variables(rank, num_ranks) | meeting for rank in range(num_ranks)},
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        )

        def send_on(number: int, _frame: FrameType | None) -> None:
            received.append(number)
            for pid in ranks.pids().values():
                with suppress(ProcessLookupError):  # it has ended
                    os.killpg(pid, number)  # the ranks have sessions of their own

        for number in PASSED_ON:
            signal.signal(number, send_on)
        result = ranks.wait(period=SECONDS_BETWEEN_LOOKS)
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if result is None or not result.is_failed():
        return 0
    if received:
        return 128 + received[0]
    code = min(result.failures.values(), key=lambda failure: failure.timestamp).exitcode
    return code if code > 0 else 128 - code


def _variables(rank: int, num_ranks: int) -> dict[str, str]:
    """Return the environment variables that a launcher would set for ``rank``."""
    numbers = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
    return {name: str(number) for name, number in numbers.items()}

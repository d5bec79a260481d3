"""Where the ranks of a job meet: its store, bounded in time, and open to no other machine where there is but one."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dist_moe.config.files import json_line, parse_json
from dist_moe.engine.launch.environment import LaunchEnvironment, all_ranks_are_here, meeting_point
from dist_moe.errors import LaunchError

LOOPBACK = "127.0.0.1"
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
SECONDS_BETWEEN_TRIES = 0.2
_SLACK_S = 1.0
"""Seconds by which torch's own timeout may come later, for its message says more."""

T = TypeVar("T")


@contextmanager
def on_own_interface() -> Iterator[None]:
    """Let the backends that open inside the block listen on the loopback interface, if all ranks are on this machine.

    Interfaces that the user has named stay.
    """
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    free = [name for name in INTERFACE_VARIABLES if name not in os.environ]
    if not names or not all_ranks_are_here():
        free = []
    os.environ |= dict.fromkeys(free, names[0] if names else "")
    try:
        yield
    finally:
        for name in free:
            os.environ.pop(name, None)


def loopback_store(port: int = 0, *, wait_for_workers: bool = False, **options: Any) -> dist.TCPStore:
    """Open a store that listens on 127.0.0.1 alone, where torch's would listen on every interface; raises OSError.

    ``port``: 0 for any that is free. ``wait_for_workers``, ``options``: of ``TCPStore``.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(socket.SOMAXCONN)
        port = listener.getsockname()[1]
        options |= {"wait_for_workers": wait_for_workers, "master_listen_fd": listener.detach()}
        return dist.TCPStore(LOOPBACK, port, is_master=True, **options)


def store_of_this_attempt(environment: LaunchEnvironment, timeout: timedelta) -> dist.Store:
    """Return a part of the launcher's store into which no earlier attempt has written; of one rank, a store of its own.

    torchrun with a static rendezvous keeps its store when it restarts the ranks of a machine, and they would
    look for one another at the addresses of those that were killed. Where several machines meet, it makes
    a new store, and their counts of restarts may differ.

    Raises LaunchError where the ranks do not find one another within ``timeout``.
    """
    if environment.world_size == 1:
        return dist.HashStore()
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else 0
    return dist.PrefixStore(f"attempt-{attempt}", _store(environment, timeout.total_seconds()))


def _store(environment: LaunchEnvironment, timeout_s: float) -> dist.Store:
    address, port = meeting_point()
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    here = all_ranks_are_here() and not of_launcher
    address = LOOPBACK if here else address
    deadline = time.monotonic() + timeout_s
    what = f"the meeting point of the ranks, {address}:{port} (MASTER_ADDR, MASTER_PORT)"
    hosts = environment.is_rank_zero and not of_launcher
    options: dict[str, Any] = {"world_size": environment.world_size, "multi_tenant": True}

    def open_store() -> dist.Store:
        timeout = timedelta(seconds=max(deadline - time.monotonic(), 0.1))
        if hosts and here:
            try:
                return loopback_store(port, wait_for_workers=True, timeout=timeout, **options)
            except OSError:  # taken: by an earlier store of this very process, which torch knows, or by a stranger
                return dist.TCPStore(LOOPBACK, port, is_master=True, timeout=timeout, **options)
        if here:
            return dist.TCPStore(LOOPBACK, port, timeout=timeout, **options)
        return next(rendezvous("env://", environment.rank, environment.world_size, timeout=timeout))[0]

    try:
        if not hosts:
            _wait_for_listener(address, port, deadline)
        return _within(deadline + _SLACK_S - time.monotonic(), open_store)
    except (OSError, RuntimeError, ValueError) as error:
        if hosts:
            remedy = "choose a MASTER_PORT that no other program holds, and see that every other rank was started"
        else:
            remedy = (
                "see that rank 0 runs there, that the name means the same on every machine, that no firewall closes "
                "the port, and that no other program holds it"
            )
        reason = str(error).partition(". Exception raised from")[0].splitlines()[0]
        raise LaunchError(
            f"rank {environment.rank}: {what}, could not be opened within parallel.timeout_s={timeout_s:g}: "
            f"{reason}; {remedy}"
        ) from error


def _wait_for_listener(address: str, port: int, deadline: float) -> None:
    """Wait until something listens there; raises OSError that says why nothing does, or TimeoutError."""
    while True:
        left_s = max(deadline - time.monotonic(), 0.1)
        try:
            with _within(left_s, partial(socket.create_connection, (address, port), left_s)):
                return
        except OSError:
            if time.monotonic() + SECONDS_BETWEEN_TRIES > deadline:
                raise
        time.sleep(SECONDS_BETWEEN_TRIES)


def _within(seconds: float, function: Callable[[], T]) -> T:
    """Return what ``function`` returns; raises what it raises, or TimeoutError after ``seconds``.

    It then goes on in its thread, which ends with the process: neither names that are looked up nor torch's store,
    which waits for an answer without end, can be bounded otherwise.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="dist-moe meeting")
    thread.start()
    thread.join(max(seconds, 0.1))
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError("whoever listens there gives no answer")
    return results[0]


class JobStore:
    """The launcher's store, kept for the life of the job.

    ``timeout_s``: seconds after which waiting for a key is an error.
    """

    def __init__(self, environment: LaunchEnvironment, timeout_s: float) -> None:
        self._environment = environment
        timeout = timedelta(seconds=timeout_s)
        self._store = store_of_this_attempt(environment, timeout)
        self._store.set_timeout(timeout)

    def part(self, name: str) -> dist.Store:
        """Return a part of the store for some of the ranks, over which they can open process groups."""
        return dist.PrefixStore(name, self._store)

    def agree(self, key: str, mine: Any) -> Any:
        """Return rank 0's ``mine``, which JSON must hold, on every rank; each key serves once."""
        if self._environment.is_rank_zero:
            self._store.set(key, json_line(mine))
        return parse_json(self._store.get(key))

    def tell(self, event: str) -> None:
        """Tell all ranks of an event, now and later."""
        self._store.set(event, "")

    def is_told(self, event: str) -> bool:
        """Return whether some rank has told of the event."""
        return bool(self._store.check([event]))

    def arrive(self, event: str) -> None:
        """Count this rank; the last of all ranks tells of the event."""
        if self._store.add(f"{event}-arrived", 1) == self._environment.world_size:
            self.tell(event)

"""Where ranks meet: within the time that is allowed, and open to this machine alone where there is no other."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.meeting import INTERFACE_VARIABLES, loopback_store, on_own_interface, store_of_this_attempt
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.errors import LaunchError
from tests.helpers.pool import free_port, on_ranks
from tests.helpers.sockets import listeners_of

TIMEOUT_S = 0.5


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LaunchEnvironment]:
    def as_rank(rank: int, port: int, address: str = "127.0.0.1", here: int = 2) -> LaunchEnvironment:
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
        for name, value in (variables | {"MASTER_ADDR": address, "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, str(value))
        return LaunchEnvironment.read()

    return as_rank


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def refused(environment: LaunchEnvironment, *parts: str) -> None:
    began = time.monotonic()
    with pytest.raises(LaunchError) as refusal:
        store_of_this_attempt(environment, timedelta(seconds=TIMEOUT_S))
    assert time.monotonic() - began < TIMEOUT_S + 5  # and not the minutes of torch's own
    for part in (f"rank {environment.rank}: the meeting point", "within parallel.timeout_s=0.5: ", *parts):
        assert part in str(refusal.value)


@pytest.mark.parametrize("here", [1, 2])
def test_a_listener_that_never_answers(
    launched: Callable[..., LaunchEnvironment], listener: socket.socket, here: int
) -> None:
    port = listener.getsockname()[1]
    refused(launched(1, port, here=here), f"127.0.0.1:{port}", "no other program holds it")


def test_a_listener_that_speaks_of_something_else(
    launched: Callable[..., LaunchEnvironment], listener: socket.socket
) -> None:
    def greet() -> None:
        while True:
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"220 mail.example.org ESMTP\r\n" * 10)
            except OSError:
                return

    threading.Thread(target=greet, daemon=True).start()
    refused(launched(1, listener.getsockname()[1]), "no other program holds it")


def test_nobody_listens(launched: Callable[..., LaunchEnvironment], closed_port: int) -> None:
    refused(launched(1, closed_port), f":{closed_port}", "Connection refused", "rank 0 runs there")


def test_a_name_that_means_nothing(launched: Callable[..., LaunchEnvironment], closed_port: int) -> None:
    refused(launched(1, closed_port, "no-such-machine.invalid", here=1), "no-such-machine.invalid", "every machine")


@pytest.mark.parametrize("here", [1, 2])
def test_rank_0_finds_its_port_taken(
    launched: Callable[..., LaunchEnvironment], listener: socket.socket, here: int
) -> None:
    refused(launched(0, listener.getsockname()[1], here=here), "in use", "choose a MASTER_PORT")


def test_rank_0_waits_for_ranks_that_never_come(launched: Callable[..., LaunchEnvironment], closed_port: int) -> None:
    refused(launched(0, closed_port), "1/2 clients", "every other rank was started")


def test_the_store_of_one_machine_listens_there_alone() -> None:
    before = listeners_of([os.getpid()])
    store = loopback_store()
    assert listeners_of([os.getpid()]) - before <= {"127.0.0.1"}
    client = dist.TCPStore("127.0.0.1", store.port)
    store.set("key", "value")
    assert client.get("key") == b"value"
    address = next((found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)), None)
    if address is not None and not address.startswith("127."):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((address, store.port), 1)


def listeners_of_a_rank(expert_parallel_size: int) -> set[str]:
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=expert_parallel_size)):
        return listeners_of([os.getpid()])


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_of_one_machine_listen_there_alone(world_size: int) -> None:
    for addresses in on_ranks(world_size, listeners_of_a_rank, world_size):
        assert addresses <= {"127.0.0.1", "::1"}


def test_interfaces_that_the_user_names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    gloo, nccl = INTERFACE_VARIABLES
    monkeypatch.setenv(gloo, "eth7")
    monkeypatch.delenv(nccl, raising=False)
    with on_own_interface():
        assert (os.environ[gloo], os.environ[nccl]) == ("eth7", "lo")
    assert nccl not in os.environ


def test_ranks_of_several_machines_keep_their_interfaces(launched: Callable[..., LaunchEnvironment]) -> None:
    launched(1, free_port(), here=1)
    with on_own_interface():
        assert not {*INTERFACE_VARIABLES} & {*os.environ}

"""Jobs on several machines, made of network namespaces: they train what one process trains."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.commands import succeed
from tools.namespaces import cluster, why_not
from tools.rehearsal import SAME, WAYS, Rehearsal, Result, prepare, rehearse


@pytest.fixture(scope="module", autouse=True)
def _machines() -> None:
    if reason := why_not():
        pytest.skip(f"no machines can be made here: {reason}")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The directory with data and configuration, and what one process makes of them."""
    config = prepare(tmp_path_factory.mktemp("rehearsal"))
    run = config.with_name("alone")
    succeed(1, "train", config, "--run-dir", run)
    return config.parent, Result.read(run)


def namespaces() -> list[str]:
    """Those of this process."""
    done = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    return [name for name in done.stdout.split() if name.startswith(f"dist-moe-{os.getpid()}-")]


SERVER = """
import socket, sys, time
listening = socket.create_server((sys.argv[1], 7000))
print("up", flush=True)
connection = listening.accept()[0]
started, received = time.monotonic(), 0
while piece := connection.recv(65536):
    received += len(piece)
print(received, time.monotonic() - started)
"""
CLIENT = """
import socket, sys
socket.create_connection((sys.argv[1], 7000), timeout=5).sendall(bytes(1_500_000))
"""


def test_machines_are_joined_by_cables_of_limited_speed() -> None:
    with cluster(2, rate="8mbit") as (one, other):
        words = one.command("python3", "-SEc", SERVER, one.address)
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        client = ["python3", "-SEc", CLIENT]
        alone = subprocess.run(other.command(*client, "127.0.0.1"), capture_output=True, text=True, check=False)
        assert "ConnectionRefusedError" in alone.stderr
        assert subprocess.run(other.command(*client, one.address), check=False).returncode == 0
        received, seconds = server.communicate(timeout=30)[0].split()
    assert int(received) == 1_500_000
    assert float(seconds) > 1.0  # 1.5 s at 1 MB/s, but for what the queue lets through at once


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt])
def test_machines_are_removed_with_all_that_runs_there(failure: type[BaseException] | None) -> None:

    def use() -> None:
        with cluster(2) as nodes:
            assert len(namespaces()) == 3
            for node in nodes:
                process = subprocess.Popen(node.command("sh", "-c", "echo up; exec sleep 600"), stdout=subprocess.PIPE)
                assert process.stdout is not None
                assert process.stdout.readline() == b"up\n"
                processes.append(process)
            if failure is not None:
                raise failure

    processes: list[subprocess.Popen[bytes]] = []
    if failure is None:
        use()
    else:
        with pytest.raises(failure):
            use()
    assert [process.wait(10) for process in processes] == [-15, -15]
    assert namespaces() == []


def check(directory: Path, one: Result, name: str, nodes: int, ranks: int, into: str) -> None:
    with cluster(nodes) as machines:
        result = rehearse(Rehearsal(machines, ranks, directory), name, into)
    assert result.wire_rows > 0
    assert result.difference(one) <= SAME


@pytest.mark.parametrize(
    "name", [name if name == "torchrun" else pytest.param(name, marks=pytest.mark.slow) for name in WAYS]
)
def test_every_way_trains_what_one_process_trains(one_process: tuple[Path, Result], name: str) -> None:
    check(*one_process, name, nodes=2, ranks=1, into=name)


@pytest.mark.slow
def test_two_machines_of_two_ranks(one_process: tuple[Path, Result]) -> None:
    check(*one_process, "torchrun", nodes=2, ranks=2, into="two-by-two")


@pytest.mark.slow
def test_four_machines(one_process: tuple[Path, Result]) -> None:
    check(*one_process, "torchrun", nodes=4, ranks=1, into="four")

"""Machines made of network namespaces: each has its own address and its own slow cable to a common switch.

Processes of different namespaces reach one another over TCP only, as on a cluster; files, process ids and
the host's name they share. Needs Linux, iproute2 and the right to make namespaces; the host's own network is not
touched, as the switch lies in a namespace too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERFACE = "eth0"
SECONDS_TO_END = 5.0


@dataclass(frozen=True)
class Node:
    """A machine: ``address`` of its interface `INTERFACE`, ``namespace`` in which its processes run."""

    namespace: str
    address: str

    def command(self, *words: object) -> list[str]:
        """The words of a command that runs ``words`` on this machine, in the process that is started for it."""
        return ["ip", "netns", "exec", self.namespace, *map(str, words)]


def why_not() -> str | None:
    """Why no machines can be made here; None where they can."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not found on PATH (package iproute2)"
    try:
        with cluster(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"'{' '.join(error.cmd)}' failed: {error.stderr.strip()}"


@contextmanager
def cluster(size: int, rate: str = "1gbit") -> Iterator[list[Node]]:
    """``size`` machines, each sending at most ``rate`` (as tc writes it); removed at the end, with all that runs there.

    Raises subprocess.CalledProcessError where that is not allowed.
    """
    nodes = [Node(f"dist-moe-{os.getpid()}-{number}", f"10.77.0.{number + 1}") for number in range(size)]
    switch = f"dist-moe-{os.getpid()}-switch"
    made: list[str] = []
    try:
        for namespace in (switch, *(node.namespace for node in nodes)):
            _run("ip", "netns", "add", namespace)
            made.append(namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _run("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "switch", "up")
        for number, node in enumerate(nodes):
            _connect(node, switch, f"port{number}", rate)
        yield nodes
    finally:
        for namespace in reversed(made):
            _end_processes(namespace)
            _run("ip", "netns", "delete", namespace)


def _connect(node: Node, switch: str, port: str, rate: str) -> None:
    end = ("type", "veth", "peer", "name", port, "netns", switch)
    _run("ip", "link", "add", INTERFACE, "netns", node.namespace, *end)
    _run("ip", "-n", switch, "link", "set", port, "master", "switch")
    _run("ip", "-n", switch, "link", "set", port, "up")
    _run("ip", "-n", node.namespace, "address", "add", f"{node.address}/24", "dev", INTERFACE)
    _run("ip", "-n", node.namespace, "link", "set", INTERFACE, "up")
    limit = ("tbf", "rate", rate, "burst", "256kb", "latency", "200ms")
    _run("tc", "-n", node.namespace, "qdisc", "add", "dev", INTERFACE, "root", *limit)


def _end_processes(namespace: str) -> None:
    """End what still runs in a namespace: by name it is ours alone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline, signalled = time.monotonic() + SECONDS_TO_END, set[int]()
        while (pids := _pids(namespace)) and time.monotonic() < deadline:
            for pid in pids - signalled:  # some enter only now
                _signal(pid, number)
            signalled |= pids
            time.sleep(0.05)


def _pids(namespace: str) -> set[int]:
    return {int(pid) for pid in _run("ip", "netns", "pids", namespace).split()}


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has just ended


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout

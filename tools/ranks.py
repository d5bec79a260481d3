"""Start one process per rank, on this machine or in network namespaces, and wait until all have ended well."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence

from tools.namespaces import INTERFACE, Node

LOOPBACK = "127.0.0.1"


def run_ranks(
    words: Sequence[str], nodes: Sequence[Node | None], per_node: int, *, port: int, patience_s: float
) -> None:
    """Run the command ``words`` on ``per_node`` ranks of one thread on each of ``nodes`` (None: this machine).

    Rank 0 listens on ``port``. Raises SystemExit if a rank fails, or after ``patience_s`` seconds; whatever still
    runs is ended.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(len(nodes) * per_node):
            node = nodes[rank // per_node]
            here = os.environ | _environment(rank, nodes, per_node, port)
            ranks.append(subprocess.Popen(node.command(*words) if node else list(words), env=here))
        _wait(ranks, patience_s)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _environment(rank: int, nodes: Sequence[Node | None], per_node: int, port: int) -> dict[str, str]:
    number, local_rank = divmod(rank, per_node)
    node, first = nodes[number], nodes[0]
    environment = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "GROUP_RANK": number,
        "WORLD_SIZE": len(nodes) * per_node,
        "LOCAL_WORLD_SIZE": per_node,
        "MASTER_ADDR": first.address if first else LOOPBACK,
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    } | ({"GLOO_SOCKET_IFNAME": INTERFACE} if node else {})
    return {name: str(value) for name, value in environment.items()}


def _wait(ranks: list[subprocess.Popen[bytes]], patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll()]
        if failed or time.monotonic() > end:
            raise SystemExit(f"ranks {failed} failed" if failed else f"no end after {patience_s} s")
        time.sleep(0.1)
    if any(process.returncode for process in ranks):
        raise SystemExit("a rank failed")

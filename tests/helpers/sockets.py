"""Sockets on which processes listen, as the kernel knows them."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path

_LISTENS = "0A"


def listeners_of(pids: Iterable[int]) -> set[str]:
    """Addresses, without ports, on which these processes listen for TCP connections."""
    found = set()
    for pid in pids:
        inodes = set()
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(file)))
            except FileNotFoundError:
                continue
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                (
                    _,
                    local,
                    _,
                    state,
                    *_,
                ) = line.split()[:4]
                if state == _LISTENS and line.split()[9] in inodes:
                    found.add(_address(local.partition(":")[0]))
    return found


def _address(hexadecimal: str) -> str:
    """The kernel writes 32-bit words in the machine's order of bytes."""
    words = [bytes.fromhex(hexadecimal[start : start + 8])[::-1] for start in range(0, len(hexadecimal), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def children_of(pid: int) -> list[int]:
    """Processes that this one has started and that still are."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

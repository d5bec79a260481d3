"""A store of keys that all ranks of a launch can read, while no process group is open or several are."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dist_moe.engine.launch.environment import LaunchEnvironment


class JobStore:
    """The launcher's store, kept for the life of the job; of one process without a launcher, a store of its own.

    ``timeout_s``: seconds after which waiting for a key is an error.
    """

    def __init__(self, environment: LaunchEnvironment, timeout_s: float) -> None:
        self._environment = environment
        timeout = timedelta(seconds=timeout_s)
        self._store = store_of_this_attempt(environment, timeout) if environment.launched else dist.HashStore()
        self._store.set_timeout(timeout)

    def part(self, name: str) -> dist.Store:
        """Return a part of the store for some of the ranks, over which they can open process groups."""
        return dist.PrefixStore(name, self._store)

    def agree(self, key: str, mine: Any) -> Any:
        """Return rank 0's ``mine``, which JSON must hold, on every rank; each key serves once."""
        if self._environment.is_rank_zero:
            self._store.set(key, json.dumps(mine))
        return json.loads(self._store.get(key))

    def tell(self, event: str) -> None:
        """Let all ranks know of an event, now and later."""
        self._store.set(event, "")

    def is_told(self, event: str) -> bool:
        """Whether some rank has told of the event."""
        return bool(self._store.check([event]))

    def arrive(self, event: str) -> None:
        """Count this rank; the last of all ranks tells of the event."""
        if self._store.add(f"{event}-arrived", 1) == self._environment.world_size:
            self.tell(event)


def store_of_this_attempt(environment: LaunchEnvironment, timeout: timedelta) -> dist.Store:
    """Return a part of the launcher's store into which no earlier attempt has written.

    torchrun with a static rendezvous keeps its store when it restarts the ranks of a machine, and they would
    look for one another at the addresses of those that were killed. Where several machines meet, it makes
    a new store, and their counts of restarts may differ.
    """
    store, _, _ = next(rendezvous("env://", environment.rank, environment.world_size, timeout=timeout))
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if alone else 0}", store)

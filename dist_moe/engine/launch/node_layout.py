"""On which node each rank of the job lives: as the launcher says, or as the configuration pretends."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch.distributed as dist

from dist_moe.engine.collectives import gather_objects
from dist_moe.errors import UserError

_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""Set by torchrun and TorchX; by DeepSpeed's launcher."""
_NODE_NUMBER = ("GROUP_RANK", "CROSS_RANK")
"""The same two. Node numbers tell nodes apart even where host names are alike."""


def launched_ranks_per_node() -> int | None:
    """How many ranks the launcher started on this node; None if it does not say.

    Raises UserError if it says something that is no number above 0.
    """
    for name in _RANKS_HERE:
        value = os.environ.get(name)
        if value is not None:
            if not value.isdigit() or int(value) == 0:
                raise UserError(f"environment variable {name}={value!r} is not a number of ranks; unset it")
            return int(value)
    return None


def node_of_every_rank(ranks_per_node: int | None) -> list[int]:
    """For every rank of the job the number of its node, from 0 in the order of ranks.

    ``ranks_per_node``: nodes of that many consecutive ranks, wherever they run; None asks all ranks for the
    name of their node, in one collective.
    """
    if ranks_per_node is not None:
        return [rank // ranks_per_node for rank in range(dist.get_world_size())]
    return number_names(gather_objects(_node_name()))


def number_names(names: Sequence[str]) -> list[int]:
    """Equal names get equal numbers, in the order in which they first appear."""
    number: dict[str, int] = {}
    return [number.setdefault(name, len(number)) for name in names]


def _node_name() -> str:
    numbers = [os.environ[name] for name in _NODE_NUMBER if name in os.environ]
    return numbers[0] if numbers else socket.gethostname()

"""Nodes: which ranks of a world live together, and the groups of ranks within and across nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch.distributed as dist

from dist_moe.parallel.world import ExchangeOptions, Levels, ProcessWorld, SingleWorld, Traffic, World


def ranks_per_node(node_of_rank: Sequence[int]) -> int | None:
    """Return m if the ranks are whole blocks of m, each block on a node of its own; None if they are not."""
    size = len(node_of_rank)
    per_node = size // len(set(node_of_rank))
    blocks = [node_of_rank[start : start + per_node] for start in range(0, size, per_node)]
    alike = all(len(set(block)) == 1 for block in blocks)
    return per_node if alike and len(blocks) == len(set(node_of_rank)) else None


def open_levels(
    worlds: Iterable[Sequence[int]],
    per_node: int,
    traffic: Traffic,
    options: ExchangeOptions | None = None,
    timeout: timedelta | None = None,
) -> Levels:
    """Open the levels of worlds that are divided into nodes of ``per_node`` ranks, and return those of this rank.

    ``worlds``: the (global) ranks of every world of the job that is divided so, this rank's among them, the
    same list on all ranks, for every rank takes part in opening every group. Groups of one rank are not opened.
    ``traffic``, ``options``: those of this rank's world. Collective over all ranks of the job.
    """
    rank = dist.get_rank()
    levels: dict[str, World] = {}
    for ranks in worlds:
        nodes = [ranks[start : start + per_node] for start in range(0, len(ranks), per_node)]
        for level, members in [("within", node) for node in nodes] + [
            ("across", peers) for peers in zip(*nodes, strict=True)
        ]:
            group = dist.new_group(list(members), timeout=timeout) if len(members) > 1 else None
            if rank in members:
                node_of_rank = range(len(members)) if level == "across" else None
                levels[level] = (
                    SingleWorld(traffic)
                    if group is None
                    else ProcessWorld(group, node_of_rank, traffic, options=options)
                )
    return Levels(**levels)

"""Measuring the machine that the ranks of this job are: its constants as the plan of a step takes them.

As many ranks of each node measure at once as it has processors, so that what they share is shared as in a run;
more ranks than processors wait meanwhile.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, replace
from statistics import fmean

import torch

from dist_moe.engine.launch.machine_probe import (
    LinkRates,
    LocalRates,
    link_rates,
    local_rates,
    mean_rates,
    open_group,
    step_fixed_seconds,
)
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.parallel import gather_objects, wait_for_all
from dist_moe.planning.scale.machine import Link, Machine
from dist_moe.planning.scale.spread import Layout
from dist_moe.planning.scale.step_time import small_collectives_seconds


def measure_machine(groups: ProcessGroups, processors_per_node: float, name: str = "") -> Machine:
    """Return the constants of the nodes of ``groups``. Collective over all ranks; the same result on all.

    Links are measured within the first node between ranks that have a processor each; between the first two by
    all of their ranks at once, because a single stream does not fill a link. A single rank, or a single node,
    leaves the links out that it has not.
    """
    rank, device = groups.environment.rank, groups.device
    ranks_of_node: dict[int, list[int]] = {}
    for other, node in enumerate(groups.node_of_rank):
        ranks_of_node.setdefault(node, []).append(other)
    nodes = list(ranks_of_node.values())
    busy = [ranks[: max(1, int(processors_per_node))] for ranks in nodes]
    wait_for_all()
    mine = asdict(local_rates(device)) if any(rank in ranks for ranks in busy) else None
    rates = mean_rates([LocalRates(**one) for one in gather_objects(mine) if one is not None])
    inside = _link([nodes[0][: max(2, len(busy[0]))]], groups) if len(nodes[0]) > 1 else None
    between = _link([list(pair) for pair in zip(*nodes[:2], strict=True)], groups) if len(nodes) > 1 else None
    # What, of a fixed step on all ranks, one rank with a processor of its own would need.
    layout, link = Layout(len(nodes), len(nodes[0]), 1), between or inside
    sharing = max(1.0, layout.per_node / processors_per_node)
    step_s = fmean(gather_objects(step_fixed_seconds(groups))) - small_collectives_seconds(link, layout, sharing)
    return Machine(
        name=name or platform.node() or "measured",
        source=f"measured on {len(nodes)} node(s) of {len(nodes[0])} rank(s), {device.type}",
        processors_per_node=processors_per_node,
        memory_bytes_per_rank=None,
        inside=inside,
        between=between,
        **asdict(replace(rates, step_fixed_s=max(0.0, step_s) / sharing)),
    )


def processors_here() -> int:
    """Return the number of this node's GPUs, or else of the CPU cores that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def _link(members: list[list[int]], groups: ProcessGroups) -> Link:
    """Return the link between the ranks of each group of ``members``, all groups at once.

    Rates add up over the ranks that share a link: none within a node, all between two.
    """
    wait_for_all()
    mine = None
    for ranks in members:
        group = open_group(ranks, groups.timeout)
        if group is not None:
            mine = group
    measured = asdict(link_rates(mine, groups.device)) if mine is not None else None
    of_ranks = [LinkRates(**rates) for rates in gather_objects(measured) if rates is not None]
    return Link(
        all_to_all_bytes_per_s=len(members) * fmean(rates.all_to_all_bytes_per_s for rates in of_ranks),
        all_reduce_bytes_per_s=len(members) * fmean(rates.all_reduce_bytes_per_s for rates in of_ranks),
        latency_s=fmean(rates.latency_s for rates in of_ranks),
    )

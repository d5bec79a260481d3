"""Ranks: the world they live in, and the ragged exchange of token rows between them."""

from dist_moe.parallel.collectives import several_ranks, sum_over_ranks
from dist_moe.parallel.dispatch import DispatchPlan, combine, dispatch, plan_dispatch
from dist_moe.parallel.placement import Placement, expert_table, position_table
from dist_moe.parallel.world import ProcessWorld, SingleWorld, Traffic, World, experts_of_rank

__all__ = [
    "DispatchPlan",
    "Placement",
    "ProcessWorld",
    "SingleWorld",
    "Traffic",
    "World",
    "combine",
    "dispatch",
    "expert_table",
    "experts_of_rank",
    "plan_dispatch",
    "position_table",
    "several_ranks",
    "sum_over_ranks",
]

"""Ranks: the world they live in, and the ragged exchange of token rows between them."""

from dist_moe.parallel.collectives import job, several_ranks, sum_over_ranks
from dist_moe.parallel.dispatch import DispatchPlan, combine, dispatch, plan_dispatch
from dist_moe.parallel.emulated import EmulatedWorld
from dist_moe.parallel.world import ProcessWorld, SingleWorld, Traffic, World, experts_of_rank

__all__ = [
    "DispatchPlan",
    "EmulatedWorld",
    "ProcessWorld",
    "SingleWorld",
    "Traffic",
    "World",
    "combine",
    "dispatch",
    "experts_of_rank",
    "job",
    "plan_dispatch",
    "several_ranks",
    "sum_over_ranks",
]

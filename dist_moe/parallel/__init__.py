"""Ranks: the world they live in, and the ragged exchange of token rows between them."""

from dist_moe.parallel.collectives import added_over_ranks, job, several_ranks, sum_over_ranks
from dist_moe.parallel.dispatch import DispatchPlan, combine, dispatch, plan_dispatch
from dist_moe.parallel.emulated import EmulatedWorld
from dist_moe.parallel.exchange import Exchange, FlatExchange, Mixed
from dist_moe.parallel.nodes import open_levels, ranks_per_node
from dist_moe.parallel.overlapped import OverlappedExchange
from dist_moe.parallel.phase_clock import PHASES, PhaseClock
from dist_moe.parallel.placement import Placement, expert_table, position_table
from dist_moe.parallel.two_level import OncePerPart, exchange_over, two_level_exchange
from dist_moe.parallel.wire import WIRES, Wire, WireName
from dist_moe.parallel.world import Levels, ProcessWorld, SingleWorld, Traffic, World, experts_of_rank

__all__ = [
    "PHASES",
    "WIRES",
    "DispatchPlan",
    "EmulatedWorld",
    "Exchange",
    "FlatExchange",
    "Levels",
    "Mixed",
    "OncePerPart",
    "OverlappedExchange",
    "PhaseClock",
    "Placement",
    "ProcessWorld",
    "SingleWorld",
    "Traffic",
    "Wire",
    "WireName",
    "World",
    "added_over_ranks",
    "combine",
    "dispatch",
    "exchange_over",
    "expert_table",
    "experts_of_rank",
    "job",
    "open_levels",
    "plan_dispatch",
    "position_table",
    "ranks_per_node",
    "several_ranks",
    "sum_over_ranks",
    "two_level_exchange",
]

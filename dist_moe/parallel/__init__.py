"""Ranks: the world they live in, and the ragged exchange of token rows between them."""

from dist_moe.parallel.emulated import EmulatedWorld
from dist_moe.parallel.exchange import (
    Exchange,
    FlatExchange,
    Mixed,
    combine,
    dispatch,
    plan_dispatch,
    timed,
)
from dist_moe.parallel.overlapped import OverlappedExchange
from dist_moe.parallel.phase_clock import PHASES, PhaseClock
from dist_moe.parallel.placement import Placement, expert_table, experts_of_rank, position_table
from dist_moe.parallel.two_level import OncePerPart, exchange_over, open_levels, ranks_per_node, two_level_exchange
from dist_moe.parallel.wire import WIRES, WireName
from dist_moe.parallel.world import (
    ExchangeOptions,
    ProcessWorld,
    SingleWorld,
    Traffic,
    World,
    added_over_ranks,
    current_world,
    gather_columns,
    gather_objects,
    max_over_ranks,
    several_ranks,
    sum_over_ranks,
    use_world,
    wait_for_all,
)

__all__ = [
    "PHASES",
    "WIRES",
    "EmulatedWorld",
    "Exchange",
    "ExchangeOptions",
    "FlatExchange",
    "Mixed",
    "OncePerPart",
    "OverlappedExchange",
    "PhaseClock",
    "Placement",
    "ProcessWorld",
    "SingleWorld",
    "Traffic",
    "WireName",
    "World",
    "added_over_ranks",
    "combine",
    "current_world",
    "dispatch",
    "exchange_over",
    "expert_table",
    "experts_of_rank",
    "gather_columns",
    "gather_objects",
    "max_over_ranks",
    "open_levels",
    "plan_dispatch",
    "position_table",
    "ranks_per_node",
    "several_ranks",
    "sum_over_ranks",
    "timed",
    "two_level_exchange",
    "use_world",
    "wait_for_all",
]

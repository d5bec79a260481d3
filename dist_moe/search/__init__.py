"""Search over slot -> expert tables and expert -> rank placements, coordinated by all ranks."""

from dist_moe.search.agreement import agree_on_tables, assert_same_on_all_ranks
from dist_moe.search.permutation import PermutationSearch, PermutationSearchConfig
from dist_moe.search.placement import PlacementChoice, agree_on_placement, choose_placement, rank_imbalance
from dist_moe.search.slot_table import SlotTable, give_branches_slots
from dist_moe.search.swap import BatchLoss, Swap, SwapReport, SwapSearch, SwapSearchConfig

__all__ = [
    "BatchLoss",
    "PermutationSearch",
    "PermutationSearchConfig",
    "PlacementChoice",
    "SlotTable",
    "Swap",
    "SwapReport",
    "SwapSearch",
    "SwapSearchConfig",
    "agree_on_placement",
    "agree_on_tables",
    "assert_same_on_all_ranks",
    "choose_placement",
    "give_branches_slots",
    "rank_imbalance",
]

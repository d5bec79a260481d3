"""Search over slot -> expert tables and expert -> rank placements, coordinated by all ranks."""

from dist_moe.search.agreement import agree_on_tables, assert_same_on_all_ranks
from dist_moe.search.assignment import AssignmentSearch, AssignmentSearchConfig
from dist_moe.search.moves import Swap
from dist_moe.search.permutation import PermutationSearch, PermutationSearchConfig, relax_together
from dist_moe.search.placement import PlacementChoice, agree_on_placement, choose_placement, rank_imbalance
from dist_moe.search.scores import BatchLoss, RecordedScores, StreamedScores
from dist_moe.search.slot_table import SlotTable, give_branches_slots
from dist_moe.search.swap import SearchReport, SwapSearch, SwapSearchConfig

__all__ = [
    "AssignmentSearch",
    "AssignmentSearchConfig",
    "BatchLoss",
    "PermutationSearch",
    "PermutationSearchConfig",
    "PlacementChoice",
    "RecordedScores",
    "SearchReport",
    "SlotTable",
    "StreamedScores",
    "Swap",
    "SwapSearch",
    "SwapSearchConfig",
    "agree_on_placement",
    "agree_on_tables",
    "assert_same_on_all_ranks",
    "choose_placement",
    "give_branches_slots",
    "rank_imbalance",
    "relax_together",
]

"""Search over slot -> expert tables, coordinated by all ranks."""

from dist_moe.search.agreement import agree_on_table, assert_same_on_all_ranks
from dist_moe.search.permutation import PermutationSearch, PermutationSearchConfig

__all__ = ["PermutationSearch", "PermutationSearchConfig", "agree_on_table", "assert_same_on_all_ranks"]

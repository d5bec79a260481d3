"""The ragged assignment of tokens to slots and experts, as data and pure functions on it."""

from dist_moe.routing.pairs import Pairs, union_of_routes
from dist_moe.routing.route import Route
from dist_moe.routing.slot_map import (
    HardMap,
    SlotMap,
    SoftPermutation,
    StraightThroughPermutation,
    check_tables,
    mix,
)

__all__ = [
    "HardMap",
    "Pairs",
    "Route",
    "SlotMap",
    "SoftPermutation",
    "StraightThroughPermutation",
    "check_tables",
    "mix",
    "union_of_routes",
]

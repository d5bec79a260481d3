"""The ragged assignment of tokens to slots and experts, as data and pure functions on it."""

from dist_moe.routing.pairs import Pairs, union_of_routes
from dist_moe.routing.permutation import (
    HardPermutation,
    Permutation,
    SoftPermutation,
    StraightThroughPermutation,
    mix,
)
from dist_moe.routing.route import Route

__all__ = [
    "HardPermutation",
    "Pairs",
    "Permutation",
    "Route",
    "SoftPermutation",
    "StraightThroughPermutation",
    "mix",
    "union_of_routes",
]

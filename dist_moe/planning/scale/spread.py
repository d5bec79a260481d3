"""Where ranks are, and the expected spread of tokens over them: rows, pairs and sums that each exchange sends.

Each of G gates chooses k of E experts uniformly, independent of the others. A part of m = E / n
experts is not needed by a gate with probability C(E - m, k) / C(E, k) = prod_{i<m} (E - k - i) / (E - i), which
with many experts is (1 - 1/n)^k. A token then needs n (1 - q^G) of n parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from dist_moe.errors import UserError


@dataclass(frozen=True)
class Layout:
    """``nodes`` of ``per_node`` ranks; experts are split over ``group`` consecutive ranks.

    Raises UserError where a group is neither a whole number of nodes nor an even part of one.
    """

    nodes: int
    per_node: int
    group: int

    def __post_init__(self) -> None:
        for name, value in (("nodes", self.nodes), ("gpus", self.per_node), ("expert_parallel_size", self.group)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.ranks % self.group:
            divisors = ", ".join(str(n) for n in range(1, self.ranks + 1) if self.ranks % n == 0)
            raise UserError(
                f"parallel.expert_parallel_size={self.group} does not divide the {self.nodes} x {self.per_node} = "
                f"{self.ranks} rank(s) of --nodes x --gpus; choose one of {divisors}"
            )
        if self.group % self.per_node and self.per_node % self.group:
            raise UserError(
                f"parallel.expert_parallel_size={self.group} is neither a multiple nor a divisor of "
                f"--gpus={self.per_node}; choose one that is, so that groups are whole nodes or within a node"
            )

    @property
    def ranks(self) -> int:
        """Number of all ranks."""
        return self.nodes * self.per_node

    @property
    def nodes_of_group(self) -> int:
        """Number of nodes over which a group is spread."""
        return max(1, self.group // self.per_node)

    @property
    def group_in_node(self) -> int:
        """Number of a group's ranks on one node."""
        return min(self.group, self.per_node)

    @property
    def groups_per_node(self) -> int:
        """Number of groups of which a node has ranks."""
        return self.per_node // self.group_in_node

    @property
    def copies(self) -> int:
        """Number of groups, each of which has all experts."""
        return self.ranks // self.group


@dataclass(frozen=True)
class Sent:
    """An amount on one rank: all of it, the part that leaves the rank, and the part of this that leaves the node."""

    all: float
    away: float
    across: float


@dataclass(frozen=True)
class Level:
    """One level of the two-level exchange on one rank: token rows, the pairs listed with them, sums that come back."""

    rows: Sent
    pairs: Sent
    sums: Sent


@dataclass(frozen=True)
class Spread:
    """Means over ranks. ``pairs``: (token, expert) pairs of a flat exchange. ``across``, ``within``: the two levels;
    None where the level has one rank only."""

    pairs: Sent
    across: Level | None
    within: Level | None


def missed(experts: int, parts: int, k: float) -> float:
    """Return the probability that k different experts out of ``experts`` leave out one of ``parts`` even parts."""
    size = experts // parts
    return prod(max(0.0, experts - k - i) / (experts - i) for i in range(size))


def missed_by_draws(experts: int, parts: int, k: float, skew: float) -> float:
    """Return :func:`missed` for a part drawn ``skew`` times as often as the mean, one expert after the other."""
    size, whole = experts / parts, int(k)
    draws = [max(0.0, 1 - skew * size / (experts - draw)) for draw in range(min(whole + 1, experts))]
    return prod(draws[:whole]) * (draws[whole] ** (k - whole) if k > whole else 1.0)


def distinct_parts(experts: int, parts: int, k: float, gates: int = 1) -> float:
    """Return the number of parts that a token needs, on average, over all ``gates``."""
    return parts * (1 - missed(experts, parts, k) ** gates)


def expected_spread(experts: int, k: float, gates: int, tokens: float, layout: Layout) -> Spread:
    """Return the spread of ``tokens`` per rank under uniform choices."""
    nodes, inner = layout.nodes_of_group, layout.group_in_node
    pairs = tokens * distinct_parts(experts, experts, k, gates)  # different experts of a token

    def level(parts: int, peers: int, is_across: bool) -> Level | None:
        if peers == 1:
            return None
        rows = tokens * distinct_parts(experts, parts, k, gates)
        sums = tokens * gates * distinct_parts(experts, parts, k)
        away = 1 - 1 / peers
        return Level(*(Sent(n, n * away, n * away if is_across else 0.0) for n in (rows, pairs, sums)))

    away, across = pairs * (1 - 1 / layout.group), pairs * (1 - 1 / nodes)
    return Spread(Sent(pairs, away, across), level(nodes, nodes, True), level(layout.group, inner, False))

"""The expected spread of tokens over ranks: rows, pairs and sums that each exchange sends.

Each of G gates chooses k of E experts uniformly, independent of the others. A part of m = E / n
experts is not needed by a gate with probability C(E - m, k) / C(E, k) = prod_{i<m} (E - k - i) / (E - i), which
with many experts is (1 - 1/n)^k. A token then needs n (1 - q^G) of n parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from dist_moe.planning.scale.layout import Layout


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


def experts_per_token(experts: int, k: float, gates: int) -> float:
    """Return the number of different experts that a token needs, on average, over all gates."""
    return distinct_parts(experts, experts, k, gates)


def expected_spread(experts: int, k: float, gates: int, tokens: float, layout: Layout) -> Spread:
    """Return the spread of ``tokens`` per rank under uniform choices."""
    nodes, inner = layout.nodes_of_group, layout.group_in_node
    pairs = tokens * experts_per_token(experts, k, gates)

    def level(parts: int, peers: int, is_across: bool) -> Level | None:
        if peers == 1:
            return None
        rows = tokens * distinct_parts(experts, parts, k, gates)
        sums = tokens * gates * distinct_parts(experts, parts, k)
        return Level(*(_evenly(number, peers, is_across) for number in (rows, pairs, sums)))

    away, across = pairs * (1 - 1 / layout.group), pairs * (1 - 1 / nodes)
    return Spread(Sent(pairs, away, across), level(nodes, nodes, True), level(layout.group, inner, False))


def _evenly(number: float, peers: int, is_across: bool) -> Sent:
    away = number * (1 - 1 / peers)
    return Sent(number, away, away if is_across else 0.0)

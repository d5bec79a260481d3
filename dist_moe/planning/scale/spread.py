"""What tokens send where: rows, pairs and sums of each exchange, expected or counted from real choices.

Expected: each of G gates chooses k of E experts uniformly, independent of the others. A part of m = E / n
experts is not needed by a gate with probability C(E - m, k) / C(E, k) = prod_{i<m} (E - k - i) / (E - i), which
with many experts is (1 - 1/n)^k. A token then needs n (1 - q^G) of n parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from dist_moe.planning.scale.layout import Layout

Choices = NDArray[np.bool_]
"""(R, G, T, E): whether gate g of rank r gives token t's expert e a weight that is not 0."""

Places = NDArray[np.int_]


@dataclass(frozen=True)
class Sent:
    """Of one rank and one kind of thing: all of it, and what leaves the rank, and what of this leaves the node."""

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
    """Probability that k different experts out of ``experts`` leave out one of ``parts`` even parts."""
    size = experts // parts
    return prod(max(0.0, experts - k - i) / (experts - i) for i in range(size))


def missed_by_draws(experts: int, parts: int, k: float, skew: float) -> float:
    """The same for a part that is drawn ``skew`` times as often as the mean, one expert after the other."""
    size, whole = experts / parts, int(k)
    draws = [max(0.0, 1 - skew * size / (experts - draw)) for draw in range(min(whole + 1, experts))]
    return prod(draws[:whole]) * (draws[whole] ** (k - whole) if k > whole else 1.0)


def distinct_parts(experts: int, parts: int, k: float, gates: int = 1) -> float:
    """Parts that a token needs, on average, over all ``gates``."""
    return parts * (1 - missed(experts, parts, k) ** gates)


def experts_per_token(experts: int, k: float, gates: int) -> float:
    """Different experts that a token needs, on average, over all gates."""
    return distinct_parts(experts, experts, k, gates)


def expected_spread(experts: int, k: float, gates: int, tokens: float, layout: Layout) -> Spread:
    """For ``tokens`` per rank and uniform choices."""
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


def counted_spread(chosen: Choices, layout: Layout) -> Spread:
    """The same from what was chosen on all ranks of one group, experts in the order of their ranks: exact."""
    group, nodes, inner = layout.group, layout.nodes_of_group, layout.group_in_node
    assert len(chosen) == group
    pairs_RTE: Choices = np.any(chosen, axis=1)
    rank_R, node_R, local_R = (np.arange(group), np.arange(group) // inner, np.arange(group) % inner)
    all_pairs = _by_part(pairs_RTE, group, counted=True)
    pairs = replace(_leaving(all_pairs, rank_R, rank_R), across=_leaving(all_pairs, node_R, node_R).away)
    # Within a node, a token of any node stands on the rank of its own local rank.
    across = _level(chosen, nodes, np.arange(nodes), node_R, True) if nodes > 1 else None
    within = _level(chosen, group, local_R, local_R, False) if inner > 1 else None
    return Spread(pairs, across, within)


def _level(chosen: Choices, parts: int, place_of_part: Places, place_of_rank: Places, is_across: bool) -> Level:
    pairs_RTE: Choices = np.any(chosen, axis=1)
    per_part = (_by_part(pairs_RTE, parts), _by_part(pairs_RTE, parts, counted=True), _by_part(chosen, parts))
    sent = (_leaving(numbers, place_of_part, place_of_rank) for numbers in per_part)
    return Level(*(replace(one, across=one.away if is_across else 0.0) for one in sent))


def _by_part(wanted: Choices, parts: int, counted: bool = False) -> Places:
    """(R, ..., E) -> (R, parts): tokens (of a gate each, if these are told apart) that want any expert of the part;
    ``counted``: once for each such expert."""
    of_part = wanted.reshape(len(wanted), -1, parts, wanted.shape[-1] // parts)
    return (of_part.sum(axis=-1) if counted else of_part.any(axis=-1)).sum(axis=1)


def _leaving(numbers: Places, place_of_part: Places, place_of_rank: Places) -> Sent:
    """Means over ranks of (R, parts) numbers: of all, and of those whose part is at another place than the rank."""
    away = numbers[place_of_rank[:, None] != place_of_part[None]].sum()
    return Sent(float(numbers.sum()) / len(numbers), float(away) / len(numbers), 0.0)

"""The spread of choices that were really made: the oracle of the expected one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dist_moe.planning.scale.spread import Layout, Level, Sent, Spread

Choices = NDArray[np.bool_]
"""(R, G, T, E): whether gate g of rank r gives token t's expert e a weight that is not 0."""

Places = NDArray[np.int_]


def counted_spread(chosen: Choices, layout: Layout) -> Spread:
    """Return the exact spread of what was chosen on all ranks of one group, experts in the order of their ranks."""
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

"""Methods by which the experts of a layer become fewer, by name: which are together, and what becomes of a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dist_moe.recipes.merge_compress.calibrate import LayerStatistics
from dist_moe.recipes.merge_compress.group import (
    Leaders,
    Linkage,
    Numbers,
    clusters,
    join_leaders,
    largest,
    random_groups,
)


@dataclass(frozen=True)
class LayerChoice:
    """A layer before a method: its statistics, the number of groups to make, and the method's options.

    ``similarity_EE``: of its experts, None for methods that do not join experts to leaders.
    """

    seen: LayerStatistics
    similarity_EE: Numbers | None
    count: int
    linkage: Linkage
    seed: Sequence[int]


@dataclass(frozen=True)
class Method:
    """A method. ``groups`` gives the groups of a layer, by their leaders.

    ``ranks_usage``: leaders are the most used experts, so that layers can be compared. ``joins``: others join the
    leader that is most similar. ``needs_outputs``: it looks at the experts' results on all tokens. ``prunes``: leaders
    are kept, others removed. ``plain_means``: a group's experts count alike, not by their usage.
    """

    text: str
    groups: Callable[[LayerChoice], Leaders]
    ranks_usage: bool = False
    joins: bool = False
    needs_outputs: bool = False
    prunes: bool = False
    plain_means: bool = False


def _most_used_lead(layer: LayerChoice) -> Leaders:
    assert layer.similarity_EE is not None
    return join_leaders(largest(layer.seen.usage_E, layer.count), layer.similarity_EE)


def _clusters_of_results(layer: LayerChoice) -> Leaders:
    assert layer.seen.output_EF is not None
    return clusters(layer.seen.output_EF, layer.count, layer.seen.usage_E, layer.linkage)


def _random(layer: LayerChoice) -> Leaders:
    return random_groups(layer.count, layer.seen.usage_E, layer.seed)


def _kept(score_E: Numbers | None, count: int) -> Leaders:
    """Return the experts of the largest scores, alone; what is removed stands beside the first of them."""
    assert score_E is not None
    return join_leaders(largest(score_E, count), np.zeros((len(score_E), len(score_E))))


METHODS = {
    "m_smoe": Method(
        "the most used experts lead, the others join the most similar one; means weighted by usage",
        _most_used_lead,
        ranks_usage=True,
        joins=True,
    ),
    "hc_smoe": Method(
        "hierarchical clusters of the experts' mean results; means weighted by usage",
        _clusters_of_results,
        needs_outputs=True,
    ),
    "uniform": Method(
        "the groups of m_smoe; plain means", _most_used_lead, ranks_usage=True, joins=True, plain_means=True
    ),
    "random": Method("random groups; means weighted by usage", _random),
    "prune_usage": Method(
        "the most used experts are kept, the others are removed",
        lambda layer: _kept(layer.seen.usage_E, layer.count),
        ranks_usage=True,
        prunes=True,
    ),
    "reap": Method(
        "experts with the largest results, as weighted by the gate, are kept, the others are removed",
        lambda layer: _kept(layer.seen.reap_E, layer.count),
        needs_outputs=True,
        prunes=True,
    ),
}

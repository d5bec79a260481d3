"""Groups of experts that become one. A grouping is ``leader_E``: for each expert of a layer the leader of its group,
which is an expert of the group and its own leader.

M-SMoE (Li et al.: Merge, Then Compress, ICLR 2024): the most used experts lead, every other one joins the leader most
similar to it; how many lead in a layer follows from its usage (globally), or is the same in each (uniformly).
HC-SMoE (Chen et al., 2024): hierarchical clusters of the experts' mean outputs. Ties go to the layer that has fewer so
far, then to the lower one, and within a layer to the lower expert, so that all ranks and layouts find the same groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Leaders = NDArray[np.int64]
Numbers = NDArray[np.float64]
Linkage = Literal["average", "ward", "complete", "single"]


def global_counts(score_LE: Sequence[Numbers], experts: int, excluded: Sequence[int] = ()) -> list[int]:
    """Return how many groups each layer gets, ``experts`` on average over the layers that are not excluded.

    ``score_LE``: usage, for each layer (E,). Each layer's are divided by the largest; the largest of all lead. A layer
    keeps at least one, an ``excluded`` one all of its experts. Equal scores are dealt to the layers in turn: gates that
    use all experts alike, such as the softmax, leave each layer as many.
    """
    counts = [0 if layer not in excluded else len(score_E) for layer, score_E in enumerate(score_LE)]
    ranked = []
    for layer in (layer for layer, count in enumerate(counts) if not count):
        score_E = score_LE[layer] / max(score_LE[layer].max(), np.finfo(np.float64).tiny)
        score_E[score_E.argmax()] = np.inf  # even where others are as large
        ranked += [(-score, place, layer) for place, score in enumerate(np.sort(score_E)[::-1])]
    for _, _, layer in sorted(ranked)[: experts * (len(counts) - len(set(excluded)))]:
        counts[layer] += 1
    return counts


def largest(score_E: Numbers, count: int) -> Leaders:
    """Return the ``count`` experts of the largest scores, by rising id; of equal ones the lower."""
    return np.sort(np.argsort(-score_E, kind="stable")[:count])


def join_leaders(leaders: Leaders, similarity_EE: Numbers) -> Leaders:
    """Return the groups in which every expert is with the leader most similar to it, of equal ones the lower."""
    leader_E = leaders[similarity_EE[:, leaders].argmax(axis=1)]
    leader_E[leaders] = leaders
    return leader_E


def clusters(output_EF: Numbers, count: int, usage_E: Numbers, method: Linkage = "average") -> Leaders:
    """Return ``count`` hierarchical clusters of the experts' mean outputs, each led by its most used expert."""
    from scipy.cluster.hierarchy import cut_tree, linkage

    if count == len(usage_E):  # a layer of one expert has no distances
        return np.arange(count)
    return led_by_usage(cut_tree(linkage(output_EF, method), [count]).squeeze(1), usage_E)


def random_groups(count: int, usage_E: Numbers, seed: Sequence[int]) -> Leaders:
    """Return ``count`` random groups, none of them empty, each led by its most used expert."""
    generator, experts = np.random.default_rng(seed), len(usage_E)
    label_E = np.concatenate([np.arange(count), generator.integers(count, size=experts - count)])
    return led_by_usage(generator.permutation(label_E), usage_E)


def led_by_usage(label_E: NDArray[np.int64], usage_E: Numbers) -> Leaders:
    """Return groups that are given by labels, each led by its most used expert, of equal ones the lower."""
    leader_E = np.empty(len(label_E), dtype=np.int64)
    for label in np.unique(label_E):
        members = np.flatnonzero(label_E == label)
        leader_E[members] = members[usage_E[members].argmax()]
    return leader_E

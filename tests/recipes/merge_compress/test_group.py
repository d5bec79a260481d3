"""Groups against brute force, with ties, and without the fault of the released uniform routine."""

from __future__ import annotations

import numpy as np
import pytest

from dist_moe.recipes.merge_compress.group import (
    Leaders,
    Numbers,
    clusters,
    global_counts,
    join_leaders,
    largest,
    led_by_usage,
    random_groups,
)

LAYERS, EXPERTS = 4, 7


def naive_global(usage_LE: list[Numbers], average: int, excluded: tuple[int, ...]) -> list[int]:
    """M-SMoE's: all of excluded layers and the largest of each other are 1; count what is above the threshold."""
    scaled = [[1.0 if i in excluded else u / max(usage_E) for u in usage_E] for i, usage_E in enumerate(usage_LE)]
    pooled = sorted((u for layer in scaled for u in layer), reverse=True)
    rank = average * (len(usage_LE) - len(excluded)) + sum(len(usage_LE[layer]) for layer in excluded)
    threshold = pooled[rank] if rank < len(pooled) else -1.0
    return [sum(u > threshold for u in layer) for layer in scaled]


def naive_groups(usage_E: Numbers, similarity_EE: Numbers, count: int) -> list[int]:
    every = range(len(usage_E))
    leaders = [e for e in every if sum(other > usage_E[e] for other in usage_E) < count]
    return [e if e in leaders else max(leaders, key=lambda leader: similarity_EE[e, leader]) for e in every]


def released_uniform_groups(usage_E: Numbers, similarity_EE: Numbers, count: int) -> Leaders:
    """The release's: its loop is over the indices from ``count`` on, not over the experts that do not lead."""
    leader_E, leaders = np.arange(len(usage_E)), np.argsort(-usage_E)[:count]
    for expert in range(count, len(usage_E)):
        if expert not in leaders:
            leader_E[expert] = max(leaders, key=lambda leader: similarity_EE[expert, leader])
    return leader_E


@pytest.mark.parametrize("excluded", [(), (0,), (1, 3)])
@pytest.mark.parametrize("average", [1, 3, EXPERTS])
def test_groups_equal_brute_force(average: int, excluded: tuple[int, ...]) -> None:
    random = np.random.default_rng(average)
    for _ in range(20):
        usage_LE = list(random.random((LAYERS, EXPERTS)))
        counts = global_counts(usage_LE, average, excluded)
        assert counts == naive_global(usage_LE, average, excluded)
        assert sum(counts) == average * (LAYERS - len(excluded)) + EXPERTS * len(excluded)
        similarity_EE = random.random((EXPERTS, EXPERTS))
        for usage_E, count in zip(usage_LE, counts, strict=True):
            leader_E = join_leaders(largest(usage_E, count), similarity_EE)
            assert leader_E.tolist() == naive_groups(usage_E, similarity_EE, count)


def test_uniform_groups_leave_no_expert_alone_by_its_index() -> None:
    """The most used experts are the last ones, so that those of low indices do not lead."""
    usage_E, similarity_EE = np.array([0.1, 0.05, 0.2, 0.3, 0.35]), np.eye(5)
    similarity_EE[0, 4] = similarity_EE[1, 3] = similarity_EE[2, 4] = 0.5
    assert len(np.unique(released_uniform_groups(usage_E, similarity_EE, 2))) == 4
    assert join_leaders(largest(usage_E, 2), similarity_EE).tolist() == [4, 3, 4, 3, 4]


def test_ties_are_settled_by_layer_and_expert() -> None:
    """Layers whose experts are all used alike, as by a softmax gate, keep as many each."""
    even = [np.full(4, 0.25) for _ in range(3)]
    assert global_counts(even, 2) == [2, 2, 2]
    assert global_counts([np.full(2, 0.5), *even[:2]], 3) == [2, 4, 3]
    assert global_counts([np.zeros(3), np.array([0.5, 0.25, 0.25])], 1) == [1, 1]
    assert join_leaders(largest(even[0], 2), np.ones((4, 4))).tolist() == [0, 1, 0, 0]


def naive_clusters(point_EF: Numbers, count: int) -> list[frozenset[int]]:
    """Average linkage: the two clusters of the least mean distance become one, until there are ``count``."""

    def distance(pair: tuple[frozenset[int], frozenset[int]]) -> float:
        return float(np.mean([np.linalg.norm(point_EF[i] - point_EF[j]) for i in pair[0] for j in pair[1]]))

    found = [frozenset([e]) for e in range(len(point_EF))]
    while len(found) > count:
        near = min(((a, b) for i, a in enumerate(found) for b in found[i + 1 :]), key=distance)
        found = [c for c in found if c not in near] + [near[0] | near[1]]
    return found


@pytest.mark.parametrize("count", [1, 3, 6, EXPERTS])
def test_clusters_equal_brute_force(count: int) -> None:
    random = np.random.default_rng(5)
    point_EF, usage_E = random.normal(size=(EXPERTS, 3)), random.random(EXPERTS)
    leader_E = clusters(point_EF, count, usage_E)
    groups = [frozenset(np.flatnonzero(leader_E == leader).tolist()) for leader in np.unique(leader_E)]
    assert set(groups) == set(naive_clusters(point_EF, count))
    assert [max(group, key=lambda e: usage_E[e]) for group in groups] == np.unique(leader_E).tolist()


def test_a_layer_of_one_expert_is_a_cluster() -> None:
    assert clusters(np.ones((1, 3)), 1, np.ones(1)).tolist() == [0]


def test_random_groups_are_drawn_by_the_seed_and_none_is_empty() -> None:
    usage_E = np.arange(8) / 28
    one, again, other = (random_groups(3, usage_E, (seed, 1)) for seed in (1, 1, 2))
    assert one.tolist() == again.tolist() != other.tolist()
    assert all(len(np.unique(random_groups(7, usage_E, (seed,)))) == 7 for seed in range(20))
    assert led_by_usage(np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.1, 0.2])).tolist() == [0, 1, 0, 1]

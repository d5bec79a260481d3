"""Drawn neighbours: which edges, how often, and how much memory they take."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_moe.data.graphs import NeighbourSampler, SampledGraph
from dist_moe.data.graphs.sampling import drawn_positions

NODES = 40
STEPS = [np.array([step]) for step in range(3)]


def edges() -> NDArray[np.int64]:
    """Some repeated, some loops; node 0 has an edge from each of 30, the last node has none."""
    drawn = np.random.default_rng(0).integers(NODES - 1, size=(2, 120))
    hub = np.stack([np.arange(1, 31), np.zeros(30, dtype=np.int64)])
    return np.concatenate([drawn, hub, drawn[:, :5], [[3, 4], [3, 4]]], axis=1)


def sampler(*neighbours: int) -> NeighbourSampler:
    return NeighbourSampler(torch.arange(NODES).unsqueeze(1), torch.from_numpy(edges()), neighbours)


def edges_into(sample: SampledGraph, hop: int) -> dict[int, Counter[int]]:
    """The sources of each target of a hop, by their numbers in the graph."""
    found: Any = sample.edges.hops[hop]
    node_S = sample.x_ND[:, 0]
    into = {int(node): Counter[int]() for node in node_S[: found.targets]}
    for source, target in found.edge_2E.T.tolist():
        assert source < found.sources
        assert target < found.targets
        into[int(node_S[target])][int(node_S[source])] += 1
    return into


def test_a_sample_is_a_part_of_the_graph_its_seeds_first() -> None:
    whole = {v: Counter(edges()[0][edges()[1] == v].tolist()) for v in range(NODES)}
    limits = (3, 5)
    for step in STEPS:
        sample = sampler(*limits).sample(np.array([7, 0, 39]), step)
        node_S = sample.x_ND[:, 0].tolist()
        assert node_S[:3] == [7, 0, 39]
        assert len(set(node_S)) == len(node_S)
        assert sample.edges.degree_S.tolist() == [sum(n for u, n in whole[v].items() if u != v) for v in node_S]
        reached = set(node_S[:3])
        for hop, limit in enumerate(limits):
            into = edges_into(sample, hop)
            assert set(into) == reached
            for (v, drawn), scale in zip(into.items(), sample.edges.hops[hop].scale_V.tolist(), strict=True):
                assert drawn <= whole[v]  # no edge twice
                assert drawn.total() == min(limit, whole[v].total())
                assert scale == np.float32(whole[v].total() / drawn.total() if drawn else 1)
            reached |= {u for drawn in into.values() for u in drawn}
            assert sample.edges.hops[hop].sources == len(reached)


def test_draws_depend_on_step_and_node_alone() -> None:
    ours = sampler(2, 2)
    one, again, other = (ours.sample(np.array([0, 1, 2]), STEPS[i]) for i in (0, 0, 1))
    assert torch.equal(one.x_ND, again.x_ND)
    assert not torch.equal(one.x_ND, other.x_ND)
    beside = sampler(2, 2).sample(np.array([9, 0]), STEPS[0])
    assert edges_into(beside, 0)[0] == edges_into(one, 0)[0]
    assert edges_into(ours.sample(np.array([], dtype=np.int64), STEPS[0]), 1) == {}


def test_every_set_of_edges_is_equally_likely() -> None:
    draws, count, limit = 2000, 5, 3
    node_M, count_M = np.arange(draws, dtype=np.uint64), np.full(draws, count)
    by_node = drawn_positions(node_M, count_M, limit, np.uint64(1))
    by_step = np.concatenate([drawn_positions(node_M[:1], count_M[:1], limit, key) for key in node_M])
    for drawn_ML in (by_node, by_step):
        found = Counter(tuple(sorted(row)) for row in drawn_ML.tolist())
        assert set(found) == set(combinations(range(count), limit))
        expected = draws / len(found)
        chi_square = sum((n - expected) ** 2 / expected for n in found.values())
        assert chi_square < 27.9  # 9 degrees of freedom: one of a thousand is greater


def test_memory_grows_with_the_sample_not_with_the_graph() -> None:
    peaks = []
    for nodes in (20_000, 400_000):
        source_E = np.random.default_rng(0).integers(nodes, size=4 * nodes)
        target_E = np.concatenate([np.zeros(2 * nodes, dtype=np.int64), np.arange(2 * nodes) % nodes])
        edge_2E = torch.from_numpy(np.stack([source_E, target_E]))
        ours = NeighbourSampler(torch.zeros(nodes, 1), edge_2E, (5, 5))
        tracemalloc.start()
        sample = ours.sample(np.arange(20), STEPS[0])  # node 0 has more edges than all others together
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(sample.x_ND) <= 20 * (1 + 5 + 25)
    assert peaks[1] < 1.5 * peaks[0] < 200_000

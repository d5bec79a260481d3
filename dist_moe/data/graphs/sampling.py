"""Neighbours drawn at random: a step on a large graph takes a sample around its nodes instead of the whole graph.

Around the nodes of a step a few neighbours of each are drawn, around all nodes so far again a few, hop by hop
(Hamilton et al. 2017, algorithm 2). A layer of a network is then computed along the edges of one hop, the outermost
first. Draws are uniform, without replacement, and depend on the step and on the node alone: whichever rank has a node
draws the same neighbours for it. PyG's own loader needs pyg-lib or torch-sparse, which are compiled apart from it.

Time and memory of a sample grow with its edges, not with the graph; the edges ordered by target, once for a graph.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class SampledHop:
    """Edges into the first ``targets`` nodes of a sample, all from its first ``sources`` nodes.

    ``edge_2E``: positions in the sample, source over target. ``scale_V``: edges into each target in the graph, over
    those that were drawn; 1 without any. It makes sums over drawn edges right on average.
    """

    edge_2E: Tensor
    scale_V: Tensor
    targets: int
    sources: int


@dataclass(frozen=True)
class SampledEdges:
    """Edges of a sample. ``hops``: from the nodes of the step outwards.

    ``degree_S``: edges into each of the sample's nodes from other nodes, in the whole graph, int64.
    """

    hops: tuple[SampledHop, ...]
    degree_S: Tensor


@dataclass(frozen=True)
class SampledGraph:
    """The part of a graph that was drawn: the nodes of the step first, then those of each hop. ``x_ND``: of these."""

    x_ND: Tensor
    edges: SampledEdges

    def on(self, device: torch.device) -> SampledGraph:
        """Return the sample on a device."""
        hops = (replace(h, edge_2E=h.edge_2E.to(device), scale_V=h.scale_V.to(device)) for h in self.edges.hops)
        return SampledGraph(self.x_ND.to(device), SampledEdges(tuple(hops), self.edges.degree_S.to(device)))


class NeighbourSampler:
    """Draws at most ``neighbours[k]`` of the edges into each node at hop k of a graph (N, D), (2, E)."""

    def __init__(self, x_ND: Tensor, edge_2E: Tensor, neighbours: tuple[int, ...]) -> None:
        self.neighbours = neighbours
        source_E, target_E = edge_2E.numpy()
        count = len(x_ND)
        self._x_ND = x_ND
        self._source_E = source_E[np.argsort(target_E, kind="stable")]
        self._first_N = np.concatenate([[0], np.bincount(target_E, minlength=count).cumsum()])
        self._degree_N = np.bincount(target_E[source_E != target_E], minlength=count)

    def sample(self, node_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> SampledGraph:
        """Return the sample around different nodes, drawn anew for each step: for each other ``step_index``."""
        digest = hashlib.blake2b(step_index.astype("<i8").tobytes(), digest_size=8).digest()
        key = np.uint64(int.from_bytes(digest, "little"))
        near_S, hops = node_B, []
        for limit in self.neighbours:
            target_E, source_E, scale_V = self._drawn(near_S, limit, key)
            targets = len(near_S)
            near_S = np.concatenate([near_S, np.setdiff1d(source_E, near_S)])
            order_S = np.argsort(near_S)
            place_E = order_S[np.searchsorted(near_S, source_E, sorter=order_S)]
            edge_2E = torch.from_numpy(np.stack([place_E, target_E]))
            hops.append(SampledHop(edge_2E, torch.from_numpy(scale_V), targets, len(near_S)))
        edges = SampledEdges(tuple(hops), torch.from_numpy(self._degree_N[near_S]))
        return SampledGraph(self._x_ND[torch.from_numpy(near_S)], edges)

    def _drawn(
        self, node_V: NDArray[np.int64], limit: int, key: np.uint64
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Return the place in ``node_V`` and the source of each drawn edge, fp32 scales of the nodes."""
        first_V = self._first_N[node_V]
        count_V = self._first_N[node_V + 1] - first_V
        few, many = np.flatnonzero(count_V <= limit), np.flatnonzero(count_V > limit)
        ends = count_V[few].cumsum()
        all_of_few = np.arange(count_V[few].sum()) - np.repeat(ends - count_V[few], count_V[few])
        drawn_ML = drawn_positions(node_V[many].astype(np.uint64), count_V[many], limit, key)
        target_E = np.concatenate([np.repeat(few, count_V[few]), np.repeat(many, limit)])
        position_E = np.concatenate([all_of_few, drawn_ML.ravel()])
        scale_V = np.maximum(count_V / limit, 1).astype(np.float32)
        return target_E, self._source_E[first_V[target_E] + position_E], scale_V


def drawn_positions(
    node_M: NDArray[np.uint64], count_M: NDArray[np.int64], limit: int, key: np.uint64
) -> NDArray[np.int64]:
    """Return (M, limit) different positions below ``count_M``, each set equally likely (Floyd's algorithm).

    A row depends on ``key``, its node and its count alone. Counts must be greater than ``limit``.
    """
    drawn_ML = np.empty((len(node_M), limit), dtype=np.int64)
    start_M = _mixed(key + node_M * _GOLDEN)
    for j, salt in enumerate(np.arange(limit, dtype=np.uint64) * _GOLDEN):
        last_M = count_M - limit + j
        position_M = (_mixed(start_M + salt) % (last_M + 1).astype(np.uint64)).astype(np.int64)
        taken_M = (drawn_ML[:, :j] == position_M[:, None]).any(axis=1)
        drawn_ML[:, j] = np.where(taken_M, last_M, position_M)
    return drawn_ML


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the numbers hashed by the finaliser of SplitMix64 (Steele et al. 2014)."""
    bits = (bits + _GOLDEN).astype(np.uint64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

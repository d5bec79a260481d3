"""Balanced k-means: clusters of points whose sizes differ by one at most, as Gururangan et al. (c-BTM, 2023) use them.

Each iteration assigns the points to the centres at the least total cost that equal sizes allow, then moves each centre
to the mean of its points. Many points are seen chunk by chunk, the centres carried over from one chunk to the next.

The assignment is exact: a transportation problem with few sinks. Every point begins at its cheapest cluster; then, as
long as a cluster has too many, one unit moves along the cheapest path of clusters from it to one that can take more, at
each edge a -> b the point of a that loses least by going to b. Such paths keep an assignment the cheapest one of its
sizes (successive shortest paths, Ahuja, Magnanti, Orlin: Network Flows, 1993, chapter 9). Prices of the clusters that
certify this carry over, so that the next assignment, to centres that have hardly moved, begins nearly balanced.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

_ROUNDING = 1e-12
"""Share of the largest cost below which a gain is taken for rounding."""


@dataclass(frozen=True)
class Clustering:
    """``centre_KD``: fp64. ``cluster_N``: int64, the cluster of each point, in sizes that differ by one at most."""

    centre_KD: NDArray[np.float64]
    cluster_N: Ints


def squared_distances(point_ND: Floats, centre_KD: Floats) -> NDArray[np.float64]:
    """Return (N, K) squared Euclidean distances, fp64."""
    point_ND, centre_KD = point_ND.astype(np.float64), centre_KD.astype(np.float64)
    norm_N1, norm_K = (point_ND**2).sum(axis=1, keepdims=True), (centre_KD**2).sum(axis=1)
    return np.maximum(norm_N1 - 2 * point_ND @ centre_KD.T + norm_K, 0.0)


def nearest(point_ND: Floats, centre_KD: Floats) -> Ints:
    """Return (N,) the cluster of the nearest centre, however many points it gets: the assignment at inference."""
    return squared_distances(point_ND, centre_KD).argmin(axis=1)


def balanced_k_means(
    point_ND: Floats, count: int, *, seed: int, chunk: int = 50_000, iterations: int = 20, tolerance: float = 1e-3
) -> Clustering:
    """Return ``count`` clusters of points, which come in random order, ``chunk`` at a time.

    On each chunk there are up to ``iterations``, until the centres together move by less than ``tolerance`` (a squared
    distance). At last all chunks are assigned to the final centres. Raises ValueError for fewer points than clusters.
    """
    if len(point_ND) < count:
        raise ValueError(f"{len(point_ND)} points cannot be {count} clusters")
    generator = np.random.Generator(np.random.PCG64(seed))
    # Only uniform doubles are drawn, so that the result does not hang on how a NumPy version shuffles.
    order_N = np.argsort(generator.random(len(point_ND)), kind="stable")
    chunks = np.array_split(order_N, max(1, len(point_ND) // max(chunk, count)))
    centre_KD = _distant_points(point_ND[chunks[0]], count, generator)
    for row_M in chunks:
        price_K = np.zeros(count)
        for _ in range(iterations):
            cost_MK = squared_distances(point_ND[row_M], centre_KD)
            cluster_M, price_K = balanced_assignment(cost_MK, *_bounds(len(row_M), count), price_K)
            means_KD = np.stack([point_ND[row_M[cluster_M == k]].mean(axis=0, dtype=np.float64) for k in range(count)])
            shift, centre_KD = ((means_KD - centre_KD) ** 2).sum(), means_KD
            if shift < tolerance:
                break
    cluster_N, seen, size_K = np.empty(len(point_ND), dtype=np.int64), 0, np.zeros(count, dtype=np.int64)
    for row_M in chunks:
        seen += len(row_M)
        least_K, most_K = (np.maximum(bound_K - size_K, 0) for bound_K in _bounds(seen, count))
        cost_MK = squared_distances(point_ND[row_M], centre_KD)
        cluster_N[row_M], _ = balanced_assignment(cost_MK, least_K, most_K)
        size_K += np.bincount(cluster_N[row_M], minlength=count)
    return Clustering(centre_KD, cluster_N)


def _bounds(points: int, count: int) -> tuple[Ints, Ints]:
    """Return (K,) the least and the largest sizes of clusters that differ by one at most."""
    return np.full(count, points // count), np.full(count, -(-points // count))


def _distant_points(point_ND: Floats, count: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return (K, D) of the points, each drawn by its squared distance from those before (k-means++)."""
    chosen = [int(generator.random() * len(point_ND))]
    least_N = np.full(len(point_ND), np.inf)
    while len(chosen) < count:
        least_N = np.minimum(least_N, squared_distances(point_ND, point_ND[chosen[-1:]])[:, 0])
        least_N[chosen] = 0
        weight_N = least_N if least_N.any() else np.isin(np.arange(len(point_ND)), chosen, invert=True).astype(float)
        total_N = np.cumsum(weight_N)
        chosen.append(int(np.searchsorted(total_N, generator.random() * total_N[-1], side="right")))
    return point_ND[chosen].astype(np.float64)


def balanced_assignment(
    cost_NK: Floats, least_K: Ints, most_K: Ints, price_K: Floats | None = None
) -> tuple[Ints, NDArray[np.float64]]:
    """Return (N,) the cluster of each point at the least total cost, and (K,) prices of the clusters that certify it.

    Cluster k gets at least ``least_K[k]`` and at most ``most_K[k]`` points, whose sums must enclose N. At the prices,
    no point would be cheaper elsewhere among assignments of these sizes. ``price_K``: any to begin with; good ones,
    such as those of similar costs, make it quick. Raises ValueError for sizes that N points cannot have.
    """
    if not least_K.sum() <= len(cost_NK) <= most_K.sum():
        raise ValueError(f"{len(cost_NK)} points do not fit {least_K.sum()} to {most_K.sum()} places")
    flow = _Flow(cost_NK.astype(np.float64), np.zeros(len(least_K)) if price_K is None else price_K)
    while flow.improve(flow.size_K > most_K, flow.size_K < most_K):
        pass
    while flow.improve(flow.size_K > least_K, flow.size_K < least_K):
        pass
    # Which clusters get the points that are left over is free: as long as another choice is cheaper, take it.
    while flow.improve(flow.size_K > least_K, flow.size_K < most_K, only_gains=True):
        pass
    distance_K, _ = flow.shortest_paths(np.ones(len(least_K), dtype=bool))
    return flow.cluster_N, -distance_K


class _Flow:
    """An assignment that is the cheapest of its sizes, and stays so while units move along cheapest paths.

    ``weight_KK``: what the cheapest move of one point from a cluster to another adds to the cost, inf if it has none.
    """

    def __init__(self, cost_NK: NDArray[np.float64], price_K: Floats) -> None:
        self._cost_NK = cost_NK
        self._least_gain = _ROUNDING * float(np.abs(cost_NK).max(initial=1.0))
        self.cluster_N: Ints = (cost_NK + price_K).argmin(axis=1)
        count = cost_NK.shape[1]
        self.size_K = np.bincount(self.cluster_N, minlength=count)
        # A heap for each edge a -> b, of points that are or have been in a; those that have left are passed over.
        self._heaps: list[list[list[tuple[float, int]]]] = []
        for a in range(count):
            row_M = np.flatnonzero(self.cluster_N == a)
            added_MK = cost_NK[row_M] - cost_NK[row_M, a : a + 1]
            self._heaps.append([list(zip(added_MK[:, b].tolist(), row_M.tolist(), strict=True)) for b in range(count)])
            for heap in self._heaps[a]:
                heapify(heap)
        self.weight_KK = np.full((count, count), np.inf)
        self._weigh(range(count))

    def improve(self, source_K: NDArray[np.bool_], sink_K: NDArray[np.bool_], *, only_gains: bool = False) -> bool:
        """Move a unit along the cheapest path from a source to a sink; return whether there was one.

        ``only_gains``: only if the total cost falls.
        """
        if not (source_K.any() and sink_K.any()):
            return False
        distance_K, before_K = self.shortest_paths(source_K)
        end = int(np.where(sink_K, distance_K, np.inf).argmin())
        if only_gains and distance_K[end] >= -self._least_gain:
            return False
        path = [end]
        while before_K[path[-1]] >= 0:
            path.append(int(before_K[path[-1]]))
        # One point from each cluster on the path, chosen before any has moved.
        moves = [(self._heaps[a][b][0][1], b) for b, a in pairwise(path)]
        for point, b in moves:
            self.size_K[self.cluster_N[point]] -= 1
            self.size_K[b] += 1
            self.cluster_N[point] = b
            for other, heap in enumerate(self._heaps[b]):
                heappush(heap, (float(self._cost_NK[point, other] - self._cost_NK[point, b]), point))
        self._weigh(path)
        return True

    def shortest_paths(self, source_K: NDArray[np.bool_]) -> tuple[NDArray[np.float64], Ints]:
        """Return (K,) the cost of the cheapest path from any source, and the cluster before each on it, -1 at sources.

        Bellman and Ford's: edges may be negative, cycles are not.
        """
        distance_K = np.where(source_K, 0.0, np.inf)
        before_K = np.full(len(source_K), -1, dtype=np.int64)
        for _ in range(len(source_K)):
            through_KK = distance_K[:, None] + self.weight_KK
            best_K = through_KK.argmin(axis=0)
            shorter_K = through_KK.min(axis=0) < distance_K - self._least_gain
            if not shorter_K.any():
                break
            distance_K = np.where(shorter_K, through_KK.min(axis=0), distance_K)
            before_K = np.where(shorter_K, best_K, before_K)
        return distance_K, before_K

    def _weigh(self, clusters: Any) -> None:
        for a in clusters:
            for b, heap in enumerate(self._heaps[a]):
                while heap and self.cluster_N[heap[0][1]] != a:
                    heappop(heap)
                self.weight_KK[a, b] = heap[0][0] if heap and a != b else np.inf

"""Which expert lives on which rank: the heaviest rank as light as it can be, then few bytes between nodes.

Given the load of every expert (rows in some steps) and how often two experts were wanted by the same
token, every rank getting the same number of experts:

1. Two starts: the present placement, and LPT (the heaviest expert first, each to the lightest rank that
   has room; Graham, SIAM J. Appl. Math. 17, 1969). Both are levelled: an expert of the heaviest rank, or
   two, change places with as many of another rank as long as the heavier of the two gets lighter. With
   ``slack``, the present placement is also levelled just so far.
2. Within ``slack`` of the lightest maximum found, experts change places while that brings more pairs of
   co-activated experts onto one node, then onto one rank.
3. Ranks are renamed, and within a rank experts keep their places, so that as few as can be move.

How many bytes cross nodes: a token that needs experts on m foreign nodes crosses m times where it
travels once per node (parallel's two-level exchange). Over all tokens the number of (token, node) pairs
is, by inclusion and exclusion up to pairs, the load minus the co-activations within a node: exact for
tokens with up to two experts per node, and what step 2 lowers. Where each (token, expert) pair travels on
its own, bytes do not depend on it.

What no placement can beat, as a ratio of the heaviest rank to the mean: with shares s_1 >= s_2 >= ... of
E experts on R ranks, the simple bound is max(1, s_1 R). As every rank has exactly n = E / R experts, the
rank of the hottest one has n - 1 more; and of the j R + 1 hottest, some rank has j + 1. So

    max/mean >= R * max over j < n of (s_(jR - j + 1) + ... + s_(jR + 1) + the n - j - 1 smallest shares),

the j + 1 lightest of the jR + 1 hottest and the coldest experts beside them. For j = 0 that is the simple
bound plus the cold experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dist_moe.parallel import Placement
from dist_moe.search.agreement import take_from_first_rank

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ROUNDING = 1e-9
_MOST_PAIRS = 1024
"""Swaps of two against two are tried where a rank has at most so many pairs of experts (45 experts)."""


@dataclass(frozen=True)
class PlacementChoice:
    """``before``, ``after``: load of the heaviest rank over the mean. ``simple_bound``, ``bound``: what no
    placement can beat, see the module's text. ``moved``: experts that change their rank."""

    placement: Placement
    before: float
    after: float
    simple_bound: float
    bound: float
    moved: tuple[int, ...]


def choose_placement(
    load_E: ArrayLike,
    current: Placement,
    together_EE: ArrayLike | None = None,
    *,
    ranks_per_node: int | None = None,
    slack: float = 0.0,
) -> PlacementChoice:
    """Return the placement that the search finds; deterministic, no collective.

    ``load_E``: (E,) rows per expert, not negative. ``together_EE``: (E, E) symmetric counts of tokens that
    want both experts; its diagonal does not matter; None: none. ``ranks_per_node``: divides the number of
    ranks; None: all ranks are on one node. ``slack``: how much heavier than need be the heaviest rank may
    be for the sake of co-activated experts and of fewer moves, in units of the mean load of a rank.

    Raises ValueError for shapes that do not fit, negative or non-finite numbers.
    """
    load = _checked(load_E, (current.num_experts,))
    together = np.zeros((len(load),) * 2) if together_EE is None else _checked(together_EE, (len(load),) * 2)
    together = (together + together.T) / 2 * (1 - np.eye(len(load)))
    per_node = ranks_per_node or current.num_ranks
    if current.num_ranks % per_node:
        raise ValueError(f"ranks_per_node={per_node} does not divide the {current.num_ranks} ranks")
    problem = _Problem(load, together, current.num_ranks, per_node, max(slack, 0.0))
    placement = _search(problem, current)
    before, after = rank_imbalance(load, current), rank_imbalance(load, placement)
    bounds = imbalance_bounds(load, current.num_ranks)
    return PlacementChoice(placement, before, after, *bounds, current.moved_to(placement))


def agree_on_placement(placement: Placement) -> Placement:
    """Return rank 0's placement on every rank, proven by digest. Collective over all ranks of the job.

    Raises RuntimeError if some rank ended up with another one.
    """
    order = take_from_first_rank(torch.tensor(placement.expert_of_position))
    return Placement(tuple(order.tolist()), placement.num_ranks)


def rank_imbalance(load_E: ArrayLike, placement: Placement) -> float:
    """Return the load of the heaviest rank over the mean of the ranks; 1 where there is no load at all."""
    load = _checked(load_E, (placement.num_experts,))
    load_R = np.bincount(_ranks_of(placement), load, minlength=placement.num_ranks)
    return float(load_R.max() / load_R.mean()) if load_R.any() else 1.0


def imbalance_bounds(load_E: ArrayLike, num_ranks: int) -> tuple[float, float]:
    """Return the simple bound, and the bound with the same number of experts on every rank: see the module's text."""
    load = np.sort(np.asarray(load_E, dtype=float))[::-1]
    if not load.sum():
        return 1.0, 1.0
    share, per_rank = load / load.sum(), len(load) // num_ranks
    coldest = np.concatenate([[0.0], np.cumsum(share[::-1])])
    crowded = (share[j * num_ranks - j : j * num_ranks + 1].sum() + coldest[per_rank - j - 1] for j in range(per_rank))
    return max(1.0, float(share[0]) * num_ranks), max(1.0, num_ranks * float(max(crowded)))


def _checked(values: ArrayLike, shape: tuple[int, ...]) -> Floats:
    array = np.asarray(values, dtype=float)
    if array.shape != shape:
        raise ValueError(
            f"loads and co-activations of {shape[0]} experts must have the shape {shape}, got {array.shape}"
        )
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError("loads and co-activations must be finite and not negative")
    return array


def _ranks_of(placement: Placement) -> Ints:
    return np.asarray(placement.position_of_expert) // placement.experts_per_rank


@dataclass(frozen=True)
class _Problem:
    load: Floats
    together: Floats
    num_ranks: int
    ranks_per_node: int
    slack: float

    def loads(self, rank_E: Ints) -> Floats:
        """Return the loads of the ranks."""
        return np.bincount(rank_E, self.load, minlength=self.num_ranks).astype(float)

    def kept(self, rank_E: Ints) -> tuple[float, float]:
        """Return the co-activations within nodes, and within ranks."""
        node_E = rank_E // self.ranks_per_node
        within = [float((self.together * (of_E[:, None] == of_E)).sum() / 2) for of_E in (node_E, rank_E)]
        return within[0], within[1]


def _search(problem: _Problem, current: Placement) -> Placement:
    starts = [_ranks_of(current), _longest_first(problem.load, problem.num_ranks)]
    levelled = [_levelled(problem, rank_E) for rank_E in starts]
    lightest = min(problem.loads(rank_E).max() for rank_E in levelled)
    limit = lightest * (1 + _ROUNDING) + problem.slack * problem.load.sum() / problem.num_ranks
    enough = _levelled(problem, starts[0], limit)
    fitting = [rank_E for rank_E in (starts[0], enough, *levelled) if problem.loads(rank_E).max() <= limit]
    gathered = [_gathered(problem, rank_E, limit) for rank_E in fitting]
    placements = [_aligned(rank_E, current, problem.ranks_per_node) for rank_E in gathered]

    def rank_of_candidate(i: int) -> tuple[float, float, int]:
        node, rank = problem.kept(gathered[i])
        return -round(node, 6), -round(rank, 6), len(current.moved_to(placements[i]))

    return placements[min(range(len(placements)), key=rank_of_candidate)]


def _longest_first(load: Floats, num_ranks: int) -> Ints:
    """Return the (E,) ranks of LPT."""
    room = np.full(num_ranks, len(load) // num_ranks)
    load_R, rank_E = np.zeros(num_ranks), np.zeros(len(load), dtype=np.int64)
    for expert in np.argsort(-load, kind="stable"):
        rank = int(np.argmin(np.where(room > 0, load_R, np.inf)))
        rank_E[expert] = rank
        load_R[rank] += load[expert]
        room[rank] -= 1
    return rank_E


def _levelled(problem: _Problem, rank_E: Ints, enough: float = 0.0) -> Ints:
    """Return ranks after swaps of one against one, where none helps of two against two, until the heaviest rank
    stays so or is light enough."""
    rank_E, per_rank = rank_E.copy(), len(rank_E) // problem.num_ranks
    sizes = [1, 2] if per_rank >= 2 and per_rank * (per_rank - 1) // 2 <= _MOST_PAIRS else [1]
    while problem.loads(rank_E).max() > enough and any(_relieve(problem, rank_E, size) for size in sizes):
        pass
    return rank_E


def _relieve(problem: _Problem, rank_E: Ints, size: int) -> bool:
    """Make the best swap of ``size`` experts of the heaviest rank, in place; whether there was one."""
    load_R = problem.loads(rank_E)
    heaviest = int(load_R.argmax())
    best, best_swap = load_R[heaviest] - _ROUNDING * problem.load.sum(), None
    given = _sets_of(rank_E, heaviest, size)
    for rank in range(problem.num_ranks):
        if rank == heaviest:
            continue
        taken = _sets_of(rank_E, rank, size)
        shift = problem.load[given].sum(1)[:, None] - problem.load[taken].sum(1)
        heavier = np.maximum(load_R[heaviest] - shift, load_R[rank] + shift)
        i, j = np.unravel_index(heavier.argmin(), heavier.shape)
        if heavier[i, j] < best:
            best, best_swap = heavier[i, j], (given[i], taken[j], rank)
    if best_swap is None:
        return False
    rank_E[best_swap[0]], rank_E[best_swap[1]] = best_swap[2], heaviest
    return True


def _sets_of(rank_E: Ints, rank: int, size: int) -> Ints:
    """Return (sets, size): all sets of ``size`` experts of a rank."""
    experts = np.flatnonzero(rank_E == rank)
    return np.asarray(list(combinations(experts.tolist(), size)))


def _gathered(problem: _Problem, rank_E: Ints, limit: float) -> Ints:
    """Return ranks after swaps that bring co-activations onto one node, else one rank, none getting above ``limit``."""
    rank_E = rank_E.copy()
    least = _ROUNDING * max(problem.together.sum(), 1.0)
    while (swap := next(_gathering_swaps(problem, rank_E, limit, least), None)) is not None:
        rank_E[list(swap)] = rank_E[list(swap[::-1])]
    return rank_E


def _gathering_swaps(problem: _Problem, rank_E: Ints, limit: float, least: float) -> Iterator[tuple[int, int]]:
    """Yield the best swap for nodes, if any helps; the best for ranks among those that leave nodes as they are."""
    load_R, load = problem.loads(rank_E), problem.load
    after_EE = load_R[rank_E][:, None] - load[:, None] + load  # of a's rank, after a and b change places
    allowed_EE = (rank_E[:, None] != rank_E) & (np.maximum(after_EE, after_EE.T) <= limit)
    by_node_EE = _gains(problem.together, rank_E // problem.ranks_per_node)
    by_rank_EE = _gains(problem.together, rank_E)
    for gain_EE in (by_node_EE, np.where(np.abs(by_node_EE) <= least, by_rank_EE, -np.inf)):
        gain_EE = np.where(allowed_EE, gain_EE, -np.inf)
        first, second = np.unravel_index(gain_EE.argmax(), gain_EE.shape)
        if gain_EE[first, second] > least:
            yield int(first), int(second)


def _gains(together: Floats, group_E: Ints) -> Floats:
    """Return (E, E): co-activations within groups that are won when two experts change places."""
    with_group = together @ np.eye(group_E.max() + 1)[group_E]
    here_E = with_group[np.arange(len(group_E)), group_E]
    there_EE = with_group[:, group_E] - together
    gain_EE = there_EE + there_EE.T - here_E[:, None] - here_E
    return np.where(group_E[:, None] == group_E, 0.0, gain_EE)


def _aligned(rank_E: Ints, current: Placement, ranks_per_node: int) -> Placement:
    """Return the placement after renaming nodes, and ranks within, so that most experts stay, in their places."""
    from scipy.optimize import linear_sum_assignment

    ranks, nodes = current.num_ranks, current.num_ranks // ranks_per_node
    stay_RR = np.zeros((ranks, ranks))
    np.add.at(stay_RR, (rank_E, _ranks_of(current)), 1)
    blocks = stay_RR.reshape(nodes, ranks_per_node, nodes, ranks_per_node).swapaxes(1, 2)
    matches = [[linear_sum_assignment(block, maximize=True) for block in row] for row in blocks]
    stay_nodes = [
        [block[match].sum() for block, match in zip(*pair, strict=True)] for pair in zip(blocks, matches, strict=True)
    ]
    new_name_R = np.zeros(ranks, dtype=np.int64)
    for node, old_node in zip(*linear_sum_assignment(np.asarray(stay_nodes), maximize=True), strict=True):
        found, old = matches[node][old_node]
        new_name_R[node * ranks_per_node + found] = old_node * ranks_per_node + old
    return _keeping_places(new_name_R[rank_E], current)


def _keeping_places(rank_E: Ints, current: Placement) -> Placement:
    order: list[int] = []
    for rank in range(current.num_ranks):
        members = np.flatnonzero(rank_E == rank).tolist()
        arriving = iter([expert for expert in members if current.rank_of(expert) != rank])
        order += [expert if rank_E[expert] == rank else next(arriving) for expert in current.experts_of(rank)]
    return Placement(tuple(order), current.num_ranks)

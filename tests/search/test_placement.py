"""The search for a placement: as good as trying all, true bounds, few moves, the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_moe.parallel import Placement, ProcessWorld
from dist_moe.search import agree_on_placement, choose_placement, rank_imbalance
from dist_moe.search.placement import imbalance_bounds
from tests.helpers.worlds import run_worlds
from tools.placement_study import log_normal_load

SMALL = [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (9, 3), (10, 2)]


def partitions(experts: list[int], size: int) -> Iterator[list[list[int]]]:
    """All ways to share ``experts`` out in groups of ``size``."""
    if not experts:
        yield []
        return
    for others in combinations(experts[1:], size - 1):
        rest = [expert for expert in experts[1:] if expert not in others]
        for groups in partitions(rest, size):
            yield [[experts[0], *others], *groups]


def lightest_maximum(load: NDArray[np.float64], num_ranks: int) -> float:
    """By trying all: max/mean."""
    size = len(load) // num_ranks
    best = min(max(load[group].sum() for group in groups) for groups in partitions(list(range(len(load))), size))
    return float(best * num_ranks / load.sum())


def random_load(rng: np.random.Generator, experts: int) -> NDArray[np.float64]:
    return np.exp(rng.normal(size=experts) * rng.choice([0.3, 1.0, 2.0]))


@pytest.mark.parametrize(("experts", "ranks"), SMALL)
def test_nearly_always_the_best_of_all(experts: int, ranks: int) -> None:
    rng = np.random.default_rng(experts * ranks)
    excess = []
    for _ in range(20):
        load = random_load(rng, experts)
        choice = choose_placement(load, Placement.identity(experts, ranks))
        assert choice.after == pytest.approx(rank_imbalance(load, choice.placement))
        excess.append(choice.after / lightest_maximum(load, ranks) - 1)
    assert min(excess) > -1e-9
    assert max(excess) < 0.02
    assert sum(value < 1e-9 for value in excess) >= 18


def test_with_two_experts_per_rank_the_hottest_sits_with_the_coldest() -> None:
    """Which is known to be the best then."""
    for seed in range(10):
        load = log_normal_load(16, 1.0, seed)
        ascending = np.sort(load)
        best = (ascending[:8] + ascending[:7:-1]).max() / load.sum() * 8
        assert choose_placement(load, Placement.identity(16, 8)).after == pytest.approx(best)


@pytest.mark.parametrize(("experts", "ranks"), SMALL)
def test_no_placement_beats_the_bounds(experts: int, ranks: int) -> None:
    rng = np.random.default_rng(experts + ranks)
    tight = 0
    for _ in range(20):
        load = random_load(rng, experts)
        best, (simple, bound) = lightest_maximum(load, ranks), imbalance_bounds(load, ranks)
        assert 1 <= simple <= bound + 1e-12
        assert bound <= best + 1e-9
        tight += bound > simple + 1e-9
        assert simple == pytest.approx(max(1.0, load.max() / load.sum() * ranks))
    assert tight > 0


def test_the_bound_is_reached_by_one_hot_expert_and_by_one_expert_per_rank() -> None:
    hot = np.ones(8)
    hot[5] = 1000.0
    assert choose_placement(hot, Placement.identity(8, 4)).after == pytest.approx(imbalance_bounds(hot, 4)[1])
    assert imbalance_bounds(hot, 4)[0] == pytest.approx(4 * 1000 / 1007)
    alone = choose_placement(hot[:4] + np.arange(4), Placement.identity(4, 4))
    assert alone.placement.is_identity
    assert alone.after == pytest.approx(alone.bound)


@pytest.mark.parametrize("violation", [0.2, 1.0, 4.0])
@pytest.mark.parametrize(("experts", "ranks"), [(16, 2), (16, 4), (16, 8), (64, 2), (64, 4), (64, 8)])
def test_log_normal_popularity(experts: int, ranks: int, violation: float) -> None:
    for seed in range(2):
        load = log_normal_load(experts, violation, seed)
        assert load.max() / load.mean() == pytest.approx(1 + violation, rel=1e-6)
        choice = choose_placement(load, Placement.identity(experts, ranks))
        assert choice.bound - 1e-9 <= choice.after <= choice.before + 1e-9
        assert choice.after <= 1.05 * choice.bound


def random_together(rng: np.random.Generator, experts: int) -> NDArray[np.float64]:
    counts = rng.integers(0, 50, (experts, experts)).astype(float)
    return counts + counts.T


def kept(groups: list[list[int]], together: NDArray[np.float64]) -> float:
    return sum(together[a, b] for group in groups for a, b in combinations(group, 2))


@pytest.mark.parametrize(("experts", "ranks"), [(6, 2), (6, 3), (8, 2), (8, 4)])
def test_where_loads_are_equal_co_activation_decides(experts: int, ranks: int) -> None:
    """Every node is one rank: by trying all, the most co-activations that can be kept within ranks."""
    rng = np.random.default_rng(experts - ranks)
    shares = []
    for _ in range(20):
        together = random_together(rng, experts)
        all_groups = partitions(list(range(experts)), experts // ranks)
        best = max(kept(groups, together) for groups in all_groups)
        choice = choose_placement(np.ones(experts), Placement.identity(experts, ranks), together, ranks_per_node=1)
        groups = [list(choice.placement.experts_of(rank)) for rank in range(ranks)]
        assert choice.after == pytest.approx(1)
        shares.append(kept(groups, together) / best)
    assert min(shares) > 0.85
    assert np.mean(shares) > 0.97


def cliques(*groups: tuple[int, ...]) -> NDArray[np.float64]:
    together = np.zeros((8, 8))
    for group in groups:
        for a, b in combinations(group, 2):
            together[a, b] = together[b, a] = 10
    return together


def test_co_activated_experts_come_to_one_node_and_there_to_one_rank() -> None:
    together = cliques((0, 2, 4, 6), (1, 3, 5, 7)) + cliques((0, 6), (2, 4), (1, 7), (3, 5))
    choice = choose_placement(np.ones(8), Placement.identity(8, 4), together, ranks_per_node=2)
    nodes = [{*choice.placement.experts_of(2 * n), *choice.placement.experts_of(2 * n + 1)} for n in range(2)]
    assert sorted(map(sorted, nodes)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    ranks = sorted(tuple(sorted(choice.placement.experts_of(rank))) for rank in range(4))
    assert ranks == [(0, 6), (1, 7), (2, 4), (3, 5)]


def test_load_comes_before_co_activation_unless_slack_allows() -> None:
    load = np.array([3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    together = cliques((0, 1))
    strict = choose_placement(load, Placement.identity(8, 2), together, ranks_per_node=1)
    assert strict.placement.rank_of(0) != strict.placement.rank_of(1)
    assert strict.after == pytest.approx(1)
    lax = choose_placement(load, Placement.identity(8, 2), together, ranks_per_node=1, slack=0.4)
    assert lax.placement.rank_of(0) == lax.placement.rank_of(1)
    assert 1 < lax.after <= 1.4


def test_what_is_balanced_stays() -> None:
    current = Placement((5, 0, 3, 6, 1, 7, 2, 4), 4)
    choice = choose_placement(np.ones(8), current)
    assert choice.placement == current
    assert choice.moved == ()


def test_few_experts_move_and_those_that_stay_keep_their_places() -> None:
    load = np.array([5.0, 4.0, 1.0, 1.0, 3.0, 2.0, 1.0, 1.0])
    current = Placement.identity(8, 2)
    choice = choose_placement(load, current)
    assert choice.after == pytest.approx(1)
    assert len(choice.moved) == 2
    for expert in set(range(8)) - set(choice.moved):
        assert choice.placement.position_of_expert[expert] == expert


def test_slack_saves_moves() -> None:
    load, current = log_normal_load(64, 1.0, seed=0), Placement.identity(64, 8)
    strict, lax = (choose_placement(load, current, slack=slack) for slack in (0.0, 0.02))
    assert strict.after <= lax.after <= strict.after + 0.02 + 1e-6
    assert len(lax.moved) < 0.7 * len(strict.moved)


def test_without_load_nothing_moves() -> None:
    choice = choose_placement(np.zeros(4), Placement.identity(4, 2))
    assert choice.placement.is_identity
    assert (choice.before, choice.after, choice.bound, choice.simple_bound) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        ([1.0, 2.0], {}, "must have the shape"),
        ([1.0, 2.0, -1.0, 0.0], {}, "finite and not negative"),
        ([1.0, 2.0, np.nan, 0.0], {}, "finite and not negative"),
        ([1.0] * 4, {"together_EE": np.ones((2, 2))}, "must have the shape"),
        ([1.0] * 4, {"ranks_per_node": 3}, "ranks_per_node=3 does not divide the 4 ranks"),
    ],
)
def test_what_does_not_fit_is_refused(load: list[float], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_placement(load, Placement.identity(4, 4), **options)  # type: ignore[arg-type]


def test_the_first_rank_decides() -> None:
    placements = [Placement((1, 0, 2, 3), 2), Placement((3, 2, 1, 0), 2)]

    def agree(world: ProcessWorld) -> Placement:
        return agree_on_placement(placements[world.rank])

    assert run_worlds(2, agree) == [placements[0]] * 2
    assert not torch.distributed.is_initialized()
    assert agree_on_placement(placements[1]) == placements[1]

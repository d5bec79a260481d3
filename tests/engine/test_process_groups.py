"""Nodes as the launcher or the configuration gives them, and the exchange that is chosen for them."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.errors import UserError
from dist_moe.parallel import SingleWorld
from tests.helpers.pool import on_ranks


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


EVEN, UNEVEN, APART = [[0, 0, 1, 1]], [[0, 0, 0, 1]], [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("nodes", "auto", "two_level"),
    [
        (EVEN, 2, 2),
        (APART, None, 1),
        ([[0, 0, 0, 0]], None, None),
        ([[0, 0, 1, 1], [2, 2, 3, 3]], 2, 2),
        ([[0, 0], [1, 1]], None, None),
        ([[0, 1], [2, 3]], None, 1),
    ],
)
def test_the_exchange_that_is_chosen(nodes: list[list[int]], auto: int | None, two_level: int | None) -> None:
    for exchange, expected in {"auto": auto, "two_level": two_level, "flat": None}.items():
        config = ParallelConfig(expert_parallel_size=len(nodes[0]), exchange=exchange)
        assert config.ranks_per_level(nodes) == expected


@pytest.mark.parametrize("nodes", [UNEVEN, [[0, 0, 0, 0], [1, 1, 2, 2]], [[0, 1, 0, 1]]])
def test_two_levels_on_uneven_nodes_are_refused(nodes: list[list[int]]) -> None:
    assert ParallelConfig(expert_parallel_size=4).ranks_per_level(nodes) is None
    with pytest.raises(UserError) as refusal:
        ParallelConfig(expert_parallel_size=4, exchange="two_level").ranks_per_level(nodes)
    for part in ("parallel.exchange=two_level", "parallel.expert_parallel_size=4", str(nodes), "exchange=auto"):
        assert part in str(refusal.value)


def opened(config: ParallelConfig, node_names: list[str] | None) -> tuple[list[int], str | None, int]:
    """The nodes of this rank's expert-parallel group; sizes of the levels, across and within; neighbours on a node."""
    environment = LaunchEnvironment.read()
    named = {} if node_names is None else {"GROUP_RANK": node_names[environment.rank]}
    with mock.patch.dict(os.environ, named), process_groups(environment, config) as groups:
        levels, nodes = groups.world.levels, groups.world.node_of_rank
        assert nodes is not None
        sizes = f"{levels.across.size}x{levels.within.size}" if levels else None
        return list(nodes), sizes, groups.ranks_per_node


@pytest.mark.parametrize(
    ("config", "node_names", "expected"),
    [
        ({}, ["7", "7", "3", "3"], [([0, 0, 1, 1], "2x2", 2)] * 4),
        ({}, ["b", "a", "b", "c"], [([0, 1, 0, 2], None, 1)] * 4),
        (
            {"exchange": "two_level", "ranks_per_node": 1, "expert_parallel_size": 2},
            None,
            [([0, 1], "2x1", 1), ([0, 1], "2x1", 1), ([2, 3], "2x1", 1), ([2, 3], "2x1", 1)],
        ),
    ],
)
def test_levels_are_opened_on_four_ranks(
    config: dict[str, Any], node_names: list[str] | None, expected: list[tuple[list[int], str | None, int]]
) -> None:
    assert on_ranks(4, opened, ParallelConfig(**({"expert_parallel_size": 4} | config)), node_names) == expected


@pytest.mark.parametrize(
    ("expert_parallel_size", "node_of_rank", "expected"),
    [
        (4, [0, 0, 1, 1], 2),
        (4, [0, 0, 0, 0], 4),
        (2, [0, 0, 0, 0], 2),
        (4, [0, 0, 0, 1], 1),
        (4, [0, 0, 1, 1, 2, 2, 2, 2], 2),
        (2, [0, 0, 0, 1, 1, 1], 1),
        (1, [0, 1], 1),
    ],
)
def test_neighbours_on_a_node_in_every_group(expert_parallel_size: int, node_of_rank: list[int], expected: int) -> None:
    groups = ProcessGroups(LaunchEnvironment(), expert_parallel_size, SingleWorld(), node_of_rank)
    assert groups.ranks_per_node == expected


def test_nodes_of_the_launcher_that_do_not_fit_are_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ParallelConfig(expert_parallel_size=4, exchange="two_level")
    for fitting in ("2", "4", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", fitting)
        config.check(8, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"parallel\.exchange=two_level.*expert_parallel_size=4.*3 rank\(s\) per node"):
        config.check(12, 8)
    ParallelConfig(expert_parallel_size=4).check(12, 8)


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [(8, (4, "auto", 2)), (2, (2, "auto", 2)), (3, (1, "auto", None)), (1, (1, "auto", None))],
)
def test_a_layout_for_looking_at_a_run_elsewhere(world_size: int, expected: tuple[int, str, int | None]) -> None:
    config = ParallelConfig(expert_parallel_size=4, exchange="two_level", ranks_per_node=2)
    there = config.nearest_for(world_size)
    assert (there.expert_parallel_size, there.exchange, there.ranks_per_node) == expected
    there.check(world_size, 8)
    assert ParallelConfig(exchange="flat").nearest_for(world_size).exchange == "flat"

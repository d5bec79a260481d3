"""Nodes: which divisions are even, which ranks share a group, and what counts as crossing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dist_moe.parallel import ProcessWorld, SingleWorld, Traffic, open_levels, ranks_per_node
from tests.helpers.worlds import in_nodes, run_worlds


@pytest.mark.parametrize(
    ("node_of_rank", "expected"),
    [
        ([0], 1),
        ([3, 3], 2),
        ([0, 1], 1),
        ([0, 0, 1, 1], 2),
        ([1, 1, 0, 0], 2),
        ([0, 0, 0, 1], None),
        ([0, 0, 1], None),
        ([0, 1, 0, 1], None),
        ([0, 1, 1, 0], None),
        ([0, 0, 1, 1, 2], None),
        ([0, 0, 0, 1, 1, 1], 3),
    ],
)
def test_ranks_per_node(node_of_rank: list[int], expected: int | None) -> None:
    assert ranks_per_node(node_of_rank) == expected


def test_levels_of_several_worlds() -> None:
    """Eight ranks, worlds of four, nodes of two: eight groups, of which a rank is in two."""

    def members(world: ProcessWorld) -> tuple[list[int], list[int], int, int, bool]:
        levels = open_levels([range(4), range(4, 8)], 2, world.traffic)
        assert isinstance(levels.across, ProcessWorld)
        assert isinstance(levels.within, ProcessWorld)
        groups = [dist.get_process_group_ranks(level.group) for level in (levels.across, levels.within)]
        shared = levels.across.traffic is levels.within.traffic is world.traffic
        return groups[0], groups[1], levels.across.rank, levels.within.rank, shared

    for rank, (across, within, node, local, shared) in enumerate(run_worlds(8, members)):
        base = rank // 4 * 4
        assert across == [base + rank % 2, base + rank % 2 + 2]
        assert within == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert (node, local) == (rank % 4 // 2, rank % 2)
        assert shared


def test_a_rank_that_is_alone_in_its_node_has_no_group_there() -> None:
    def single(world: ProcessWorld) -> bool:
        levels = in_nodes(world, 1).levels
        assert levels is not None
        return isinstance(levels.within, SingleWorld) and levels.across.size == 2

    assert run_worlds(2, single) == [True, True]


def test_traffic_across_nodes_is_part_of_all_traffic() -> None:
    traffic, rows = Traffic(), torch.zeros(10, 3)
    traffic.add(rows, [1, 2, 3, 4], 1, [0, 0, 1, 1])
    traffic.add(torch.zeros(10, dtype=torch.int64), [1, 2, 3, 4], 1, [0, 0, 1, 1], are_tokens=False)
    assert traffic.counts() == {
        "wire_rows": 8,
        "wire_rows_across_nodes": 7,
        "wire_bytes": 8 * 12 + 8 * 8,
        "wire_bytes_across_nodes": 7 * 12 + 7 * 8,
    }
    traffic.add(rows, [0, 5, 5, 0], 1)
    assert (traffic.rows, traffic.rows_across_nodes) == (13, 7)
    traffic.reset()
    assert traffic == Traffic()

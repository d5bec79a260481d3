"""Parts of the two-level exchange: even divisions, groups, what crosses, several tensors in one all-to-all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.parallel import ProcessWorld, SingleWorld, Traffic, open_levels, ranks_per_node
from dist_moe.parallel.two_level import exchange_packed
from tests.helpers.worlds import in_nodes, run_worlds

ROWS = [[0, 2, 1], [3, 0, 0], [1, 1, 2]]
PAIRS = [[1, 0, 5], [0, 0, 0], [2, 7, 1]]


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


def received(counts: list[list[int]], rank: int) -> list[int]:
    return [row[rank] for row in counts]


def labelled(counts: list[list[int]], rank: int, width: int) -> Tensor:
    """Row i for rank r: (rank, r, i, ...)."""
    rows = [[rank, r, i, *range(width)][:width] for r, n in enumerate(counts[rank]) for i in range(n)]
    return torch.tensor(rows, dtype=torch.float64).view(-1, width)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.bfloat16, torch.float32)])
def test_blocks_arrive_from_their_ranks_whatever_their_widths(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    def exchange(world: ProcessWorld) -> tuple[Tensor, ...]:
        x, w = (labelled(c, world.rank, 3).to(d) for c, d in zip((ROWS, PAIRS), dtypes, strict=True))
        key = labelled(PAIRS, world.rank, 3).long()[:, 2]
        sends = [ROWS[world.rank], PAIRS[world.rank], PAIRS[world.rank]]
        receives = [received(ROWS, world.rank), *[received(PAIRS, world.rank)] * 2]
        return exchange_packed((x, w, key), sends, receives, world)

    for rank, (x, w, key) in enumerate(run_worlds(3, exchange)):
        assert (x.dtype, w.dtype, key.dtype) == (*dtypes, torch.int64)
        for tensor, counts in ((x, ROWS), (w, PAIRS)):
            expected = [[s, rank, i] for s in range(3) for i in range(counts[s][rank])]
            assert tensor.tolist() == expected
        assert key.tolist() == [i for s in range(3) for i in range(PAIRS[s][rank])]


@pytest.mark.parametrize("flows", [(True, True), (True, False), (False, True)])
def test_gradients_come_back_and_only_they(flows: tuple[bool, bool]) -> None:
    def exchange(world: ProcessWorld) -> tuple[list[Tensor | None], tuple[int, int], tuple[bool, ...]]:
        x = labelled(ROWS, world.rank, 3).requires_grad_(flows[0])
        w = labelled(PAIRS, world.rank, 2).requires_grad_(flows[1])
        sends, receives = (
            [ROWS[world.rank], PAIRS[world.rank]],
            [received(ROWS, world.rank), received(PAIRS, world.rank)],
        )
        there = exchange_packed((x, w), sends, receives, world)
        world.traffic.reset()
        sum(((10 + world.rank) * (p + 1) * y).sum() for p, y in enumerate(there) if y.requires_grad).backward()
        counted = (world.traffic.rows, world.traffic.bytes)
        return [x.grad, w.grad], counted, tuple(y.requires_grad for y in there)

    for rank, (grads, (rows, size), differentiable) in enumerate(run_worlds(3, exchange)):
        assert differentiable == flows
        for p, (grad, counts, width) in enumerate(zip(grads, (ROWS, PAIRS), (3, 2), strict=True)):
            if not flows[p]:
                assert grad is None
                continue
            assert grad is not None
            expected = [(10.0 + r) * (p + 1) for r in range(3) for _ in range(counts[rank][r])]
            assert grad.tolist() == [[value] * width for value in expected]
        away = [sum(row[rank] for s, row in enumerate(counts) if s != rank) for counts in (ROWS, PAIRS)]
        assert rows == away[0] * flows[0]
        assert size == 8 * (away[0] * 3 * flows[0] + away[1] * 2 * flows[1])

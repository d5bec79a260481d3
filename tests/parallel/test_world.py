"""Worlds: the ragged exchange, its counters, who holds which experts, and silence with one rank."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet
from dist_moe.layer import MoE
from dist_moe.parallel import (
    EmulatedWorld,
    SingleWorld,
    World,
    experts_of_rank,
    gather_columns,
    gather_objects,
    max_over_ranks,
    wait_for_all,
)
from dist_moe.search import PermutationSearch
from tests.helpers.worlds import RunOnRanks, both_kinds, emulate, run_worlds

COLLECTIVES = [
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv",
    "isend", "monitored_barrier", "new_group", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "scatter", "scatter_object_list", "send",
]  # fmt: skip


@pytest.fixture
def no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective was issued")

    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, refuse)


def train_with_search(world: World | None = None) -> int:
    search = PermutationSearch(4, stage_steps=2, num_gates=2)
    moe = MoE([Comet(3, 4), Comet(3, 4)], DenseReLUBank(3, 2, 4, range(4)), search)
    for _ in range(3):
        search.begin_step()
        output = moe.train()(torch.randn(5, 3, requires_grad=True))
        (sum(y.sum() for y in output.outputs) + sum(output.aux.values())).backward()
        search.begin_evaluation()
        moe.eval()(torch.randn(2, 3))
    return dist.get_world_size() if dist.is_initialized() else 0


@pytest.mark.usefixtures("no_collectives")
def test_one_rank_issues_no_collective_with_a_process_group_and_without() -> None:
    assert train_with_search() == 0
    assert run_worlds(1, train_with_search) == [1]


@pytest.mark.usefixtures("no_collectives")
def test_forbidden_collectives_are_noticed() -> None:
    with pytest.raises(AssertionError, match="a collective was issued"):
        run_worlds(2, lambda world: world.sum(torch.ones(1)))


@both_kinds
def test_counts_go_to_their_ranks(run: RunOnRanks) -> None:
    received = run(3, lambda world: world.exchange(torch.arange(6).view(3, 2) + 10 * world.rank, [1] * 3, [1] * 3))
    for rank, counts_RE in enumerate(received):
        assert counts_RE.tolist() == [[2 * rank + 10 * source, 2 * rank + 1 + 10 * source] for source in range(3)]


@both_kinds
def test_sum_is_over_all_ranks_and_leaves_its_argument(run: RunOnRanks) -> None:
    def total(world: World) -> tuple[float, float]:
        mine = torch.tensor(1.0 + world.rank, requires_grad=True)
        return world.sum(mine).item(), mine.item()

    assert run(4, total) == [(10.0, 1.0), (10.0, 2.0), (10.0, 3.0), (10.0, 4.0)]
    x = torch.randn(3)
    assert torch.equal(SingleWorld().sum(x), x)


@both_kinds
def test_maximum_is_over_all_ranks_element_by_element(run: RunOnRanks) -> None:
    def largest(world: World) -> tuple[list[float], bool]:
        mine = torch.tensor([world.rank, -world.rank, -torch.inf, torch.nan if world.rank == 1 else 7])
        *numbers, last = max_over_ranks(mine).tolist()
        return numbers, math.isnan(last)

    assert run(3, largest) == [([2, 0, -torch.inf], True)] * 3
    x = torch.randn(3)
    assert torch.equal(max_over_ranks(x), x)


@both_kinds
def test_gathered_objects_are_copies_in_rank_order(run: RunOnRanks) -> None:
    def spoil(world: World) -> list[list[int]]:
        mine = [world.rank]
        everyones = gather_objects(mine)
        before = [list(theirs) for theirs in everyones]
        for theirs in everyones:
            theirs.append(100 + world.rank)
        wait_for_all()
        assert mine == [world.rank]
        return before

    assert run(3, spoil) == [[[0], [1], [2]]] * 3
    assert gather_objects("mine") == ["mine"]
    wait_for_all()


@both_kinds
def test_gathered_columns_stand_side_by_side(run: RunOnRanks) -> None:
    gathered = run(2, lambda world: gather_columns(torch.full((2, 2 - world.rank), 1.0 + world.rank), 2))
    assert [x.tolist() for x in gathered] == [[[1, 1, 2, 0]] * 2] * 2
    assert gather_columns(torch.ones(1, 2), 5).tolist() == [[1, 1]]


def test_nobody_passes_a_barrier_before_the_last_has_come() -> None:
    come: list[int] = []

    def arrive(world: World) -> list[int]:
        time.sleep(0.1 * world.rank)
        come.append(world.rank)
        wait_for_all()
        return sorted(come)

    for run in (run_worlds, emulate):
        come.clear()
        assert run(3, arrive) == [[0, 1, 2]] * 3


@both_kinds
def test_broadcast_and_gather_give_every_rank_copies_of_its_own(run: RunOnRanks) -> None:
    def spoil(world: World) -> list[Tensor]:
        mine = torch.tensor([[world.rank, 7], [8, world.rank]]).t()
        received = [world.broadcast(mine), *world.gather(mine)]
        before = [x.clone() for x in received]
        for x in received:
            x.fill_(100 + world.rank)
        world.sum(torch.ones(1))
        assert mine.tolist() == [[world.rank, 8], [7, world.rank]]
        return before

    for broadcast, *gathered in run(3, spoil):
        assert broadcast.tolist() == [[0, 8], [7, 0]]
        assert [x.tolist() for x in gathered] == [[[r, 8], [7, r]] for r in range(3)]
    x = torch.randn(3)
    assert SingleWorld().broadcast(x) is x
    assert SingleWorld().gather(x) == [x]


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_traffic_counts_rows_to_others_forward_and_backward(dtype: torch.dtype, run: RunOnRanks) -> None:
    send = [[5, 2], [0, 3]]
    width = 7

    def exchange(world: World) -> tuple[tuple[int, int], tuple[int, int]]:
        mine = send[world.rank]
        x_ND = torch.randn(sum(mine), width, dtype=dtype, requires_grad=True)
        received = world.all_to_all(x_ND, mine, [row[world.rank] for row in send])
        forward = (world.traffic.rows, world.traffic.bytes)
        world.traffic.reset()
        received.sum().backward()
        return forward, (world.traffic.rows, world.traffic.bytes)

    row = width * dtype.itemsize
    assert run(2, exchange) == [((2, 2 * row), (0, 0)), ((0, 0), (2, 2 * row))]


@both_kinds
def test_backward_of_the_exchange_is_the_exchange_back(run: RunOnRanks) -> None:
    send = [[1, 2, 0], [0, 0, 3], [2, 0, 1]]

    def exchange(world: World) -> tuple[Tensor, Tensor]:
        mine, theirs = send[world.rank], [row[world.rank] for row in send]
        x_ND = torch.zeros(sum(mine), 1, requires_grad=True)
        received = world.all_to_all(x_ND, mine, theirs)
        weight = torch.cat([torch.full((n, 1), 10.0 * world.rank + source) for source, n in enumerate(theirs)])
        return torch.autograd.grad((received * weight).sum(), x_ND)[0], received

    for rank, (grad_ND, _) in enumerate(run(3, exchange)):
        expected = [10.0 * receiver + rank for receiver, n in enumerate(send[rank]) for _ in range(n)]
        assert grad_ND.flatten().tolist() == expected


def test_experts_of_all_ranks_are_all_experts_in_order_or_cannot_be_shared_out() -> None:
    ids = [list(experts_of_rank(12, world)) for world in EmulatedWorld(4).ranks]
    assert ids == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert list(experts_of_rank(5, SingleWorld())) == [0, 1, 2, 3, 4]
    for world in EmulatedWorld(3).ranks:
        with pytest.raises(ValueError, match="num_experts=8 is not divisible by the 3 ranks"):
            experts_of_rank(8, world)

"""All ranks come to the same table: rank 0 decides, everybody proves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_moe.parallel import EmulatedWorld, World
from dist_moe.search import PermutationSearch, agree_on_tables, assert_same_on_all_ranks
from dist_moe.search.agreement import round_to_table, take_from_first_rank
from tests.helpers.worlds import RunOnRanks, both_kinds, run_worlds


@both_kinds
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_rank_0_decides(num_ranks: int, run: RunOnRanks) -> None:
    torch.manual_seed(num_ranks)
    softs = torch.rand(num_ranks, 6, 6)
    tables = run(num_ranks, lambda world: agree_on_tables(softs[world.rank]))
    for table in tables:
        assert torch.equal(table, round_to_table(softs[0]))
    assert num_ranks == 1 or not torch.equal(tables[1], round_to_table(softs[1]))


@both_kinds
@pytest.mark.parametrize("odd", [[1], [3], [1, 2], [1, 2, 3]])
def test_different_tables_are_an_error_on_every_rank_that_names_them(odd: list[int], run: RunOnRanks) -> None:
    tables = [torch.tensor([0, 1, 2, 3]) for _ in range(4)]
    for rank in odd:
        tables[rank] = torch.tensor([0, 1, 3, 2])

    def compare(world: World) -> str:
        with pytest.raises(RuntimeError, match="differs from that of rank 0") as raised:
            assert_same_on_all_ranks(tables[world.rank])
        return str(raised.value)

    for message in run(4, compare):
        assert f"ranks {odd} " in message


def test_equal_tables_pass() -> None:
    EmulatedWorld(4).run(lambda world: assert_same_on_all_ranks(torch.tensor([3, 1, 0, 2])))


def test_a_broadcast_that_goes_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broadcast = dist.broadcast

    def garbled(tensor: torch.Tensor, **options: Any) -> None:
        broadcast(tensor, **options)
        if dist.get_rank() == 2:
            tensor.copy_(tensor.flip(0))

    monkeypatch.setattr(dist, "broadcast", garbled)

    def agree(world: World) -> None:
        with pytest.raises(RuntimeError, match=r"ranks \[2\] differs"):
            agree_on_tables(torch.eye(5))

    run_worlds(3, agree)


def test_nan_is_refused_on_every_rank_and_none_is_left_waiting() -> None:
    def refuse(world: World) -> None:
        with pytest.raises(FloatingPointError, match="NaN"):
            agree_on_tables(torch.full((3, 3), torch.nan))

    assert EmulatedWorld(2).run(refuse) == [None, None]


def test_search_agrees_at_the_end_of_its_stage_and_at_evaluation() -> None:
    torch.manual_seed(0)
    searches = [PermutationSearch(6, stage_steps=3) for _ in range(3)]

    def search_on_rank(world: World) -> list[list[int]]:
        search, tables = searches[world.rank], []
        for _ in range(3):
            search.begin_step()
            search.train()()
            search.begin_evaluation()
            tables.append(search.table.tolist())
        return tables

    tables = EmulatedWorld(3).run(search_on_rank)
    assert tables[1] == tables[2] == tables[0]
    assert not torch.equal(searches[0].relaxed, searches[1].relaxed)


def test_many_matrices_at_once() -> None:
    torch.manual_seed(1)
    soft = torch.rand(2, 3, 5, 5)
    expected = [[round_to_table(soft[p, k]).tolist() for k in range(3)] for p in range(2)]
    assert agree_on_tables(soft).tolist() == expected
    of_ranks = [soft, torch.rand(2, 3, 5, 5)]
    for tables in EmulatedWorld(2).run(lambda world: agree_on_tables(of_ranks[world.rank])):
        assert tables.tolist() == expected
        assert tables.dtype == torch.int64


@both_kinds
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_first_rank_is_taken_at_its_word(num_ranks: int, run: RunOnRanks) -> None:
    mine = [torch.tensor([[rank, 7], [8, rank]]) for rank in range(num_ranks)]
    for rank, taken in enumerate(run(num_ranks, lambda world: take_from_first_rank(mine[world.rank].t()))):
        assert taken.tolist() == [[0, 8], [7, 0]]
        assert mine[rank].tolist() == [[rank, 7], [8, rank]]


def test_one_rank_agrees_with_itself_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a collective was issued")

    for name in ("broadcast", "all_gather"):
        monkeypatch.setattr(dist, name, refuse)
    tables = torch.tensor([1, 0])

    def agree(world: World) -> bool:
        assert_same_on_all_ranks(tables)
        return take_from_first_rank(tables) is tables

    assert run_worlds(1, agree) == [True]
    assert take_from_first_rank(tables) is tables
    assert_same_on_all_ranks(tables)


def test_a_straight_through_search_agrees_before_every_step() -> None:
    """R differs between these ranks, as it never should; their tables do not, at any step."""
    torch.manual_seed(0)
    options = {"per_gate": True, "branches": 2, "forward": "hard", "temperature": (0.1, 0.01), "iterations": (3, 7)}
    searches = [PermutationSearch(5, 4, 3, **options) for _ in range(2)]
    noise = torch.randn(4, 3, 2, 5, 5)

    def search_on_rank(world: World) -> list[list[list[list[int]]]]:
        search, tables = searches[world.rank], []
        for step in range(4):
            search.begin_step()
            search.train()()
            tables.append(search.table.tolist())
            with torch.no_grad():
                search.relaxed.add_(noise[step])
        return tables

    first, second = EmulatedWorld(2).run(search_on_rank)
    assert first == second
    assert len({str(tables) for tables in first}) > 2
    assert not torch.equal(searches[0].soft, searches[1].soft)

"""The slot -> expert table: its first map, its values, and when it is looked at."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from dist_moe.routing import HardMap
from dist_moe.search import SlotTable, slot_table


def merges(table: SlotTable) -> list[bool]:
    maps, aux = table()
    assert aux == {}
    assert all(isinstance(each, HardMap) and each.num_experts == table.num_experts for each in maps)
    return [each.merges for each in maps if isinstance(each, HardMap)]


@pytest.mark.parametrize(
    ("slots", "experts", "first"), [(None, 3, [0, 1, 2]), (7, 3, [0, 1, 2, 0, 1, 2, 0]), (2, 3, [0, 1])]
)
def test_slots_are_dealt_out_to_the_experts(slots: int | None, experts: int, first: list[int]) -> None:
    table = SlotTable(experts, 2, num_slots=slots, per_gate=True, branches=2)
    assert table.table.tolist() == [[first, first]] * 2
    assert (table.num_slots, table.branches) == (len(first), 2)
    matrix = table.current_matrix()
    assert matrix.shape == (2, 2, len(first), experts)
    assert torch.equal(matrix.argmax(-1), table.table)
    assert torch.equal(matrix.sum(-1), torch.ones(2, 2, len(first)))


def test_only_tables_in_which_slots_meet_merge() -> None:
    assert merges(SlotTable(4, 2)) == [False, False]
    assert merges(SlotTable(4, num_slots=3)) == [False]
    assert merges(SlotTable(4, num_slots=5)) == [True]
    assert merges(SlotTable(4, branches=2)) == [True]
    table = SlotTable(4, 2, per_gate=True)
    table.table[1, 0] = torch.tensor([0, 1, 1, 3])
    assert merges(table) == [False, True]


def test_a_table_is_looked_at_once_after_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    check = slot_table.check_tables

    def counted(*arguments: Any) -> list[bool]:
        looks.append(1)
        return check(*arguments)

    monkeypatch.setattr(slot_table, "check_tables", counted)
    table = SlotTable(4)
    for _ in range(3):
        assert merges(table) == [False]
    assert len(looks) == 1
    table.table[0, 0, 1] = 0
    assert merges(table) == merges(table) == [True]
    assert len(looks) == 2
    table.load_state_dict(SlotTable(4).state_dict())
    assert merges(table) == [False]
    copied = deepcopy(table)
    copied.table.copy_(torch.tensor([[[1, 1, 1, 1]]]))
    assert (merges(copied), merges(table)) == ([True], [False])


def test_a_table_that_names_no_expert_is_refused() -> None:
    table = SlotTable(3, num_slots=5)
    table.load_state_dict(SlotTable(4, num_slots=5).state_dict())
    with pytest.raises(ValueError, match=r"names expert 3; allowed: 0\.\.2"):
        table()

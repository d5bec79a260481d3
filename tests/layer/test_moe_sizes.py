"""Gates, bank and world that do not fit each other are refused, with the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet, TopK
from dist_moe.layer import MoE
from dist_moe.parallel import EmulatedWorld, World
from dist_moe.search import PermutationSearch, SlotTable


@pytest.mark.parametrize(
    ("gates", "bank", "table", "message"),
    [
        (Comet(3, 6), range(4), None, r"6 slots and tokens of width 3 does not fit 4 experts of width 3,"),
        ([TopK(3, 4), TopK(3, 6)], range(4), None, "a gate over 6 slots"),
        (TopK(5, 4), range(4), None, "width 5 does not fit 4 experts of width 3"),
        ([], range(4), None, "at least one gate"),
        (TopK(3, 4), [0, 1], None, r"must hold the experts \(0, 1, 2, 3\), its bank holds \(0, 1\)"),
        (TopK(3, 6), range(4), SlotTable(4, num_slots=5), r"6 slots .* does not fit 4 experts .* for 5 slots"),
        (TopK(3, 6), range(4), PermutationSearch(6, 5), r"onto 6 experts do not fit 1 gate\(s\) and 4 experts"),
        (TopK(3, 6), range(4), PermutationSearch(4, 5), r"a gate over 6 slots .* for 4 slots"),
    ],
)
def test_what_does_not_fit_on_one_rank(gates: Any, bank: Any, table: SlotTable | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(gates, DenseReLUBank(3, 2, 4, bank), table)


def test_whole_bank_on_each_of_two_ranks() -> None:
    gate, bank = TopK(3, 4), DenseReLUBank(3, 2, 4, range(4))

    def refuse(world: World) -> str:
        with pytest.raises(ValueError, match="of 2 must hold the experts") as raised:
            MoE(gate, bank, None, world)
        return str(raised.value)

    assert len(EmulatedWorld(2).run(refuse)) == 2


def test_experts_of_another_rank() -> None:
    """The right number of experts with the wrong ids would compute another function."""
    gate = TopK(3, 4)
    banks = [DenseReLUBank(3, 2, 4, ids) for ids in ([2, 3], [0, 1])]

    def refuse(world: World) -> None:
        with pytest.raises(ValueError, match="expert"):
            MoE(gate, banks[world.rank], None, world)

    EmulatedWorld(2).run(refuse)


@pytest.mark.parametrize("per_gate", [False, True])
def test_slot_maps_for_another_number_of_gates(per_gate: bool) -> None:
    """One table that all gates share must know their number, too."""
    gates, bank = [TopK(3, 4), TopK(3, 4)], DenseReLUBank(3, 2, 4, range(4))
    for table in (SlotTable(4, 3, per_gate=per_gate), PermutationSearch(4, 5, 3, per_gate=per_gate)):
        with pytest.raises(ValueError, match=r"slot maps for 3 gate\(s\) onto 4 experts do not fit 2 gate\(s\)"):
            MoE(gates, bank, table)
    assert len(MoE(gates, bank, SlotTable(4, 2, per_gate=per_gate))(torch.zeros(5, 3)).outputs) == 2


def test_branches_with_slots_of_their_own_need_a_table_for_each() -> None:
    gate, bank = Comet(3, 4, k=2), DenseReLUBank(3, 2, 4, range(4))
    with pytest.raises(ValueError, match=r"a gate over 4 slots .* for 4 slots in each of 2 branches"):
        MoE(gate, bank, SlotTable(4, branches=2))
    gate.splits_branches = True
    assert len(MoE(gate, bank, SlotTable(4, branches=2))(torch.zeros(5, 3)).outputs) == 1
    for table in (None, SlotTable(4)):
        with pytest.raises(ValueError, match=r"a gate over 8 slots .* for 4 slots"):
            MoE(gate, bank, table)

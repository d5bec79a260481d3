"""The entropy of gates that have not begun to harden, to which the measured one is compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_moe.gates import Comet, DSelectK, Gate, HashRouting, NullSlots, Softmax, TopK


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("slots", [4, 8])
def test_it_is_the_loss_where_all_slots_are_alike(slots: int, lazy: bool, static: bool) -> None:
    gates: list[Gate] = [DSelectK(5, slots, k=3, entropy_weight=0.3, static=static)]
    if not (lazy and static):
        gates.append(Comet(5, slots, k=3, entropy_weight=0.3, lazy=lazy, static=static))
        gates.append(NullSlots(Comet(5, slots, k=2, entropy_weight=0.5, static=static), slots - 2))
    for gate in gates:
        for parameter in gate.parameters():
            nn.init.zeros_(parameter)
        assert gate(torch.randn(7, 5)).aux["entropy"].item() == pytest.approx(gate.largest_entropy, rel=1e-4)


def test_of_the_slots_that_may_be_chosen() -> None:
    """Only the first four of eight leaves: the left half of each tree."""
    gate = Comet(5, 8, k=2)
    for parameter in gate.parameters():
        nn.init.zeros_(parameter)
    gate.allow(torch.arange(8) < 4)
    assert gate(torch.randn(7, 5)).aux["entropy"].item() == pytest.approx(gate.largest_entropy, rel=1e-4)


def test_gates_without_the_loss_have_none() -> None:
    counts = torch.ones(9, dtype=torch.int64)
    for gate in (TopK(5, 4), Softmax(5, 4), HashRouting(5, 4, counts, "balanced"), Comet(5, 4, entropy_weight=0.0)):
        assert gate.largest_entropy == 0

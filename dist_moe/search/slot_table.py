"""The slot -> expert table of an MoE layer: what every local search rewrites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.gates import Gate
from dist_moe.routing import HardMap, SlotMap, check_tables


class SlotTable(nn.Module):
    """``table`` (P, K, S) int64, a buffer in the checkpoint: slot i of branch k is expert ``table[p, k, i]``.

    Slot i is expert i mod ``num_experts`` at first: the identity where there are as many slots as experts (the
    default). Any map may be written into it: slots that have the same expert add up their weights, an expert that
    no slot has gets no token. P is 1 when all gates share the table, else the number of gates; K is 1, or the
    number of branches when each has a table of its own.
    """

    table: Tensor

    def __init__(
        self,
        num_experts: int,
        num_gates: int = 1,
        *,
        num_slots: int | None = None,
        per_gate: bool = False,
        branches: int = 1,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_gates = num_gates
        self.per_gate = per_gate
        tables = num_gates if per_gate else 1
        expert_S = torch.arange(num_slots or num_experts) % num_experts
        self.register_buffer("table", expert_S.repeat(tables, branches, 1))
        self._checked: tuple[Tensor, int] | None = None
        self._merges: list[bool] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._checked = None  # the changes of a copied tensor are counted anew

    @property
    def num_slots(self) -> int:
        """Number S of slots of a gate, or of each branch where branches have tables of their own."""
        return self.table.shape[-1]

    @property
    def branches(self) -> int:
        """Number K of tables of each gate."""
        return self.table.shape[1]

    def forward(self) -> tuple[Sequence[SlotMap], dict[str, Tensor]]:
        """Return one slot map per gate, and auxiliary losses by name."""
        return self.for_gates(self.hard_maps()), {}

    def hard_maps(self) -> list[HardMap]:
        """Return the map of each of the P tables. Raises ValueError if one names an expert that does not exist."""
        # Whether slots meet is a look at the values, for which the host waits for the device. So it is taken only
        # after a change: torch counts the in-place changes of a tensor, by whomever (a search, a loaded checkpoint).
        if self._checked is None or self._checked[0] is not self.table or self._checked[1] != self.table._version:
            self._merges = check_tables(self.table, self.num_experts)
            self._checked = self.table, self.table._version
        return [HardMap(table, self.num_experts, m) for table, m in zip(self.table, self._merges, strict=True)]

    def for_gates(self, maps: Sequence[SlotMap]) -> list[SlotMap]:
        """Return one map per gate, given one per table."""
        return list(maps) if self.per_gate else list(maps) * self.num_gates

    @property
    def learning(self) -> bool:
        """Whether training still learns the tables, so that what a search finds would be overwritten."""
        return False

    def end_learning(self) -> None:
        """Keep the tables as they are from now on."""

    def begin_step(self) -> None:
        """Prepare for a training step. On every rank."""

    def begin_evaluation(self) -> None:
        """Prepare for an evaluation. On every rank."""

    def current_matrix(self) -> Tensor:
        """Return the (P, K, S, E) matrices, without gradient, that are learnt now, else the tables'."""
        return self.matrix_of(self.table)

    def matrix_of(self, table: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (..., S, E) matrices of zeros and ones of tables (..., S)."""
        return torch.eye(self.num_experts, dtype=dtype, device=table.device)[table]


def give_branches_slots(gates: Sequence[Gate], table: SlotTable) -> None:
    """Let each branch of every gate have slots of its own if ``table`` has a table for each.

    Raises ValueError if a gate has another number of branches.
    """
    if table.branches == 1:
        return
    for gate in gates:
        if gate.num_branches != table.branches:
            raise ValueError(f"{table.branches} tables per gate do not fit a gate of {gate.num_branches} branch(es)")
        gate.splits_branches = True

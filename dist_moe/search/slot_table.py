"""The slot -> expert table of an MoE layer: what every local search rewrites."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_moe.gates import Gate
from dist_moe.routing import HardPermutation, Permutation


class SlotTable(nn.Module):
    """``table`` (P, K, n) int64, a buffer in the checkpoint: slot i of branch k is expert
    ``table[p, k, i]``, the identity at first.

    P is 1 when all gates share the table, else the number of gates; K is 1, or the number of
    branches when each has a table of its own.
    """

    table: Tensor

    def __init__(self, num_experts: int, num_gates: int = 1, *, per_gate: bool = False, branches: int = 1) -> None:
        super().__init__()
        self.num_gates = num_gates
        self.per_gate = per_gate
        tables = num_gates if per_gate else 1
        self.register_buffer("table", torch.arange(num_experts).repeat(tables, branches, 1))

    def forward(self) -> tuple[Sequence[Permutation], dict[str, Tensor]]:
        """One permutation per gate, and auxiliary losses by name."""
        return self.for_gates([HardPermutation(table_KE) for table_KE in self.table]), {}

    def for_gates(self, permutations: Sequence[Permutation]) -> list[Permutation]:
        """One per table -> one per gate."""
        return list(permutations) if self.per_gate else list(permutations) * self.num_gates

    @property
    def learning(self) -> bool:
        """Whether training still learns the tables, so that what a search finds would be overwritten."""
        return False

    def end_learning(self) -> None:
        """Keep the tables as they are from now on."""

    def begin_step(self) -> None:
        """Called before each training step on every rank."""

    def begin_evaluation(self) -> None:
        """Called before each evaluation on every rank."""

    def current_matrix(self) -> Tensor:
        """(P, K, n, n), without gradient: the permutation matrices that are learnt now, else the tables'."""
        return torch.eye(self.table.shape[-1], device=self.table.device)[self.table]


def give_branches_slots(gates: Sequence[Gate], table: SlotTable) -> None:
    """Let each branch of every gate have slots of its own if ``table`` has a table for each.

    Raises ValueError if a gate has another number of branches.
    """
    branches = table.table.shape[1]
    if branches == 1:
        return
    for gate in gates:
        if gate.num_branches != branches:
            raise ValueError(f"{branches} tables per gate do not fit a gate of {gate.num_branches} branch(es)")
        gate.splits_branches = True

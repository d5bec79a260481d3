"""Slot -> expert matrices of B stacked models: tables, or relaxed permutations in stages of B lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_moe.search import PermutationSearch, SlotTable
from dist_moe.search.agreement import round_to_tables
from dist_moe.search.sinkhorn import permutation_entropy, sinkhorn_each
from dist_moe.sweeps.stacked.parameters import StackedParameters

LAYER = "moe"
"""The name of the layer in models that have one."""

_PREFIX = f"{LAYER}.slot_map."


class StackedPermutations:
    """The slot tables and permutation searches of B models, for all at once.

    The tables are buffers and the relaxed matrices parameters of ``stack``; the schedules, of stages of
    different lengths, are kept here.
    """

    def __init__(self, tables: Sequence[SlotTable], stack: StackedParameters) -> None:
        self._stack = stack
        self._searches = [table for table in tables if isinstance(table, PermutationSearch)]
        self._first = tables[0]

    def keep(self, trials: Sequence[int]) -> None:
        """Go on with these trials only, by their places in the stack."""
        if self._searches:
            self._searches = [self._searches[i] for i in trials]

    def learning(self, place: int, steps: int) -> bool:
        """Return whether the stage of the trial at ``place`` lasts after ``steps`` steps."""
        return bool(self._searches) and steps < self._searches[place].stage_steps

    def begin_step(self, step: int) -> None:
        """Round the stages that end before training step ``step`` (from 0)."""
        self._round([step + 1 == search.stage_steps for search in self._searches])

    def begin_evaluation(self, steps: int) -> None:
        """Round the stages that last after ``steps`` steps."""
        self._round([0 < steps < search.stage_steps for search in self._searches])

    def hard(self) -> list[Tensor]:
        """Return one (B, K, S, E) tensor of the tables' matrices per gate."""
        return self._by_gate(self._first.matrix_of(self._stack.buffers[_PREFIX + "table"]))

    def training(self, step: int) -> tuple[list[Tensor], Tensor | None]:
        """Return the matrices of training step ``step`` (from 0), and the (B,) penalties if any stage lasts."""
        lasting = [step + 1 < search.stage_steps for search in self._searches]
        if not any(lasting):
            return self.hard(), None
        soft = self._soft(step + 1)
        lasts = torch.tensor(lasting, device=soft.device).view(-1, 1, 1, 1, 1)
        with torch.no_grad():
            kept = self._stack.buffers[_PREFIX + "soft"]
            kept.copy_(torch.where(lasts, soft, kept))
        matrices = torch.where(lasts, soft, self._first.matrix_of(self._stack.buffers[_PREFIX + "table"]))
        weights = torch.tensor([s.entropy_weight * on for s, on in zip(self._searches, lasting, strict=True)])
        penalties = torch.stack([permutation_entropy(of_trial) for of_trial in soft]) * weights.to(soft.device)
        return self._by_gate(matrices), penalties

    def _soft(self, count: int) -> Tensor:
        """(B, P, K, n, n) of the training step that is the ``count``-th."""
        relaxed = self._stack.values[_PREFIX + "relaxed"]
        schedules = [search.schedule(count) for search in self._searches]
        temperature = torch.tensor([t for t, _ in schedules], dtype=torch.float64, device=relaxed.device)
        logits = relaxed.double() / temperature.view(-1, 1, 1, 1, 1)
        return sinkhorn_each(logits, [iterations for _, iterations in schedules]).float()

    def _round(self, chosen: Sequence[bool]) -> None:
        for trial, (search, due) in enumerate(zip(self._searches, chosen, strict=True)):
            source = "relaxed" if search.rounds_relaxed else "soft"
            tensors = self._stack.values if source == "relaxed" else self._stack.buffers
            relaxed = tensors[_PREFIX + source][trial].detach()
            if due and torch.isfinite(relaxed).all():  # else its validation loss is NaN, and it leaves
                self._stack.buffers[_PREFIX + "table"][trial] = round_to_tables(relaxed)

    def _by_gate(self, matrices: Tensor) -> list[Tensor]:
        """(B, P, K, S, E) -> one (B, K, S, E) per gate."""
        tables = list(matrices.unbind(1))
        return tables if self._first.per_gate else tables * self._first.num_gates

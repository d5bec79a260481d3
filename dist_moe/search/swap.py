"""Swap search: local search over slot -> expert tables by exchanging the experts of two slots.

The title of COMET (KDD 2023) promises local search; its code relaxes permutations (see
``permutation.py``) but never swaps. Here the neighbourhood is explicit. For a layer with mixtures g
and experts f, the output is y = sum_s g_s sum_e P[s, e] f_e(x), with P the matrix of the table. The
gradient of the loss with respect to P, at the table, estimates to first order what a swap of slots a
and b gains, in any slot map (in one that is many to one, as many slots keep each expert):

    gain(a, b) = D[a, e_a] + D[b, e_b] - D[a, e_b] - D[b, e_a],     D = dL/dP

All swaps are screened by that estimate; the most promising are verified exactly, in rounds. A round
takes its best swap if it lowers the loss; if none does, the next promising ones are verified. The
search ends when every swap has been verified in vain (a local optimum), or with its budget.

The experts' results for the search's batches are computed once and reused for every candidate. Each
rank scores its own batches; losses and gradients are summed over ranks, rank 0 decides, and every
rank proves by digest that it holds the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.config.settings import Settings
from dist_moe.parallel import sum_over_ranks
from dist_moe.search.agreement import assert_same_on_all_ranks, take_from_first_rank
from dist_moe.search.layers import is_held, moe_layers, slot_tables
from dist_moe.search.replay import Recorder, Recording, Replayed, replaying

RESOLUTION = {torch.float32: 1e-6, torch.float64: 1e-11}
"""By the loss's precision, the share of the loss below which two candidates count as equal: the rounding of
sums, which depends on how many ranks share the examples, must not decide between experts that hardly matter."""

BatchLoss = Callable[[Any], Tensor]
"""A batch -> this batch's share of the loss; the shares of all batches and ranks add up to the loss."""


class SwapSearchConfig(Settings):
    """Local search by swaps, on held-out examples."""

    examples: int = Field(4096, ge=1, description="validation examples that score a table, over all ranks")
    batch_size: int = Field(
        2048, ge=1, description="examples per forward pass; what all experts make of all examples is held in memory"
    )
    verified_per_round: int = Field(16, ge=1, description="swaps verified exactly before the best of them is taken")
    max_swaps: int = Field(200, ge=0, description="swaps taken at most")
    max_verified: int = Field(20_000, ge=1, description="swaps verified at most")
    least_gain: float = Field(1e-6, ge=0, description="share of the loss that a swap must gain to be taken")


@dataclass(frozen=True, order=True)
class Swap:
    """Exchange the experts of ``slots`` in row ``row`` (gate, branch) of the table of layer ``layer``."""

    layer: int
    row: tuple[int, int]
    slots: tuple[int, int]


@dataclass
class SwapReport:
    """``losses``: before the search and after every swap taken. ``screened``, ``verified``: candidates
    that were estimated to first order and evaluated exactly. ``local_optimum``: no swap helps any more."""

    losses: list[float] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    screened: int = 0
    verified: int = 0
    local_optimum: bool = False


class SwapSearch:
    """``SwapSearch(model, batches, loss, config).run()``: swaps until nothing helps. Collective.

    ``model``: any module with one or several MoE layers whose slot map is a ``SlotTable``, and which
    run in the order in which they were registered, once each. Tables that are held still are left alone.
    ``batches``: this rank's; every rank has as many (they may be empty). ``loss``: see ``BatchLoss``;
    it runs ``model`` in evaluation mode.

    Raises ValueError if the model has no such layer, or one that the loss does not need.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], loss: BatchLoss, config: SwapSearchConfig) -> None:
        self._model = model
        tables = {name: table for name, table in slot_tables(model).items() if not is_held(table)}
        if not tables:
            raise ValueError("the model has no MoE layer with a slot -> expert table to search")
        self._layers = [moe_layers(model)[name] for name in tables]
        self._slot_tables = list(tables.values())
        self._batches = batches
        self._loss = loss
        self._config = config
        self._resolution = RESOLUTION[torch.float32]
        self._recordings: list[list[Recording]] = []

    @property
    def tables(self) -> list[Tensor]:
        """Return the (P, K, S) tables, one per layer."""
        return [table.table for table in self._slot_tables]

    def run(self) -> SwapReport:
        """Return a report of the search; the model then holds the best table found."""
        was_training = self._model.training
        self._model.eval()
        report = SwapReport()
        try:
            self._search(report)
        finally:
            self._model.train(was_training)
            self._recordings = []
        for table in self.tables:
            assert_same_on_all_ranks(table)
        return report

    def _search(self, report: SwapReport) -> None:
        self._record()
        report.losses.append(self._losses([None])[0])
        while len(report.swaps) < self._config.max_swaps:
            swap, loss = self._best_swap(report)
            if swap is None:
                return
            self._apply(swap)
            report.swaps.append(swap)
            report.losses.append(loss)
            if swap.layer + 1 < len(self._layers):
                self._record()

    def _best_swap(self, report: SwapReport) -> tuple[Swap | None, float]:
        """Return the best of the first round of candidates in which any helps, and the loss with it."""
        resolution = self._resolution * max(abs(report.losses[-1]), torch.finfo(torch.float64).tiny)
        candidates = self._by_estimated_gain(resolution)
        report.screened += len(candidates)
        enough = report.losses[-1] - self._config.least_gain * abs(report.losses[-1])
        affordable = candidates[: self._config.max_verified - report.verified]
        for start in range(0, len(affordable), self._config.verified_per_round):
            swaps = affordable[start : start + self._config.verified_per_round]
            losses = self._losses(swaps)
            report.verified += len(swaps)
            best = min(range(len(swaps)), key=lambda i: (round(losses[i] / resolution), swaps[i]))
            if losses[best] < enough:
                return swaps[best], losses[best]
        report.local_optimum = len(affordable) == len(candidates)
        return None, report.losses[-1]

    def _by_estimated_gain(self, resolution: float) -> list[Swap]:
        """Return all swaps, the most promising first, equal ones in their own order; the same on every rank."""
        swaps: list[Swap] = []
        gains = []
        for layer, (table, gradient) in enumerate(zip(self.tables, self._gradients(), strict=True)):
            for some, gain in _swaps_of(layer, table, gradient):
                swaps += some
                gains.append(gain)
        steps = (torch.cat(gains) / resolution).round()
        order = take_from_first_rank(steps.argsort(descending=True, stable=True))
        return [swaps[i] for i in order.tolist()]

    def _gradients(self) -> list[Tensor]:
        """Return dL/dP of each layer, (P, K, S, E) in fp64, at the present tables, summed over batches and ranks."""
        matrices = [table.matrix_of(table.table, torch.float64) for table in self._slot_tables]
        totals = [torch.zeros_like(matrix) for matrix in matrices]
        for batch, recordings in zip(self._batches, self._recordings, strict=True):
            for layer, total in enumerate(totals):
                matrix = matrices[layer].detach().requires_grad_()
                replays = [*map(Replayed, recordings[:layer]), Replayed(recordings[layer], matrix)]
                with torch.enable_grad(), replaying(self._layers[: layer + 1], replays):
                    loss = self._loss(batch)
                    total += torch.autograd.grad(loss, matrix)[0]
        return [sum_over_ranks(total) for total in totals]

    @torch.no_grad()
    def _losses(self, swaps: Sequence[Swap | None]) -> list[float]:
        """Return the loss over all batches and ranks after each of the swaps alone; the same on every rank."""
        totals = torch.zeros(len(swaps), dtype=torch.float64, device=self.tables[0].device)
        for batch, recordings in zip(self._batches, self._recordings, strict=True):
            for i, swap in enumerate(swaps):
                replayed = len(self._layers) if swap is None else swap.layer + 1
                self._apply(swap)
                try:
                    with replaying(self._layers[:replayed], map(Replayed, recordings[:replayed])):
                        totals[i] += self._loss(batch).double()
                finally:
                    self._apply(swap)  # swapping again undoes it
        return take_from_first_rank(sum_over_ranks(totals)).tolist()

    @torch.no_grad()
    def _record(self) -> None:
        """Run every batch under the present tables, and keep what gates and experts of each layer gave."""
        self._recordings = []
        for batch in self._batches:
            recorders = [Recorder() for _ in self._layers]
            with replaying(self._layers, recorders):
                precision = self._loss(batch).dtype
            self._resolution = RESOLUTION.get(precision, RESOLUTION[torch.float32])
            self._recordings.append([r.recording for r in recorders if r.recording is not None])
            if len(self._recordings[-1]) < len(self._layers):
                raise ValueError("an MoE layer with a table takes no part in the loss: there is nothing to search")

    def _apply(self, swap: Swap | None) -> None:
        if swap is not None:
            expert_S = self.tables[swap.layer][swap.row]
            expert_S[list(swap.slots)] = expert_S[list(swap.slots[::-1])]


def _swaps_of(layer: int, table: Tensor, gradient: Tensor) -> Iterator[tuple[list[Swap], Tensor]]:
    """Yield, per row (gate, branch) of a layer's table, all swaps and what each gains to first order.

    Two slots that have the same expert have nothing to exchange.
    """
    for row in product(range(table.shape[0]), range(table.shape[1])):
        expert_S = table[row]
        d_SS = gradient[row][:, expert_S]  # D of slot a with the expert of slot b
        own_S = d_SS.diagonal()
        gain_SS = own_S[:, None] + own_S[None, :] - d_SS - d_SS.T
        first, second = (expert_S[:, None] != expert_S[None, :]).triu(diagonal=1).nonzero(as_tuple=True)
        slots = zip(first.tolist(), second.tolist(), strict=True)
        yield [Swap(layer, row, pair) for pair in slots], gain_SS[first, second]

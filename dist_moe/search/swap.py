"""Swap search: local search over slot -> expert tables by exchanging the experts of two slots.

The title of COMET (KDD 2023) promises local search; its code relaxes permutations (see
``permutation.py``) but never swaps. Here the neighbourhood is explicit. The gradient D = dL/dP at the table (see
``scores.py``) estimates to first order what a swap of slots a and b gains, in any slot map (in one that is many to one,
as many slots keep each expert):

    gain(a, b) = D[a, e_a] + D[b, e_b] - D[a, e_b] - D[b, e_a]

All swaps are screened by that estimate; the most promising are verified exactly, in rounds. A round
takes its best swap if it lowers the loss; if none does, the next promising ones are verified. The
search ends when every swap has been verified in vain (a local optimum), or with its budget.

Rank 0 decides, and every rank proves by digest that it holds the same table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from dist_moe.config.settings import Settings
from dist_moe.search.agreement import take_from_first_rank
from dist_moe.search.moves import Control, Move, Swap, rows_of, take_control
from dist_moe.search.scores import TableScores


class TableSearchConfig(Settings):
    """The fields that every search over slot -> expert tables has."""

    examples: int = Field(4096, ge=1, description="examples that score a table, over all ranks")
    batch_size: int = Field(2048, ge=1, description="examples per forward pass of a rank")
    verified_per_round: int = Field(16, ge=1, description="swaps verified exactly before the best of them is taken")
    max_verified: int = Field(20_000, ge=1, description="candidates verified at most")
    least_gain: float = Field(1e-6, ge=0, description="share of the loss that a candidate must gain to be taken")
    control: Control | None = Field(
        None,
        description="for comparisons: search at the same cost, but then take in place of what was found as many random "
        "swaps, unverified, or nothing (identity)",
    )


class SwapSearchConfig(TableSearchConfig):
    """Local search by swaps, on held-out examples; what all experts make of all examples is held in memory."""

    max_swaps: int = Field(200, ge=0, description="swaps taken at most")


@dataclass
class SearchReport:
    """``losses``: before the search and after every move found. ``taken``: the swaps that the tables have in the end,
    others than those of ``moves`` under a control. ``screened``, ``verified``: candidates that were estimated to first
    order and evaluated exactly. ``local_optimum``: no swap helps any more."""

    losses: list[float] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    taken: Move = ()
    screened: int = 0
    verified: int = 0
    local_optimum: bool = False

    @property
    def swaps(self) -> Move:
        """The swaps of all moves, in order."""
        return tuple(swap for move in self.moves for swap in move)


class SwapSearch:
    """``SwapSearch(scores, config).run()``: swaps until nothing helps. Collective."""

    def __init__(self, scores: TableScores, config: SwapSearchConfig) -> None:
        self._scores, self._config = scores, config

    def run(self, seed: int = 0) -> SearchReport:
        """Return a report of the search; the model then holds the best table found.

        ``seed``: of a control's random swaps, alike on all ranks.
        """
        scores, report = self._scores, SearchReport()
        with scores.searching():
            report.losses += scores.losses([()])
            while len(report.moves) < self._config.max_swaps:
                gradients, step = scores.gradients(), step_of(scores, report)
                if not all_finite(step, gradients):
                    break
                candidates = swaps_by_gain(scores.tables, gradients, step)
                report.screened += len(candidates)
                if not take_best(scores, candidates, report, self._config):
                    break
            settle(scores.tables, report, self._config, seed)
        return report


def settle(tables: Sequence[Tensor], report: SearchReport, config: TableSearchConfig, seed: int) -> None:
    """Do to ``tables``, which hold what was found, what ``config.control`` says, if anything."""
    report.taken = report.swaps
    if config.control is not None:
        report.taken = take_control(config.control, report.swaps, tables, seed)


def step_of(scores: TableScores, report: SearchReport) -> float:
    """Return the difference of losses below which two candidates count as equal; above 0 for a loss of 0, too."""
    return scores.resolution * max(abs(report.losses[-1]), math.sqrt(torch.finfo(torch.float64).tiny))


def all_finite(step: float, gradients: Sequence[Tensor]) -> bool:
    """Whether candidates can be compared at all: not where the loss or a gradient is not finite."""
    return math.isfinite(step) and all(bool(gradient.isfinite().all()) for gradient in gradients)


def take_best(scores: TableScores, candidates: Sequence[Move], report: SearchReport, config: TableSearchConfig) -> bool:
    """Verify ``candidates`` in rounds and take the best of the first round in which any helps; whether one did.

    Within the budget of ``config``; adds to ``report``.
    """
    step = step_of(scores, report)
    enough = report.losses[-1] - config.least_gain * abs(report.losses[-1])
    affordable = candidates[: config.max_verified - report.verified]
    for start in range(0, len(affordable), config.verified_per_round):
        moves = affordable[start : start + config.verified_per_round]
        losses = scores.losses(moves)
        report.verified += len(moves)
        steps = [round(loss / step) if math.isfinite(loss) else math.inf for loss in losses]
        best = min(range(len(moves)), key=lambda i: (steps[i], moves[i]))
        if losses[best] < enough:
            scores.take(moves[best])
            report.moves.append(moves[best])
            report.losses.append(losses[best])
            return True
    report.local_optimum = len(affordable) == len(candidates)
    return False


def swaps_by_gain(tables: Sequence[Tensor], gradients: Sequence[Tensor], step: float) -> list[Move]:
    """Return all swaps, the most promising first, equal ones in their own order; the same on every rank.

    ``gradients``: D of each layer. ``step``: see :func:`step_of`.
    """
    swaps: list[Move] = []
    gains = []
    for layer, (table, gradient) in enumerate(zip(tables, gradients, strict=True)):
        for some, gain in _swaps_of(layer, table, gradient):
            swaps += some
            gains.append(gain)
    order = take_from_first_rank((torch.cat(gains) / step).round().argsort(descending=True, stable=True))
    return [swaps[i] for i in order.tolist()]


def _swaps_of(layer: int, table: Tensor, gradient: Tensor) -> Iterator[tuple[list[Move], Tensor]]:
    """Yield, per row (gate, branch) of a layer's table, all swaps and what each gains to first order.

    Two slots that have the same expert have nothing to exchange.
    """
    for row in rows_of(table):
        expert_S = table[row]
        d_SS = gradient[row][:, expert_S]  # D of slot a with the expert of slot b
        own_S = d_SS.diagonal()
        gain_SS = own_S[:, None] + own_S[None, :] - d_SS - d_SS.T
        first, second = (expert_S[:, None] != expert_S[None, :]).triu(diagonal=1).nonzero(as_tuple=True)
        slots = zip(first.tolist(), second.tolist(), strict=True)
        yield [(Swap(layer, row, pair),) for pair in slots], gain_SS[first, second]

"""Assignment search: the best table to first order by one linear assignment per row, verified on other examples.

With D = dL/dP at the present table (see ``scores.py``), a table that gives slot s the expert pi(s) has the loss

    L(pi) = L + sum_s D[s, pi(s)] - sum_s D[s, e_s]     to first order,

which a linear assignment minimises over all permutations of the experts among the slots at the price of one screening
of a swap search. (Among S slots of fewer experts each expert keeps as many slots: its column counts as often.) Far from
the present table the estimate may be wrong, so a move is taken only if it lowers the loss of *other* examples than
those of D: all rows' assignments at once, else those of single rows. That is repeated until none helps. If wanted,
single swaps are then verified as in ``swap.py``: where they end in vain no swap helps any more.

The experts' results are needed for D alone, a chunk of tokens at a time. D is summed over ranks, rank 0 assigns, and
every rank proves by digest that it holds the same table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from dist_moe.search.agreement import round_to_table, take_from_first_rank
from dist_moe.search.moves import Move, rows_of, swaps_towards
from dist_moe.search.scores import StreamedScores, TableScores
from dist_moe.search.swap import (
    SearchReport,
    TableSearchConfig,
    all_finite,
    settle,
    step_of,
    swaps_by_gain,
    take_best,
)


class AssignmentSearchConfig(TableSearchConfig):
    """Local search by linear assignments on dL/dP, each verified on other examples than it was found on."""

    examples: int = Field(2048, ge=1, description="examples that give dL/dP, over all ranks")
    verified_on: int = Field(2048, ge=1, description="other examples, which a move must help, over all ranks")
    batch_size: int = Field(512, ge=1, description="examples per forward pass of a rank")
    chunk_bytes: int = Field(
        2**28, ge=1, description="bytes that all experts' results for a chunk of tokens may take on a rank"
    )
    least_gain: float = Field(1e-4, ge=0, description="share of the loss that a candidate must gain to be taken")
    max_moves: int = Field(10, ge=0, description="moves taken at most in one search")
    polish: bool = Field(False, description="when no assignment helps any more, verify single swaps until none helps")


class AssignmentSearch:
    """``AssignmentSearch(fitted, verified, config).run()``: assigns anew until nothing helps. Collective.

    ``fitted``, ``verified``: scores of one model on the examples that give D, and on those that decide.
    """

    def __init__(self, fitted: StreamedScores, verified: TableScores, config: AssignmentSearchConfig) -> None:
        self._fitted, self._verified, self._config = fitted, verified, config

    def run(self, seed: int = 0) -> SearchReport:
        """Return a report of the search, whose losses are those of the verifying examples; the model then holds the
        best table found. ``seed``: of a control's random swaps, alike on all ranks."""
        report, config = SearchReport(), self._config
        with self._fitted.searching(), self._verified.searching():
            report.losses += self._verified.losses([()])
            while len(report.moves) < config.max_moves and self._move(report):
                pass
            settle(self._verified.tables, report, config, seed)
        return report

    def _move(self, report: SearchReport) -> bool:
        scores, config = self._verified, self._config
        gradients, step = self._fitted.gradients(), step_of(scores, report)
        if not all_finite(step, gradients):
            return False
        moves = assignments(scores.tables, gradients, step)
        report.screened += sum(table[..., 0].numel() for table in scores.tables)
        if take_best(scores, moves, report, config):
            return True
        report.local_optimum = False
        if not config.polish:
            return False
        swaps = swaps_by_gain(scores.tables, gradients, step)
        report.screened += len(swaps)
        return take_best(scores, swaps, report, config)


def assignments(tables: Sequence[Tensor], gradients: Sequence[Tensor], step: float) -> list[Move]:
    """Return the moves to the rows' best tables to first order: all rows at once, then single ones, the best first.

    Rows that are at their best are left out; a difference in loss below ``step`` is none. The same on every rank.
    """
    moves, gains = list[Move](), list[float]()
    for layer, (table, gradient) in enumerate(zip(tables, gradients, strict=True)):
        for row in rows_of(table):
            steps_SS = (gradient[row][:, table[row]] / step).round()  # D of slot a with the expert of slot b
            # Ties are for staying: all bonuses together are less than a step.
            stays_SS = 0.5 / len(steps_SS) * torch.eye(len(steps_SS), dtype=steps_SS.dtype, device=steps_SS.device)
            source_S = take_from_first_rank(round_to_table(stays_SS - steps_SS))
            if move := swaps_towards(layer, row, source_S.tolist()):
                slot_S = torch.arange(len(source_S), device=source_S.device)
                moves.append(move)
                gains.append(float((steps_SS.diagonal() - steps_SS[slot_S, source_S]).sum()))
    order = sorted(range(len(moves)), key=lambda i: (-gains[i], moves[i]))
    together = [tuple(swap for move in moves for swap in move)] if len(moves) > 1 else []
    return together + [moves[i] for i in order]

"""From trial records to the rows of the report."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dist_moe.sweeps.records import State, TrialRecord
from dist_moe.sweeps.runner import OBJECTIVE
from dist_moe.sweeps.statistics import (
    BestMean,
    BudgetCurve,
    Floats,
    best_trials,
    budget_curve,
    budget_to_reach,
    expected_best,
    mean_of,
    with_bounded_losses,
)

Rows = dict[str, list[TrialRecord]]


@dataclass(frozen=True)
class RowSummary:
    """A row of the report. ``trials``: all but failed ones, which say something of the machine or the code.

    ``metrics``: test metrics over the best trials by validation loss, "loss" first; empty, and ``best``
    and ``curve`` None, where no trial is complete. ``exact``: the closed form of ``curve.expected``.
    """

    name: str
    trials: int
    states: dict[State, int]
    metrics: dict[str, BestMean]
    best: TrialRecord | None
    curve: BudgetCurve | None
    exact: Floats | None


def summarise(rows: Rows, fraction: float, seed: int) -> list[RowSummary]:
    """``fraction``: share of trials, best by validation loss, to average. ``seed``: of the bootstrap."""
    names = _shared_metrics(rows)
    return [_summarise_row(name, records, names, fraction, seed) for name, records in rows.items()]


def trials_to_reach(rows: list[RowSummary]) -> dict[str, dict[str, int | None]]:
    """[A][B]: the trials after which row A can expect what row B can expect of all its trials; None for never."""
    curves = {row.name: row.curve for row in rows if row.curve is not None}
    return {
        one: {other: budget_to_reach(curve, float(target.expected[-1])) for other, target in curves.items()}
        for one, curve in curves.items()
    }


def _summarise_row(name: str, records: list[TrialRecord], metrics: list[str], fraction: float, seed: int) -> RowSummary:
    states: dict[State, int] = {"complete": 0, "diverged": 0, "pruned": 0, "failed": 0}
    for record in records:
        states[record.state] += 1
    counted = [record for record in records if record.state != "failed"]
    if not states["complete"]:
        return RowSummary(name, len(counted), states, {}, None, None, None)
    val_N = np.array([record.loss for record in counted])
    best_M = best_trials(val_N, fraction)
    means = {metric: mean_of(_test(counted, metric)[best_M]) for metric in metrics}
    curve, exact = _curve(val_N, _test(counted, OBJECTIVE), seed)
    return RowSummary(name, len(counted), states, means, counted[best_M[0]], curve, exact)


def _curve(val_N: Floats, test_N: Floats, seed: int) -> tuple[BudgetCurve | None, Floats | None]:
    if not np.isfinite(test_N).any():
        return None, None
    budgets = range(1, len(val_N) + 1)
    losses = with_bounded_losses(val_N, test_N)
    return budget_curve(*losses, budgets, seed=seed), expected_best(*losses, budgets)


def _test(records: list[TrialRecord], metric: str) -> Floats:
    return np.array([record.test.get(metric, math.nan) for record in records], dtype=np.float64)


def _shared_metrics(rows: Rows) -> list[str]:
    """Test metrics that all complete trials of all rows have: the loss, then the others by name."""
    complete = [record.test.keys() for records in rows.values() for record in records if record.state == "complete"]
    shared = set.intersection(*map(set, complete)) if complete else set()
    return [OBJECTIVE, *sorted(shared - {OBJECTIVE})]

"""From trial records to the rows of the report."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np

from dist_moe.sweeps.records import State, TrialRecord
from dist_moe.sweeps.runner import OBJECTIVE
from dist_moe.sweeps.statistics import (
    BudgetCurve,
    Floats,
    best_spread,
    best_trials,
    budget_curve,
    budget_to_reach,
    expected_best,
    with_bounded_losses,
)

Rows = dict[str, list[TrialRecord]]


@dataclass(frozen=True)
class RowSummary:
    """A row of the report. ``trials``: all but failed ones, which say something of the machine or the code.

    ``metrics``: means of test metrics over the ``averaged`` best trials by validation loss, "loss" first, where trials
    without one count as the worst; empty, and ``best`` and ``curve`` None, where no trial is complete. ``spread``: of
    that loss, None if no trial has a finite one, or there is but one. ``exact``: the closed form of
    ``curve.expected``. ``cost``: mean compute of a trial, see :class:`~dist_moe.sweeps.records.TrialRecord`; nan where
    it is not known of all.
    """

    name: str
    trials: int
    states: dict[State, int]
    cost: float
    averaged: int
    metrics: dict[str, float]
    spread: tuple[float, float] | None
    best: TrialRecord | None
    curve: BudgetCurve | None
    exact: Floats | None


def summarise(rows: Rows, fraction: float, seed: int) -> list[RowSummary]:
    """Return a summary of each row of trials, or of draws (:func:`~dist_moe.sweeps.records.by_draw`).

    ``fraction``: share of trials, best by validation loss, to average. ``seed``: of the bootstrap. Only those metrics
    are averaged that all complete trials of all rows have: the loss, then the others by name.
    """
    complete = [record.test.keys() for records in rows.values() for record in records if record.state == "complete"]
    shared = set.intersection(*map(set, complete)) if complete else set()
    names = [OBJECTIVE, *sorted(shared - {OBJECTIVE})]
    return [_summarise_row(name, records, names, fraction, seed) for name, records in rows.items()]


def trials_to_reach(rows: list[RowSummary]) -> dict[str, dict[str, int | None]]:
    """Return in [A][B] after how many trials A can expect what B can expect of all its trials; None for never."""
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
    cost = statistics.fmean(record.compute for record in counted) if counted else math.nan
    if not states["complete"]:
        return RowSummary(name, len(counted), states, cost, 0, {}, None, None, None, None)
    val_N = np.array([record.loss for record in counted])
    best_M = best_trials(val_N, fraction)
    means = {metric: float(_test(counted, metric)[best_M].mean()) for metric in metrics}
    spread, curve, exact, test_N = None, None, None, _test(counted, OBJECTIVE)
    if np.isfinite(test_N).any():
        losses, budgets = with_bounded_losses(val_N, test_N), range(1, len(val_N) + 1)
        curve, exact = budget_curve(*losses, budgets, seed=seed), expected_best(*losses, budgets)
        means[OBJECTIVE] = float(losses[1][best_M].mean())
        spread = best_spread(*losses, fraction, seed=seed) if len(val_N) > 1 else None
    return RowSummary(name, len(counted), states, cost, len(best_M), means, spread, counted[best_M[0]], curve, exact)


def _test(records: list[TrialRecord], metric: str) -> Floats:
    return np.array([record.test.get(metric, math.nan) for record in records], dtype=np.float64)

"""Rows compared seed by seed: each by the draw that its validation losses choose, with the same seeds for all.

Differences of the same seed are taken, as first weights and batches are then alike, and what they have in common falls
out. Their intervals are Student's, at 95 %: they hold for seeds like these and for the draws that were chosen.
:func:`reach_with_choice` has the choice among draws in it: it is made anew in each resample of draws and seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from dist_moe.sweeps.records import TrialRecord, draws_of
from dist_moe.sweeps.runner import OBJECTIVE
from dist_moe.sweeps.statistics import LEVEL, RESAMPLES, Floats, chosen_again


@dataclass(frozen=True)
class Difference:
    """A mean of ``count`` paired differences, and its interval from ``low`` to ``high`` at the level LEVEL."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def verdict(self) -> str:
        """Whether the interval is "above" 0, "below" it, or has it "within"; "unknown" if a value is not finite."""
        if not math.isfinite(self.low + self.high):
            return "unknown"
        return "above" if self.low > 0 else "below" if self.high < 0 else "within"


Differences = dict[str, dict[str, Difference]]
"""Differences to one row, by row and metric."""


def chosen_trials(records: Sequence[TrialRecord], seeds: int) -> list[TrialRecord]:
    """Return the trials of the draw with the least mean validation loss, by seed; [] if no draw is complete.

    A draw one of whose seeds diverged, failed or is missing is not chosen; of equals the first is.
    """
    draws = draws_of(records, seeds)
    whole = [trials for trials in draws if all(trial.state == "complete" for trial in trials)]
    return min(whole, key=lambda trials: statistics.fmean(trial.loss for trial in trials), default=[])


def paired_difference(one_N: Floats, other_N: Floats) -> Difference:
    """Return the mean of ``one_N - other_N``, N pairs, and Student's interval. Raises ValueError for fewer than two."""
    if len(one_N) < 2:
        raise ValueError(f"an interval needs two pairs at least, got {len(one_N)}")
    difference_N, count = one_N - other_N, len(one_N)
    mean, error = float(difference_N.mean()), float(difference_N.std(ddof=1)) / math.sqrt(count)
    reach = _student(count) * error
    return Difference(mean, mean - reach, mean + reach, count)


def reach_with_choice(
    rows: Mapping[str, Sequence[TrialRecord]], seeds: int, common: bool, seed: int = 0
) -> dict[str, float]:
    """Return of each row but the first how far an interval of its test loss minus the first row's reaches to each side.

    In each of many resamples as many draws and as many seeds as there are drawn with replacement, the seeds the same
    for all rows, the draws too where they are ``common``, and each row takes the draw with the least mean validation
    loss among them. The deviation of the differences takes the place of the standard error in Student's interval,
    times sqrt(S / (S - 1)), by which S resampled seeds are too much alike: where the choice plays no part, this is the
    reach of :func:`paired_difference`. Empty with fewer than two draws, among which there is no choice. Rows are left
    out that have failed trials, or other draws than the first row, or no finite test loss.
    """
    losses = {name: found for name, records in rows.items() if (found := _by_draw_and_seed(records, seeds))}
    first, *others = rows
    if first not in losses or len(losses[first][0]) < 2:
        return {}
    num_draws = len(losses[first][0])
    picked_RS = np.random.default_rng(seed).integers(seeds, size=(RESAMPLES, seeds))
    share_RS = (picked_RS[:, :, None] == np.arange(seeds)).mean(axis=1)

    def outcome_R(name: str) -> Floats:
        draws = np.random.default_rng([seed, 1 if common else 1 + list(rows).index(name)])
        return chosen_again(*losses[name], draws.integers(num_draws, size=(RESAMPLES, num_draws)), share_RS)

    base_R, quantile = outcome_R(first), _student(seeds) * math.sqrt(seeds / (seeds - 1))
    same = [name for name in others if name in losses and len(losses[name][0]) == num_draws]
    return {name: quantile * float((outcome_R(name) - base_R).std()) for name in same}


def _student(count: int) -> float:
    """By how many standard errors of the mean of ``count`` values their interval reaches to each side."""
    return float(student.ppf((1 + LEVEL) / 2, count - 1))


def _by_draw_and_seed(records: Sequence[TrialRecord], seeds: int) -> tuple[Floats, Floats] | None:
    """(D, S) losses in validation and test; None if a trial failed or is missing, or no test loss is finite."""
    draws = draws_of([record for record in records if record.state != "failed"], seeds)
    if [trial.index for trials in draws for trial in trials] != list(range(len(records))):
        return None
    val_DS = np.array([[trial.loss for trial in trials] for trials in draws])
    test_DS = np.array([[trial.test.get(OBJECTIVE, math.nan) for trial in trials] for trials in draws])
    return (val_DS, test_DS) if np.isfinite(test_DS).any() else None

"""Rows compared seed by seed: each by the draw that its validation losses choose, with the same seeds for all.

Differences of the same seed are taken, as first weights and batches are then alike, and what they have in common falls
out. Their intervals are Student's, at 95 %: they hold for seeds like these, not for another choice among draws.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from dist_moe.sweeps.records import TrialRecord
from dist_moe.sweeps.statistics import Floats, mean_of

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean of ``count`` paired differences, and its interval from ``low`` to ``high`` at the level LEVEL."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def verdict(self) -> str:
        """Whether the interval is "above" 0, "below" it, or has it "within"."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "within"


Differences = dict[str, dict[str, Difference]]
"""Differences to one row, by row and metric."""


def chosen_trials(records: Sequence[TrialRecord], seeds: int) -> list[TrialRecord]:
    """Return the trials of the draw with the least mean validation loss, by seed; [] if no draw is complete.

    A draw one of whose seeds diverged, failed or is missing is not chosen; of equals the first is.
    """
    by_draw: dict[int, list[TrialRecord]] = {}
    for record in sorted(records, key=lambda record: record.index):
        if record.state == "complete":
            by_draw.setdefault(record.index // seeds, []).append(record)
    whole = [trials for trials in by_draw.values() if len(trials) == seeds]
    return min(whole, key=lambda trials: statistics.fmean(trial.loss for trial in trials), default=[])


def paired_difference(one_N: Floats, other_N: Floats) -> Difference:
    """Return the mean of ``one_N - other_N``, N pairs, and Student's interval. Raises ValueError for fewer than two."""
    if len(one_N) < 2:
        raise ValueError(f"an interval needs two pairs at least, got {len(one_N)}")
    difference = mean_of(one_N - other_N)
    reach = float(student.ppf((1 + LEVEL) / 2, difference.count - 1)) * difference.standard_error
    return Difference(difference.mean, difference.mean - reach, difference.mean + reach, difference.count)

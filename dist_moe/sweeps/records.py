"""Trials as the report sees them, read from a study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from dist_moe.config.files import restored

State = Literal["complete", "diverged", "pruned", "failed"]

# A trial whose process died is tried again; one that takes its process with it every time is not.
DEATH_LIMIT = 3


@dataclass(frozen=True)
class TrialRecord:
    """A finished trial. ``index``: its number within the row, on which its draw depends.

    ``loss``: validation loss; inf for all but complete trials. ``error``: why it failed, else "".
    ``environment``: machine and versions that trained it, "" where nothing was trained. ``compute``: processor seconds
    that it took, searches and validations among them, or seconds with a GPU; nan where that was not recorded.
    """

    index: int
    state: State
    params: dict[str, Any]
    loss: float
    val: dict[str, float]
    test: dict[str, float]
    steps: int
    compute: float
    error: str
    environment: str


def draws_of(records: Sequence[TrialRecord], seeds: int) -> list[list[TrialRecord]]:
    """Return the trials of each draw all of whose ``seeds`` are finished, by seed; draws in their order."""
    by_number: dict[int, list[TrialRecord]] = {}
    for record in sorted(records, key=lambda record: record.index):
        by_number.setdefault(record.index // seeds, []).append(record)
    return [trials for trials in by_number.values() if len(trials) == seeds]


def by_draw(records: Sequence[TrialRecord], seeds: int) -> list[TrialRecord]:
    """Return a record for each draw of ``seeds`` finished trials: means of what they came to, sums of what they took.

    A draw is as good as its worst trial: failed if one is, else diverged, pruned or complete.
    """
    return [_draw(trials) for trials in draws_of(records, seeds)]


def _draw(trials: list[TrialRecord]) -> TrialRecord:
    states: list[State] = ["failed", "diverged", "pruned", "complete"]

    def means(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
        shared = [name for name in metrics[0] if all(name in each for each in metrics)]
        return {name: statistics.fmean(each[name] for each in metrics) for name in shared}

    return replace(
        trials[0],
        index=trials[0].index // len(trials),
        state=states[min(states.index(trial.state) for trial in trials)],
        loss=statistics.fmean(trial.loss for trial in trials),
        val=means([trial.val for trial in trials]),
        test=means([trial.test for trial in trials]),
        steps=sum(trial.steps for trial in trials),
        compute=sum(trial.compute for trial in trials),
    )


def index_of(trial: FrozenTrial) -> int:
    """Return the trial's number within its row; Optuna's number differs where trials were tried again."""
    return int(trial.user_attrs["index"])


def latest_attempts(study: optuna.Study) -> dict[int, FrozenTrial]:
    """Return the newest attempt at each index, by index."""
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    newest = {index_of(trial): trial for trial in trials}
    return dict(sorted(newest.items()))


def deaths_of(trial: FrozenTrial) -> int:
    """Return how many earlier attempts at this trial ended with the death of their process."""
    return int(trial.user_attrs.get("deaths", 0))


def is_lost(trial: FrozenTrial) -> bool:
    """Return whether an attempt ended without a result or an error of its own, and may be made again."""
    return trial.state == TrialState.FAIL and "failure" not in trial.user_attrs and deaths_of(trial) + 1 < DEATH_LIMIT


def record_of(trial: FrozenTrial) -> TrialRecord | None:
    """Return the record of a trial, None while it is not finished."""
    if not trial.state.is_finished() or is_lost(trial):
        return None
    result, failure = restored(trial.user_attrs.get("result", {})), trial.user_attrs.get("failure", {})
    state: State
    if trial.state == TrialState.FAIL:
        state = "failed"
    elif trial.state == TrialState.PRUNED:
        state = "pruned"
    else:
        assert trial.value is not None
        state = "complete" if math.isfinite(trial.value) else "diverged"
    death = f"the process that trained it died, {DEATH_LIMIT} times"
    return TrialRecord(
        index=index_of(trial),
        state=state,
        params=trial.params,
        loss=result["val"]["loss"] if state == "complete" else math.inf,
        val=result.get("val", {}),
        test=result.get("test", {}),
        steps=result.get("steps", max(trial.intermediate_values, default=0)),
        compute=result.get("compute", math.nan),
        error=str(failure.get("error", death)) if state == "failed" else "",
        environment=result.get("environment", ""),
    )

"""What the study holds of a trial, in the words of the report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

State = Literal["complete", "diverged", "pruned", "failed"]

# A trial whose process died is tried again; one that takes its process with it every time is not.
MOST_DEATHS = 3


@dataclass(frozen=True)
class TrialRecord:
    """A finished trial. ``index``: its number within the row, on which its draw depends.

    ``loss``: validation loss; inf for all but complete trials. ``error``: why it failed, else "".
    ``environment``: machine and versions that trained it, "" where nothing was trained.
    """

    index: int
    state: State
    params: dict[str, Any]
    loss: float
    val: dict[str, float]
    test: dict[str, float]
    steps: int
    seconds: float
    error: str
    environment: str


def index_of(trial: FrozenTrial) -> int:
    """The trial's number within its row; Optuna's number differs where trials were tried again."""
    return int(trial.user_attrs["index"])


def latest_attempts(trials: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    """The newest attempt at each index, by index."""
    newest = {index_of(trial): trial for trial in sorted(trials, key=lambda trial: trial.number)}
    return dict(sorted(newest.items()))


def deaths_of(trial: FrozenTrial) -> int:
    """Earlier attempts at this trial whose process died."""
    return int(trial.user_attrs.get("deaths", 0))


def is_lost(trial: FrozenTrial) -> bool:
    """Whether an attempt ended without a result or an error of its own, and may be made again."""
    return trial.state == TrialState.FAIL and "failure" not in trial.user_attrs and deaths_of(trial) + 1 < MOST_DEATHS


def record_of(trial: FrozenTrial) -> TrialRecord | None:
    """None while the trial is not finished."""
    if not trial.state.is_finished() or is_lost(trial):
        return None
    result = trial.user_attrs.get("result", {})
    state = _state_of(trial)
    return TrialRecord(
        index=index_of(trial),
        state=state,
        params=trial.params,
        loss=result["val"]["loss"] if state == "complete" else math.inf,
        val=result.get("val", {}),
        test=result.get("test", {}),
        steps=result.get("steps", max(trial.intermediate_values, default=0)),
        seconds=trial.duration.total_seconds() if trial.duration else 0.0,
        error=_error_of(trial) if state == "failed" else "",
        environment=result.get("environment", ""),
    )


def _state_of(trial: FrozenTrial) -> State:
    if trial.state == TrialState.FAIL:
        return "failed"
    if trial.state == TrialState.PRUNED:
        return "pruned"
    assert trial.value is not None
    return "complete" if math.isfinite(trial.value) else "diverged"


def _error_of(trial: FrozenTrial) -> str:
    failure = trial.user_attrs.get("failure", {})
    return str(failure.get("error", f"the process that trained it died, {MOST_DEATHS} times"))

"""The studies of a sweep in one SQLite file, as its workers use them: take trials, tell what came of them.

A row is a study. A trial gets an index when it is taken, and with the random sampler its draw follows from
that; so it does not matter which worker takes which trial. An attempt that ended without a word (its
process was killed) is marked as failed and put in the study's queue again, with the same draw.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DatabaseError

from dist_moe.config.files import finite
from dist_moe.errors import UserError
from dist_moe.recipes.identity import Identity, check_same
from dist_moe.sweeps.directory import SweepDirectory
from dist_moe.sweeps.plan import Row, SweepPlan, check_unchanged, digest
from dist_moe.sweeps.records import (
    DEATH_LIMIT,
    TrialRecord,
    deaths_of,
    index_of,
    is_lost,
    latest_attempts,
    record_of,
)
from dist_moe.sweeps.runner import OBJECTIVE, TrialResult

BEAT_EVERY_S = 15
STALE_AFTER_S = 120
SQLITE_TIMEOUT_S = 60
PRUNERS: dict[str, type[BasePruner]] = {
    "none": NopPruner,
    "median": MedianPruner,
    "halving": SuccessiveHalvingPruner,
}

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class TakenTrial:
    """A trial that this process is to train. ``values``: what its configuration gets, by dotted name."""

    trial: optuna.Trial
    row: Row
    values: dict[str, Any]

    @property
    def index(self) -> int:
        """The trial's number within its row."""
        return int(self.trial.user_attrs["index"])


class Studies:
    """The studies of ``plan`` in ``directory``, made where they are not there yet.

    Raises UserError if they were made for another sweep, and for a file that is none of Optuna's.
    """

    def __init__(self, directory: SweepDirectory, plan: SweepPlan) -> None:
        self._directory = directory
        self._plan = plan
        self._next_look = 0.0
        try:
            self._open_all()
        except (DatabaseError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{directory.database} cannot be used as the studies of a sweep: {reason}") from error

    def _open_all(self) -> None:
        with _without_optunas_remarks():
            self._storage = RDBStorage(
                f"sqlite:///{self._directory.database}",
                engine_kwargs={"connect_args": {"timeout": SQLITE_TIMEOUT_S}},
                heartbeat_interval=BEAT_EVERY_S,
                grace_period=STALE_AFTER_S,
                heartbeat_stale_trial_callback=_try_again_after_death,
            )
        for summary in optuna.get_all_study_summaries(self._storage):
            check_unchanged(self._plan, self._directory.root, summary.user_attrs)
        self._studies = {row.name: self._open(row) for row in self._plan.rows}

    def _open(self, row: Row) -> optuna.Study:
        study = optuna.create_study(
            storage=self._storage,
            study_name=row.name,
            direction="minimize",
            pruner=PRUNERS[self._plan.sweep.pruner](),
            sampler=RandomSampler(),
            load_if_exists=True,
        )
        if "digest" not in study.user_attrs:
            settings = self._plan.settings()
            study.set_user_attr("settings", settings)
            study.set_user_attr("digest", digest(settings))
        return study

    def begin(self, retry_failed: bool) -> None:
        """Queue the trials that were lost before, and failed ones where wanted. Within ``directory.taking()``."""
        for study in self._studies.values():
            study.set_user_attr("trials", self._plan.sweep.trials)
            for trial in latest_attempts(study).values():
                if is_lost(trial):
                    _enqueue_again(study, trial, deaths_of(trial))
                elif retry_failed and trial.state == TrialState.FAIL:
                    _enqueue_again(study, trial, deaths=0)

    def check_data(self, digests: Mapping[str, Mapping[str, str]], *, allowed: bool = False) -> None:
        """Keep the ``digests`` of the data that trials learn from, by the content of their section.

        Raises UserError if trials before had others, unless ``allowed``: they would be reported as one sample. What is
        let pass is kept as well. Within ``directory.taking()``.
        """
        for name, study in self._studies.items():
            known = study.user_attrs.get("data", {})
            changed: dict[str, None] = {}
            for section in known.keys() & digests.keys():
                before, now = (Identity(data=found[section]) for found in (known, digests))
                changed |= dict.fromkeys(check_same(self._directory.root, before, now, allowed=allowed))
            if changed:
                change = {"changed": list(changed), "trials": len(self.records(name))}
                study.set_user_attr("data_changes", [*self.data_changes(name), change])
            study.set_user_attr("data", known | digests)

    def data_changes(self, row: str) -> list[dict[str, Any]]:
        """Return what was let pass of a row: names of what ``changed``, and how many ``trials`` had ended."""
        changes: list[dict[str, Any]] = self._studies[row].user_attrs.get("data_changes", [])
        return changes

    def take(self, owner: str, count: int) -> list[TakenTrial]:
        """Return the next trials, at most ``count``, of the row that has begun fewest; [] when none waits."""
        # SQLite lets two processes pop the same trial from Optuna's queue, hence the lock.
        with self._directory.taking(), _without_optunas_remarks():
            self._release_stale_trials()
            row = min(self._plan.rows, key=lambda row: self._begun(row.name))
            left = self._plan.sweep.trials - self._begun(row.name)
            return [self._ask(row, owner) for _ in range(min(count, left))]

    def _release_stale_trials(self) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + BEAT_EVERY_S
        for study in self._studies.values():
            fail_stale_trials(study)
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if "owner" not in trial.user_attrs:  # its taker died between ask and the first heartbeat
                    _give_up(study, trial, died=True)

    def left(self) -> int:
        """Return how many trials of all rows nobody has begun, or are to be begun again."""
        return sum(self._plan.sweep.trials - self._begun(row.name) for row in self._plan.rows)

    def _begun(self, row: str) -> int:
        attempts = latest_attempts(self._studies[row]).values()
        return sum(trial.state != TrialState.WAITING for trial in attempts)

    def _ask(self, row: Row, owner: str) -> TakenTrial:
        study = self._studies[row.name]
        if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            attempts = latest_attempts(study)
            index = next(index for index in itertools.count() if index not in attempts)
            draw = row.draw(self._plan.sweep.seed, index) if self._plan.sweep.sampler == "random" else {}
            study.enqueue_trial(draw, user_attrs={"index": index})
        study.sampler = self._sampler(row, study)
        trial = study.ask({name: drawn.optuna() for name, drawn in sorted(row.space.items())})
        self.beat(trial)
        trial.set_user_attr("owner", owner)
        return TakenTrial(trial, row, row.values(trial.params, trial.user_attrs["index"]))

    def _sampler(self, row: Row, study: optuna.Study) -> BaseSampler:
        """Return the next trial's sampler. TPE is seeded anew each time, so that one worker alone repeats itself."""
        if self._plan.sweep.sampler == "random":
            return RandomSampler()  # draws nothing: all parameters are fixed in the queue
        states = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        begun = len(study.get_trials(deepcopy=False, states=states))
        key = f"{self._plan.sweep.seed}/{row.name}/{begun}"
        return TPESampler(seed=int(hashlib.sha256(key.encode()).hexdigest()[:8], 16), constant_liar=True)

    def beat(self, trial: optuna.Trial) -> None:
        """Record that the process which trains ``trial`` lives."""
        self._storage.record_heartbeat(trial._trial_id)

    def tell_result(self, taken: TakenTrial, result: TrialResult, environment: str, compute: float) -> bool:
        """Store a result, a loss that is not finite as inf; returns False if another process has the trial by now.

        ``compute``: what it took, see :class:`~dist_moe.sweeps.records.TrialRecord`.
        """
        loss = float(result.val[OBJECTIVE])
        content = {**asdict(result), "environment": environment, "compute": compute}
        return self._tell(taken, "result", content, TrialState.COMPLETE, loss if math.isfinite(loss) else math.inf)

    def tell_pruned(self, taken: TakenTrial, environment: str, compute: float) -> bool:
        """Store that the study's own pruner stopped a trial; see :meth:`tell_result`."""
        return self._tell(taken, "result", {"environment": environment, "compute": compute}, TrialState.PRUNED)

    def tell_failure(self, taken: TakenTrial, error: str, traceback: str) -> bool:
        """Store that an exception ended a trial; see :meth:`tell_result`."""
        return self._tell(taken, "failure", {"error": error, "traceback": traceback}, TrialState.FAIL)

    def _tell(
        self, taken: TakenTrial, name: str, content: dict[str, Any], state: TrialState, value: float | None = None
    ) -> bool:
        try:
            taken.trial.set_user_attr(name, finite(content))
        except UpdateFinishedTrialError:
            return False
        study = self._studies[taken.row.name]
        return study.tell(taken.trial, value, state=state, skip_if_finished=True).state == state

    def release(self, owner: str | None, died: bool) -> int:
        """Put the running trials of ``owner`` (None: all) in the queue again; returns how many there were.

        Within ``directory.taking()``, and when the owner is no more. ``died``: whether by itself.
        """
        released = 0
        for study in self._studies.values():
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if owner is None or trial.user_attrs.get("owner") == owner:
                    _give_up(study, trial, died)
                    released += 1
        return released

    def running(self) -> int:
        """Return how many trials of all rows are being trained."""
        states = (TrialState.RUNNING,)
        return sum(len(study.get_trials(deepcopy=False, states=states)) for study in self._studies.values())

    def records(self, row: str) -> list[TrialRecord]:
        """Return the finished trials of a row, by index."""
        attempts = latest_attempts(self._studies[row]).values()
        return [record for trial in attempts if (record := record_of(trial)) is not None]


def _give_up(study: optuna.Study, trial: FrozenTrial, died: bool) -> None:
    if study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True).state != TrialState.FAIL:
        return
    if died:
        _try_again_after_death(study, trial)
    else:
        _enqueue_again(study, trial, deaths_of(trial))


def _try_again_after_death(study: optuna.Study, trial: FrozenTrial) -> None:
    deaths = deaths_of(trial) + 1
    if deaths < DEATH_LIMIT:
        _enqueue_again(study, trial, deaths)


def _enqueue_again(study: optuna.Study, trial: FrozenTrial, deaths: int) -> None:
    """Queue a trial with its parameters, whether they came from the queue or from a sampler."""
    params = trial.system_attrs.get("fixed_params", {}) | trial.params
    study.enqueue_trial(params, user_attrs={"index": index_of(trial), "deaths": deaths})


@contextmanager
def _without_optunas_remarks() -> Iterator[None]:
    """Silence warnings that heartbeats are experimental, and meant for Study.optimize; here ``beating`` sends them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
        yield

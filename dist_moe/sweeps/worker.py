"""A worker: takes trials, has them trained, tells the study, until none waits."""

from __future__ import annotations

import math
import os
import platform
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from dist_moe.errors import UserError
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.screen import say
from dist_moe.sweeps.runner import OBJECTIVE, TrialResult, TrialRunner
from dist_moe.sweeps.study import BEAT_EVERY_S, Studies, TakenTrial

_PACKAGES = ("torch", "deepspeed", "optuna", "numpy", "comet-dist-moe")


@dataclass(frozen=True)
class Failure:
    """An exception in a trial."""

    error: str
    traceback: str


Outcome = TrialResult | Failure | None


@dataclass(frozen=True)
class Finished:
    """One trial has ended. ``done``, ``failed``, ``best``: of the whole row, this trial included.

    ``what``: 'val loss 0.4123', 'pruned' or 'failed: why'.
    """

    row: str
    index: int
    what: str
    error: str
    done: int
    failed: int
    best: float


class Worker:
    """``owner``: a name that no other worker has had. ``announce`` hears of every trial that has ended.

    ``training`` is entered while a trial is trained: what may interrupt it does so only there.
    """

    def __init__(
        self,
        studies: Studies,
        run: TrialRunner,
        base: Path,
        owner: str,
        announce: Callable[[Finished], None],
        training: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._studies = studies
        self._run = run
        self._base = base
        self._owner = owner
        self._announce = announce
        self._training = training
        self._environment = describe_environment()

    def work(self, together: int, is_to_stop: Callable[[], bool]) -> None:
        """Train trials, ``together`` at once, until none waits or ``is_to_stop``."""
        while not is_to_stop():
            taken = self._studies.take(self._owner, together)
            if not taken:
                return
            with beating(self._studies, taken):
                self._train(taken)

    def _train(self, taken: list[TakenTrial]) -> None:
        trials, configs = [], []
        for trial in taken:
            try:
                config = trial.row.config(self._base, trial.values)
            except UserError as error:
                self._tell(trial, _failure(error))
            else:
                trials.append(trial)
                configs.append(config)
        if trials:
            self._train_together(trials, configs)

    def _train_together(self, trials: list[TakenTrial], configs: list[SupervisedConfig]) -> None:
        """Train trials at once; if several fail together, each alone, so that the error is that of one trial."""
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        started = clock()
        outcomes = self._attempt(trials, configs)
        compute = (clock() - started) / len(trials)
        if isinstance(outcomes, Failure) and len(trials) > 1:
            for trial, config in zip(trials, configs, strict=True):
                self._train_together([trial], [config])
            return
        for trial, outcome in zip(trials, [outcomes] if isinstance(outcomes, Failure) else outcomes, strict=True):
            self._tell(trial, outcome, compute)

    def _attempt(self, trials: list[TakenTrial], configs: list[SupervisedConfig]) -> list[TrialResult | None] | Failure:
        reporter = Reporter(trials)
        try:
            with self._training():
                results = self._run(configs, reporter)
            reporter.check(results)
        except Exception as error:  # whatever a trial may raise, it ends this trial only
            return _failure(error)
        return results

    def _tell(self, trial: TakenTrial, outcome: Outcome, compute: float = math.nan) -> None:
        if isinstance(outcome, Failure):
            told = self._studies.tell_failure(trial, outcome.error, outcome.traceback)
            what = f"failed: {outcome.error}"
        elif outcome is None:
            told, what = self._studies.tell_pruned(trial, self._environment, compute), "pruned"
        else:
            told = self._studies.tell_result(trial, outcome, self._environment, compute)
            what = f"val loss {outcome.val[OBJECTIVE]:.4f}"
        if told:
            records = self._studies.records(trial.row.name)
            failed = sum(record.state == "failed" for record in records)
            best = min((record.loss for record in records), default=math.inf)
            error = outcome.error if isinstance(outcome, Failure) else ""
            self._announce(Finished(trial.row.name, trial.index, what, error, len(records), failed, best))


class Reporter:
    """Tells a study of validations: called by a runner after each, with True as the answer where a trial is to stop."""

    def __init__(self, trials: list[TakenTrial]) -> None:
        self._trials = [taken.trial for taken in trials]
        self._stopped: set[int] = set()

    def __call__(self, i: int, step: int, val_loss: float) -> bool:
        trial = self._trials[i]
        with warnings.catch_warnings():
            # A trial that is trained alone, after its stack failed, passes the same steps again.
            warnings.filterwarnings("ignore", message="The reported value is ignored")
            trial.report(val_loss, step)
        if trial.should_prune():
            self._stopped.add(i)
        return i in self._stopped

    def check(self, results: list[TrialResult | None]) -> None:
        """Raise if the runner broke its promise."""
        if len(results) != len(self._trials):
            raise RuntimeError(f"the runner gave {len(results)} results for {len(self._trials)} trials")
        for i, result in enumerate(results):
            if result is None and i not in self._stopped:
                raise RuntimeError("the runner gave no result for a trial that was not to stop")
            if result is not None and OBJECTIVE not in result.val:
                raise RuntimeError(f"the runner's validation metrics have no {OBJECTIVE!r}: {sorted(result.val)}")


@contextmanager
def beating(studies: Studies, taken: list[TakenTrial]) -> Iterator[None]:
    """Have a thread tell the studies, while inside, that this process lives."""
    end = threading.Event()

    def beat() -> None:
        while not end.wait(BEAT_EVERY_S):
            for trial in taken:
                try:
                    studies.beat(trial.trial)
                except (StorageInternalError, OperationalError) as error:  # a busy disk: the next beat may do
                    say(f"dist-moe: no sign of life in the study: {error}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _failure(error: Exception) -> Failure:
    text = str(error)
    return Failure(text if isinstance(error, UserError) else f"{type(error).__name__}: {text}", traceback.format_exc())


def describe_environment() -> str:
    """Return what a trial is trained on, without names of hosts or paths.

    'AMD EPYC, 2 cores, no GPU; Python 3.11.2, torch 2.13.0, ...'.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(models, "") or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"{processor}, {os.cpu_count()} cores, {gpu}; Python {platform.python_version()}, {packages}"

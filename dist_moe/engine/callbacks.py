"""Callbacks: what happens beside training. Searches, placement, validation, early stopping, the user's own.

A callback is called on every rank at the same points of a fit, so that it may hold collectives. What it must remember
over a restart it gives by ``state_dict``; that goes into every checkpoint and comes back by ``load_state_dict``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import SerializeAsAny

from dist_moe.config.registry import Registry
from dist_moe.config.settings import Settings
from dist_moe.engine.checkpoint.files import best_of, checkpoints_of
from dist_moe.engine.checkpoint.format import TRAINER_FILE, CallbackStates
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.monitor.run_directory import OpenDirectory, RunDirectory
from dist_moe.errors import UserError
from dist_moe.parallel import gather_objects
from dist_moe.recording import record

if TYPE_CHECKING:
    from dist_moe.engine.training import Trainer


_MOVED = "run_directory_moved"


class Callback(ABC):  # noqa: B024 (all hooks are optional)
    """The base of all callbacks; override the hooks that are needed.

    Steps are counted from 1 once they are done: ``before_step(s)`` comes before the step that ``after_step(s + 1)``
    follows. ``name``: under which its state stands in checkpoints; two callbacks of a fit need different ones.
    """

    @property
    def name(self) -> str:
        """The class's name, unless a callback says another."""
        return type(self).__name__

    def on_start(self, trainer: Trainer) -> None:  # noqa: B027
        """Training is about to begin or go on; state is loaded already."""

    def before_step(self, trainer: Trainer, step: int) -> None:  # noqa: B027
        """A training step is about to begin, ``step`` of them are done."""

    def after_step(self, trainer: Trainer, step: int) -> None:  # noqa: B027
        """Training step ``step`` is done."""

    def on_records(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:  # noqa: B027
        """The numbers of all ranks for the steps since the last call are there, the same on every rank."""

    def on_validation(self, trainer: Trainer, step: int, metrics: Mapping[str, Any]) -> None:  # noqa: B027
        """The model was validated after ``step`` steps; ``metrics["loss"]`` counts for early stopping."""

    def on_end(self, trainer: Trainer) -> None:  # noqa: B027
        """Training is over, not interrupted; the engine still stands, with the weights that were chosen."""

    def state_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, taken on rank 0 and given back to every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take back what :meth:`state_dict` gave when the checkpoint was written."""


class Validation(Callback):
    """Validates every ``every`` steps (None: at the end of each epoch) by ``evaluate(trainer, step)``: metrics by name.

    ``at_end``: after the last step, too. ``evaluate`` is collective and must give the same on every rank.
    ``headlines``: see :meth:`Monitor.evaluation`.
    """

    def __init__(
        self,
        evaluate: Callable[[Trainer, int], dict[str, Any]],
        every: int | None,
        *,
        at_end: bool,
        headlines: Collection[str] | None = None,
    ) -> None:
        self._evaluate = evaluate
        self._headlines = headlines
        self._every = every
        self._at_end = at_end

    def on_start(self, trainer: Trainer) -> None:
        """Validate where a longer run would have: the one before ended here."""
        step = trainer.step
        known = step in trainer.history.validation_losses
        if 0 < step < trainer.total_steps and self._is_due(trainer, step) and not known:
            self._validate(trainer, step)

    def after_step(self, trainer: Trainer, step: int) -> None:
        """Validate if that is due."""
        last = step == trainer.total_steps
        if self._at_end if last else self._is_due(trainer, step):
            self._validate(trainer, step)

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        return step % (self._every or trainer.steps_per_epoch) == 0

    def _validate(self, trainer: Trainer, step: int) -> None:
        ACTIVITY.enter("evaluation")
        trainer.validated(step, self._evaluate(trainer, step), self._headlines)


class EarlyStopping(Callback):
    """Ends the training after ``patience`` validations in a row without a better loss, and keeps the best weights.

    Validations before a restart count too. A NaN is never better.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._best = math.inf
        self._since_best = 0

    def on_start(self, trainer: Trainer) -> None:
        """Count the validations before a restart."""
        for _, loss in sorted(trainer.history.validation_losses.items()):
            self.is_better(loss)
        self._end_if_exhausted(trainer)

    def on_validation(self, trainer: Trainer, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep the weights if they are the best so far, and end if patience is exhausted."""
        if self.is_better(float(metrics["loss"])) and trainer.run is not None:
            trainer.save(best_of(checkpoints_of(trainer.run.root)), keep=1)
        self._end_if_exhausted(trainer)

    def is_better(self, loss: float) -> bool:
        """Take the next validation's loss; return whether it is the best so far."""
        better = loss < self._best
        self._best, self._since_best = (loss, 0) if better else (self._best, self._since_best + 1)
        return better

    @property
    def exhausted(self) -> bool:
        """Whether ``patience`` validations in a row brought nothing better."""
        return self._since_best >= self._patience

    def _end_if_exhausted(self, trainer: Trainer) -> None:
        if self.exhausted:
            trainer.end()


class PeriodicCheckpoints(Callback):
    """Asks for a checkpoint every ``every`` steps; one at the end is written anyway."""

    def __init__(self, every: int) -> None:
        self._every = every

    def after_step(self, trainer: Trainer, step: int) -> None:
        """Ask for a checkpoint if that is due."""
        if step % self._every == 0:
            trainer.ask_for_checkpoint()


class RunDirectoryWatch(Callback):
    """Notices when the run directory is renamed or removed, and ends the training with a checkpoint where it is now.

    Rank 0 looks when the numbers of the steps are shown, with which the others learn of it, so that all act alike.
    """

    def __init__(self) -> None:
        self._directory: OpenDirectory | None = None
        self._sentence = ""

    def on_start(self, trainer: Trainer) -> None:
        """Hold the directory open."""
        if trainer.run is not None and trainer.groups.environment.is_rank_zero:
            self._directory = OpenDirectory(trainer.run.root)

    def after_step(self, trainer: Trainer, step: int) -> None:
        """Ask the training to stop if the directory is not where it was."""
        shows = step % trainer.settings.log_every == 0
        if shows and self._directory is not None and not self._directory.is_there:
            record(_MOVED, 1.0, reduce="max")

    def on_records(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Follow the directory, before anything is written for these steps."""
        moved = [one.pop(_MOVED, None) for one in records]
        if trainer.run is None or not any(moved):
            return
        found = self._directory.find() if self._directory else None
        before, place = trainer.run.root, gather_objects(str(found) if found else None)[0]
        if place is None:
            trainer.monitor.follow(None)
            raise UserError(f"the run directory {before} was removed while it was trained: the training ends with it")
        now = Path(place)
        if self._directory is not None:
            self._directory.path = now
        trainer.run = RunDirectory(now)
        trainer.monitor.follow(trainer.run)
        self._sentence = (
            f"the run directory {before} is {now} since it was renamed while it was trained: the training has ended "
            f"with a checkpoint there; go on with 'dist-moe train --resume' and the run's new name"
        )

    @property
    def has_moved(self) -> bool:
        """Whether the directory is elsewhere by now, for which the training stops; alike on all ranks."""
        return bool(self._sentence)

    def check_place(self) -> None:
        """Raise FileNotFoundError, on rank 0, if the directory's path leads elsewhere: to nothing, or another run."""
        if self._directory is not None and not self._directory.is_there:
            raise FileNotFoundError(f"{self._directory.path} is not the directory in which this run began")

    def check(self) -> None:
        """Raise UserError if the directory was not where it had been."""
        if self._sentence:
            raise UserError(self._sentence)


class CallbackSettings(Settings, ABC):
    """An entry of the section ``callbacks``: a callback of the user's own, and its fields."""

    name: str

    @abstractmethod
    def build(self) -> Callback:
        """Return the callback for one fit."""


CALLBACKS = Registry("callback", CallbackSettings)

CallbackConfig = Annotated[SerializeAsAny[CallbackSettings], CALLBACKS]
"""The type of a configuration field that holds any registered callback."""


def give_back_states(callbacks: Sequence[Callback], states: CallbackStates, checkpoint: Path) -> None:
    """Give callbacks what they held when ``checkpoint`` was written. Raises UserError if one cannot take it back."""
    for callback in callbacks:
        if callback.name not in states:
            continue
        try:
            callback.load_state_dict(states[callback.name])
        except Exception as error:  # whatever a callback of the user's may raise for what it did not write
            where = f"checkpoint {checkpoint}: callbacks.{callback.name} in {TRAINER_FILE}"
            raise UserError(f"{where} is not what it can take back: {type(error).__name__}: {error}") from error

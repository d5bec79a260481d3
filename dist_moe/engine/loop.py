"""The training loop: steps, metrics, checkpoints, and stopping where asked. Knows no model, no data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.config.settings import Settings
from dist_moe.engine.checkpoint.files import best_of, complete_directories, drop_after
from dist_moe.engine.checkpoint.format import TrainingHistory
from dist_moe.engine.checkpoint.saver import CheckpointSaver
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.early_stopping import EarlyStopping
from dist_moe.engine.health.activity import ACTIVITY
from dist_moe.engine.health.nonfinite import SkippedSteps, diverged
from dist_moe.engine.launch.stop_request import StopRequest
from dist_moe.engine.monitor.phase_seconds import SUMS, is_timed, name_times
from dist_moe.engine.monitor.step_window import StepWindow, Sums, add_sums
from dist_moe.errors import DivergedError

StepRecord = dict[str, Any]


class TrainConfig(Settings):
    """How long, how much at once, and how often to write."""

    epochs: float = Field(1.0, gt=0, description="passes over the training examples")
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many steps, whatever epochs says (null: epochs decides)"
    )
    batch_size: int = Field(
        512, ge=1, description="global batch: examples per step over all ranks and accumulation steps"
    )
    log_every: int = Field(
        10, ge=1, description="steps between two collections of the ranks' metrics; every step is recorded"
    )
    time_every: int = Field(
        10,
        ge=0,
        description="steps between two whose gate, dispatch, experts and combine are timed (0: none is)",
    )
    checkpoint_every: int = Field(1000, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")
    async_checkpoints: bool = Field(
        True,
        description="write checkpoints beside the training, from a copy in host memory (false: the training waits)",
    )
    checkpoint_failures_allowed: int = Field(
        2,
        ge=0,
        description="checkpoints in a row that may fail to be written (disk full, read-only) before the run ends; "
        "a run whose last checkpoint fails always ends with that message",
    )
    validate_every: int | None = Field(
        None, ge=1, description="steps between two validations (null: at the end of each epoch)"
    )

    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this many validations without a better loss, and test the best weights "
        "(null: train to the end and test the last weights); a resumed run counts the validations before it too",
    )

    max_skipped_steps: int = Field(
        10,
        ge=1,
        description="training ends with an error after this many steps in a row whose loss or gradient is not finite; "
        "each of them is skipped on all ranks and recorded as skipped=1",
    )

    def total_steps(self, steps_per_epoch: int) -> int:
        steps = max(1, round(self.epochs * steps_per_epoch))
        return min(steps, self.max_steps) if self.max_steps else steps


class Feed(Protocol):
    """The data of every step, by step number, so that a resumed run sees what it would have seen."""

    def micro_batches(self, step: int) -> list[Any]:
        """This rank's micro-batches of ``step`` (from 0), one per gradient-accumulation step."""


@dataclass(frozen=True)
class StepLoss:
    """``loss``: its mean over ranks and micro-batches is what the step minimises.
    ``sums``: numbers to record, which add up over micro-batches and ranks."""

    loss: Tensor
    sums: Sums


@dataclass(frozen=True)
class LoopHooks:
    """What the loop calls, on every rank. ``before_step``: with the number of steps done, before each
    training step; ``after_step``: the same after it. ``report``: with the finished steps' records.
    ``validate``: after that many steps; the loss that counts for patience, the same on every rank.
    ``say``: with a sentence for the user, on the first rank only."""

    loss: Callable[[nn.Module, Any], StepLoss]
    before_step: Callable[[int], None]
    after_step: Callable[[int], None]
    report: Callable[[list[StepRecord]], None]
    validate: Callable[[int], float]
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class Outcome:
    """``steps``: done in all. ``interrupted``: whether a signal ended the loop. ``best``: the checkpoint
    of the best validation loss, where patience asks for one. ``seconds``: spent training, in all."""

    steps: int
    interrupted: bool
    best: Path | None
    seconds: float = 0.0


class TrainingLoop:
    """Runs steps ``first_step`` .. ``total_steps`` - 1 of ``feed`` through ``engine``."""

    def __init__(
        self,
        engine: ExpertParallelEngine,
        feed: Feed,
        hooks: LoopHooks,
        config: TrainConfig,
        *,
        steps_per_epoch: int,
        checkpoints: Path,
        seed: int,
        course: TrainingHistory | None = None,
    ) -> None:
        self._engine = engine
        self._feed = feed
        self._hooks = hooks
        self._config = config
        self._total_steps = config.total_steps(steps_per_epoch)
        self._validate_every = config.validate_every or steps_per_epoch
        self._checkpoints = checkpoints
        self._seed = seed
        course = course or TrainingHistory()
        self._progress = EarlyStopping(config.patience, course.validation_losses)
        self._skipped = SkippedSteps(config.max_skipped_steps)
        self._seconds_before = course.seconds
        self._started = time.monotonic()
        self._saver = CheckpointSaver(
            engine,
            in_background=config.async_checkpoints,
            failures_allowed=config.checkpoint_failures_allowed,
            say=hooks.say,
        )
        self._window = StepWindow()
        self._host_records: list[StepRecord] = []

    def run(self, first_step: int, stop: StopRequest) -> Outcome:
        """Train until the last step, until patience ends, or until a rank was asked to stop.

        A checkpoint is written every ``checkpoint_every`` steps and at the end, however it comes. Raises
        UserError where too many of them cannot be written.
        """
        if self._engine.process_groups.environment.is_first:
            # What a resumed run does again, or could not be read; and what another patience once kept.
            drop_after(self._checkpoints, first_step)
            drop_after(best_of(self._checkpoints), first_step if self._config.patience is not None else -1)
        self._started = time.monotonic()
        try:
            step, stopping = self._steps(first_step, stop)
            self._saver.finish()
        finally:
            self._saver.close()
        best = complete_directories(best_of(self._checkpoints))
        return Outcome(step, stopping, best[-1] if best else None, self._course.seconds)

    def _steps(self, step: int, stop: StopRequest) -> tuple[int, bool]:
        """The number of steps done, and whether a rank was asked to stop."""
        if 0 < step < self._total_steps and step % self._validate_every == 0 and step not in self._progress.losses:
            self._validate(step)  # the run once ended here, where a longer one validates
        ending, stopping = self._progress.exhausted, False
        while step < self._total_steps and not (ending or stopping):
            self._train_step(step, stop)
            step += 1
            last = step == self._total_steps
            validating = step % self._validate_every == 0 or (last and self._config.patience is not None)
            if validating and (not last or self._config.patience is not None):
                self._validate(step)
            ending = last or self._progress.exhausted
            saving = ending or step % self._config.checkpoint_every == 0
            stopping = (saving or step % self._config.log_every == 0) and self._collect() and not ending
            if saving or stopping:
                ACTIVITY.enter("checkpoint")
                self._saver.save(self._checkpoints, step, self._config.keep_checkpoints, self._course)
        return step, stopping

    @property
    def _course(self) -> TrainingHistory:
        seconds = self._seconds_before + time.monotonic() - self._started
        return TrainingHistory(dict(self._progress.losses), seconds)

    def _validate(self, step: int) -> None:
        ACTIVITY.enter("evaluation")
        if self._progress.add(step, self._hooks.validate(step)):
            ACTIVITY.enter("checkpoint")
            self._saver.save(best_of(self._checkpoints), step, 1, TrainingHistory())

    def _train_step(self, step: int, stop: StopRequest) -> None:
        started = time.perf_counter()
        ACTIVITY.enter("data", step + 1)
        engine = self._engine
        engine.train()
        seed_step(self._seed, step, engine.process_groups.environment.rank)
        self._hooks.before_step(step)
        traffic = engine.process_groups.world.traffic
        traffic.reset()
        clock = engine.process_groups.world.clock
        if is_timed(step + 1, self._config.time_every):
            clock.start(engine.device)
        sums, lr = [], engine.get_lr()[0]
        for batch in self._feed.micro_batches(step):
            ACTIVITY.enter("forward")
            result = self._hooks.loss(engine, batch)
            ACTIVITY.enter("backward")
            engine.backward(result.loss)
            ACTIVITY.enter("optimizer")
            engine.step()
            sums.append(result.sums)
        counts: Sums = traffic.counts() | {"stop": stop.signal_number, "writing": int(self._saver.writing)}
        counts |= {SUMS: clock.stop()}
        self._window.add(add_sums(sums) | counts)
        self._host_records.append(
            {
                "step": step + 1,
                "lr": lr,
                "grad_norm": engine.grad_norm,
                "skipped": float(engine.step_was_skipped),
                "seconds": time.perf_counter() - started,
            }
        )
        self._hooks.after_step(step + 1)
        if self._skipped.add(engine.step_was_skipped):
            self._collect()
            raise self._diverged(step)

    def _diverged(self, step: int) -> DivergedError:
        engine, rank = self._engine, self._engine.process_groups.environment.rank

        def compute(batch: Any) -> tuple[Tensor, Sums]:
            result = self._hooks.loss(engine, batch)
            return result.loss, result.sums

        seed_step(self._seed, step, rank)
        micro_batches = [partial(compute, batch) for batch in self._feed.micro_batches(step)]
        return diverged(engine.module, micro_batches, rank, step + 1, self._config.max_skipped_steps)

    def _collect(self) -> bool:
        """Report the steps since the last collection; whether any rank was asked to stop."""
        ACTIVITY.enter("collection of metrics")
        reduced = self._window.reduce()
        stops = [numbers.pop("stop") for numbers in reduced]
        writers = [numbers.pop("writing") for numbers in reduced]
        records = [host | numbers for host, numbers in zip(self._host_records, reduced, strict=True)]
        name_times(records, self._engine.process_groups.environment.world_size, self._config.time_every)
        self._host_records = []
        if records:
            self._hooks.report(records)
        if writers and not writers[-1]:
            self._saver.settle()  # at the same step on all ranks, and nobody waits
        return any(stops)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key every random number of a step by (seed, step, rank): a resumed run needs no saved state."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)

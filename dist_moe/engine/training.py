"""Training one model on one feed with one objective: ``fit``. Knows no recipe, no configuration file, no data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_moe.engine.callbacks import Callback, EarlyStopping, PeriodicCheckpoints, RunDirectoryWatch, give_back_states
from dist_moe.engine.checkpoint.files import best_of, checkpoints_of, complete_directories, drop_after
from dist_moe.engine.checkpoint.format import TrainingHistory
from dist_moe.engine.checkpoint.loading import check_optimizer_of_checkpoint, load_checkpoint, load_weights
from dist_moe.engine.checkpoint.saver import CheckpointSaver
from dist_moe.engine.deepspeed.checks import check_deepspeed_section
from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.deepspeed.schedules import check_length_of_schedule
from dist_moe.engine.deepspeed.sharded_parameters import restore_parameters
from dist_moe.engine.health.alarm import RouterAlarm
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.health.nonfinite import diverged
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.engine.launch.signals import StopRequest
from dist_moe.engine.monitor.load import describe_load
from dist_moe.engine.monitor.monitor import DEFAULT_TRACKERS, Monitor
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.speed import describe_speed, peak_flops_of, record_memory
from dist_moe.engine.monitor.step_window import SUMS, StepWindow, Sums, add_sums, is_timed, name_times
from dist_moe.engine.monitor.tables import RouterPictures
from dist_moe.engine.monitor.trackers import TrackerSettings, check_trackers
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.trainable import Trained, hold_still
from dist_moe.errors import DivergedError
from dist_moe.recording import Recorder, recording
from dist_moe.search import PermutationSearch, SlotTable, relax_together
from dist_moe.search.layers import moe_layers, slot_tables

DEFAULT_DEEPSPEED: Mapping[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "eps": 1e-7, "weight_decay": 0.0}},
    "zero_optimization": {"stage": 1},
}


class Feed(Protocol):
    """The data of every step, by step number, so that a resumed run sees what it would have seen."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in a pass over the data."""

    def micro_batches(self, step: int) -> list[Any]:
        """Return this rank's micro-batches of ``step`` (from 0), one per gradient-accumulation step."""


@dataclass(frozen=True)
class StepLoss:
    """The loss of a micro-batch, and numbers to record.

    ``loss``: 0-dim; its mean over ranks and micro-batches is what the step minimises. ``sums``: numbers to record,
    which add up over micro-batches and ranks; the same names in every step. Without any the loss is recorded.
    """

    loss: Tensor
    sums: Sums = field(default_factory=dict)


Objective = Callable[[nn.Module, Any], StepLoss]
"""(model, micro-batch) -> loss. One that is a :class:`Callback` as well is called as one, before all others."""


@dataclass(frozen=True)
class FitResult:
    """``model``: as it was trained, parameters whole and fp32. ``history``: validation losses by step, and seconds.
    ``first_step``, ``steps``: done before, and in all. ``best``: the checkpoint of the best validation loss, where
    patience asked for one; its weights are the model's. ``interrupted``: whether a signal ended the fit, which can
    be resumed then. ``lost_records``: records that could not be written, by tracker."""

    model: nn.Module
    history: TrainingHistory
    first_step: int
    steps: int
    best: Path | None
    interrupted: bool
    lost_records: dict[str, int]


def fit(
    model: nn.Module,
    feed: Feed,
    objective: Objective,
    settings: TrainConfig,
    *,
    deepspeed: Mapping[str, Any] = DEFAULT_DEEPSPEED,
    seed: int = 0,
    trained: Trained | None = None,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[TrackerSettings] = DEFAULT_TRACKERS,
    run: RunDirectory | None = None,
    resume_from: Path | None = None,
    groups: ProcessGroups | None = None,
    stop: StopRequest | None = None,
    keep_model: bool = True,
) -> FitResult:
    """Train ``model`` in place until the last step, until patience ends, or until a rank is asked to stop.

    May be called several times in one process and one set of groups. Collective over all ranks.

    Args:
        model: any module; the MoE layers in it are told where training is. Dense parameters alike on all ranks.
        feed: the data, step by step.
        objective: what the model is trained for.
        settings: length, batch size and rhythm. ``settings.patience`` needs a :class:`Validation` among ``callbacks``
            and a ``run``.
        deepspeed: DeepSpeed's own configuration: optimizer, ZeRO stage, precision, accumulation.
        seed: of the random numbers of every step, such as dropout's.
        trained: names or patterns of the parameters that train, see :func:`~dist_moe.engine.trainable.hold_still`; the
            rest of the model, buffers too, is bit-equal afterwards. None: all train.
        callbacks: what else happens; called in this order, after the objective and before monitoring.
        trackers: what takes down the numbers, into the directory of ``run``.
        run: where checkpoints and records go; None: nothing is written.
        resume_from: a verified checkpoint to go on from; what ``run`` holds of later steps is dropped.
        groups: open process groups; None: those of this process's launch, or of one process, opened for the call.
        stop: asks the training to end at the next safe place, with a checkpoint.
        keep_model: give the model back whole; False spares memory where nobody needs it after ``on_end``.

    Raises UserError for a ``deepspeed`` or a tracker that is refused, before anything is opened, and where too many
    checkpoints cannot be written; DivergedError where too many steps in a row have no finite loss or gradient.
    """
    environment = groups.environment if groups else LaunchEnvironment.read()
    check_deepspeed_section(dict(deepspeed), settings.batch_size, environment.world_size)
    check_length_of_schedule(dict(deepspeed), settings.total_steps(feed.steps_per_epoch))
    check_trackers(trackers)
    if resume_from is not None:
        check_optimizer_of_checkpoint(resume_from, dict(deepspeed))
    with ExitStack() as stack:
        if groups is None:
            groups = stack.enter_context(process_groups(environment, ParallelConfig()))
        section = complete_deepspeed_section(dict(deepspeed), settings.batch_size, environment.world_size)
        if trained is not None:
            stack.enter_context(hold_still(model, trained))
        engine = ExpertParallelEngine(model, section, groups)
        stack.callback(engine.destroy)  # else its hooks keep it, the model and the groups' threads alive
        trainer = Trainer(engine, feed, objective, settings, seed, callbacks, trackers, run, stop or StopRequest())
        result = trainer.run_to_the_end(resume_from)
        whole = engine.whole_parameters() if keep_model else {}
    if keep_model:
        restore_parameters(model, whole)
    return result


class Trainer:
    """A fit that is under way, as its callbacks see it.

    ``step``: steps done. ``total_steps``, ``steps_per_epoch``: of the whole fit. ``layers``: the model's MoE layers, in
    order. ``monitor``: what shows sentences, metrics and pictures. ``history``: of the validations so far.
    """

    def __init__(
        self,
        engine: ExpertParallelEngine,
        feed: Feed,
        objective: Objective,
        settings: TrainConfig,
        seed: int,
        callbacks: Sequence[Callback],
        trackers: Sequence[TrackerSettings],
        run: RunDirectory | None,
        stop: StopRequest,
    ) -> None:
        self.engine, self.feed, self.settings, self.run = engine, feed, settings, run
        self.groups: ProcessGroups = engine.process_groups
        self.steps_per_epoch = feed.steps_per_epoch
        self.total_steps = settings.total_steps(feed.steps_per_epoch)
        self.step = 0
        self.history = TrainingHistory()
        self._objective, self._seed, self._stop, self._trackers = objective, seed, stop, trackers
        own: list[Callback] = [PeriodicCheckpoints(settings.checkpoint_every), RouterPictures(), RouterAlarm()]
        if settings.patience is not None:
            own.insert(0, EarlyStopping(settings.patience))
        first: list[Callback] = [objective] if isinstance(objective, Callback) else []
        self._watch = RunDirectoryWatch()
        self.callbacks: list[Callback] = [self._watch, *first, *callbacks, *own]
        names = [callback.name for callback in self.callbacks]
        if len(set(names)) < len(names):
            raise ValueError(f"callbacks of a fit need different names, got {sorted(names)}")
        self.layers = list(moe_layers(engine.module).values())
        self._searches = [
            one for one in (layer.slot_map for layer in self.layers) if isinstance(one, PermutationSearch)
        ]
        self._window, self._host_records = StepWindow(), list[dict[str, Any]]()
        self._skipped_in_a_row, self._is_ending, self._checkpoint_is_due = 0, False, False
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._peak_flops = peak_flops_of(engine.device, engine.module, self.groups.environment.world_size)

    @property
    def model(self) -> Any:
        """The module that is trained."""
        return self.engine.module

    @property
    def tables(self) -> dict[str, SlotTable]:
        """The slot -> expert tables of the model by their layers' names."""
        return slot_tables(self.model)

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)
            if self.engine.shards_parameters:  # the callback may have evaluated
                self.engine.gather_tables()

    def end(self) -> None:
        """Make the present step the last. On every rank alike."""
        self._is_ending = True

    def ask_for_checkpoint(self) -> None:
        """Have a checkpoint written when the present step is over. On every rank alike."""
        self._checkpoint_is_due = True

    def validated(self, step: int, metrics: Mapping[str, Any], headlines: Collection[str] | None = None) -> None:
        """Take the metrics of a validation after ``step`` steps, the same on every rank; tells all callbacks.

        ``headlines``: see :meth:`Monitor.evaluation`.
        """
        self.history = TrainingHistory({**self.history.validation_losses, step: float(metrics["loss"])}, self._seconds)
        self.monitor.evaluation("validation", dict(metrics), step, headlines)
        self.call("on_validation", step, metrics)

    def save(self, root: Path, keep: int) -> None:
        """Write a checkpoint of the present step under ``root`` and keep the newest ``keep``. On every rank alike."""
        ACTIVITY.enter("checkpoint")
        self.history = TrainingHistory(self.history.validation_losses, self._seconds)
        states = {callback.name: state for callback in self.callbacks if (state := callback.state_dict())}
        self._saver.save(root, self.step, keep, self.history, states)

    def run_to_the_end(self, resume_from: Path | None) -> FitResult:
        """Train until a last step, then choose the weights and call ``on_end``; see :func:`fit`."""
        self._resume(resume_from)
        self._saver = CheckpointSaver(
            self.engine,
            in_background=self.settings.async_checkpoints,
            failures_allowed=self.settings.checkpoint_failures_allowed,
            say=self.monitor.say,
            check=self._watch.check_place,
        )
        first_step, self._started = self.step, time.monotonic()
        interrupted = False
        try:
            self.call("on_start")
            while self.step < self.total_steps and not (self._is_ending or interrupted):
                recorder = Recorder()
                with recording(recorder):
                    self._train_step(recorder)
                interrupted = self._settle_step()
            self._saver.finish()
            self._watch.check()
            self.history = TrainingHistory(self.history.validation_losses, self._seconds)
            steps, best = self.step, None if interrupted else self._take_best()
            if not interrupted:
                self.call("on_end")
        finally:
            self._saver.close()
            self.monitor.close()
        return FitResult(self.model, self.history, first_step, steps, best, interrupted, self.monitor.lost_records)

    def _resume(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            state = load_checkpoint(self.engine, checkpoint)
            self.step, self.history, self._seconds_before = state.step, state.history, state.history.seconds
            give_back_states(self.callbacks, state.callbacks, checkpoint)
        is_rank_zero = self.groups.environment.is_rank_zero
        told: list[str] = []
        if is_rank_zero and self.run is not None:
            self.run.create()
            # What a resumed run does again, or could not be read; and what another patience once kept.
            root = checkpoints_of(self.run.root)
            told = drop_after(root, self.step)
            told += drop_after(best_of(root), self.step if self.settings.patience is not None else -1)
        self.monitor = Monitor(
            self.run,
            self._trackers,
            is_rank_zero=is_rank_zero,
            first_step=self.step,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        for sentence in told:
            self.monitor.say(f"warning: {sentence}")

    def _train_step(self, recorder: Recorder) -> None:
        """Take one step, from its data to its callbacks; ``recorder`` gets what is recorded on the way."""
        started, step, engine, world = time.perf_counter(), self.step, self.engine, self.groups.world
        ACTIVITY.enter("data", step + 1)

        # Every random number of the step is keyed by (seed, step, rank): a resumed run needs no saved state.
        engine.train()
        seed_step(self._seed, step, self.groups.environment.rank)
        for layer in self.layers:
            layer.begin_step(step)
        self.call("before_step", step)
        world.traffic.reset()
        if is_timed(step + 1, self.settings.time_every):
            world.clock.start(engine.device)
            record_memory(engine.device)

        # DeepSpeed accumulates gradients itself: of its ``step`` calls only the last micro-batch's takes the step.
        sums, lr, batches = [], engine.get_lr()[0], self.feed.micro_batches(step)
        data_seconds = time.perf_counter() - started
        shares = len(batches) * self.groups.environment.world_size
        for batch in batches:
            ACTIVITY.enter("forward")
            if len(self._searches) > 1:
                relax_together(self._searches)
            result = self._objective(engine, batch)
            ACTIVITY.enter("backward")
            engine.backward(result.loss)
            ACTIVITY.enter("optimizer")
            engine.step()
            sums.append(result.sums or {"loss": result.loss.detach() / shares})

        # Nothing is read from the device here: the window keeps tensors until the ranks' numbers are collected.
        counts: Sums = {"stop": self._stop.signal_number, "writing": int(self._saver.writing)}
        self._window.add(add_sums(sums) | world.traffic.counts() | counts | {SUMS: world.clock.stop()}, recorder)
        skipped = engine.step_was_skipped
        host = {"step": step + 1, "lr": lr, "grad_norm": engine.grad_norm, "skipped": float(skipped)}
        self._host_records.append(host | {"data_seconds": data_seconds, "step_seconds": time.perf_counter() - started})
        self.step = step + 1
        for layer in self.layers:
            layer.end_step(skipped=skipped)
        self.call("after_step", self.step)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row == self.settings.max_skipped_steps:
            self._collect()
            raise self._diverged(step)

    def _settle_step(self) -> bool:
        """Collect the ranks' numbers and save where that is due; whether a rank was asked to stop."""
        self._is_ending = self._is_ending or self.step == self.total_steps
        saving, self._checkpoint_is_due = self._checkpoint_is_due or self._is_ending, False
        collecting = saving or self.step % self.settings.log_every == 0
        interrupted = collecting and self._collect() and not self._is_ending
        if (saving or interrupted) and self.run is not None:
            self.save(checkpoints_of(self.run.root), self.settings.keep_checkpoints)
        return interrupted

    def _collect(self) -> bool:
        """Show the steps since the last collection; whether any rank was asked to stop."""
        ACTIVITY.enter("collection of metrics")
        reduced = self._window.reduce()
        stops = [numbers.pop("stop") for numbers in reduced]
        writers = [numbers.pop("writing") for numbers in reduced]
        records = [host | numbers for host, numbers in zip(self._host_records, reduced, strict=True)]
        name_times(records, self.groups.environment.world_size, self.settings.time_every)
        describe_load(records, [layer.experts.num_experts for layer in self.layers])
        describe_speed(records, self.model, self.settings.batch_size, self._peak_flops)
        self._host_records = []
        if records:
            self.call("on_records", records)
            self.monitor.steps(records)
        if writers and not writers[-1]:
            self._saver.settle()  # at the same step on all ranks, and nobody waits
        return any(stops) or self._watch.has_moved

    def _take_best(self) -> Path | None:
        """Bring back the weights of the best validation loss, if they were kept; their checkpoint."""
        kept = [] if self.run is None else complete_directories(best_of(checkpoints_of(self.run.root)))
        if not kept:
            return None
        load_weights(self.engine, kept[-1])
        self.step = int(kept[-1].name.rpartition("-")[2])
        self.monitor.say(f"taking the weights of step {self.step}, the best by validation loss")
        return kept[-1]

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _diverged(self, step: int) -> DivergedError:
        rank = self.groups.environment.rank

        def compute(batch: Any) -> tuple[Tensor, Sums]:
            result = self._objective(self.engine, batch)
            return result.loss, result.sums

        seed_step(self._seed, step, rank)
        micro_batches = [partial(compute, batch) for batch in self.feed.micro_batches(step)]
        return diverged(self.model, micro_batches, rank, step + 1, self.settings.max_skipped_steps)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key every random number of a step by (seed, step, rank)."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)

"""Supervised training: one fit of one model on one task, validated on the way, tested at the end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from dist_moe.config.files import write_json
from dist_moe.data.batches import ShuffledFeed
from dist_moe.engine.callbacks import Callback, Validation
from dist_moe.engine.checkpoint.files import newest_good_checkpoint
from dist_moe.engine.checkpoint.format import read_trainer_state
from dist_moe.engine.checkpoint.loading import agree_on_checkpoint, check_optimizer_of_checkpoint
from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.deepspeed.schedules import check_changes_have_effect, check_length_of_schedule
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.health.watchdog import watchdog
from dist_moe.engine.launch.environment import LaunchEnvironment, disable_malloc_trim
from dist_moe.engine.launch.process_groups import ProcessGroups, process_groups
from dist_moe.engine.launch.signals import StopRequest, stop_requests
from dist_moe.engine.training import FitResult, Objective, Trainer, fit
from dist_moe.errors import UserError
from dist_moe.recipes.callbacks.permutation import PermutationCallback
from dist_moe.recipes.callbacks.placement import PlacementCallback
from dist_moe.recipes.callbacks.table_search import TableSearchCallback
from dist_moe.recipes.identity import Described, Identity, identify
from dist_moe.recipes.recipe import RecipeConfig, RecipeSettings, RunStart, load_config
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.report import layers_table, metrics_table, opening_line, predictor_rows
from dist_moe.recipes.supervised.size import check_fits
from dist_moe.tasks import Task, WeightedObjective, build_model, evaluate, evaluate_baselines
from dist_moe.tasks.evaluation import check_parts, check_selection, label_warnings

OnValidation = Callable[[int, float], bool]
"""Called after each validation with (steps done, validation loss); True gives the run up."""


class Stopped(Exception):
    """Whoever watched the validations has given the run up."""


@dataclass(frozen=True)
class SupervisedPlan:
    """A run whose checks have passed. ``checkpoint``: where to go on from; None for a new run. ``identity``: what it
    is beside its configuration."""

    start: RunStart
    task: Task
    feed: ShuffledFeed[Any]
    checkpoint: Path | None
    identity: Identity

    @property
    def config(self) -> SupervisedConfig:
        """The run's configuration."""
        config: SupervisedConfig = self.start.config
        return config

    @property
    def deepspeed(self) -> dict[str, Any]:
        """The configuration that DeepSpeed gets."""
        world_size = self.start.environment.world_size
        return complete_deepspeed_section(self.config.deepspeed, self.config.train.batch_size, world_size)


@dataclass
class SupervisedResult:
    """``fit``: how the training went. ``val``, ``test``: metrics of the weights that were chosen, after
    ``tested_step`` steps; None if the training was interrupted."""

    fit: FitResult
    val: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    tested_step: int = 0


class SupervisedRecipe(RecipeSettings):
    """Train a model on a task by the labels."""

    configuration: ClassVar[type[RecipeConfig]] = SupervisedConfig

    name: Literal["supervised"] = Field("supervised", description="by the labels alone")

    def plan(self, start: RunStart) -> SupervisedPlan:
        """Open the task, check that the run can begin or go on, and find its checkpoint. Raises UserError."""
        config: SupervisedConfig = start.config
        checkpoint = newest_checkpoint_of(start) if start.resumes else None
        task = config.data.open(progress=start.environment.is_rank_zero)
        check_task(start, task)
        self.check(config, task)
        check_fits(config, task, start.environment)
        if checkpoint is None and config.start is not None:
            config.start.check(config, task)
        identity = identify(start, Identity(data=task.digests(), weights=self.weights(config, task)), checkpoint)
        feed = checked_feed(config, task, start.environment)
        if checkpoint is not None:
            check_optimizer_of_checkpoint(checkpoint, config.deepspeed)
            check_changes_have_effect(load_config(start.run.config).deepspeed, config.deepspeed)
        return SupervisedPlan(start, task, feed, checkpoint, identity)

    def train(self, plan: SupervisedPlan) -> int:
        """Open the process groups and train; 0, or 128 + signal if it was asked to stop."""
        disable_malloc_trim()
        start, config = plan.start, plan.config
        if start.environment.is_rank_zero:
            start.run.create()
        # A signal while the groups open ends the process at once: there is nothing to save, and perhaps a dead peer.
        with process_groups(start.environment, config.parallel) as groups, stop_requests() as stop:
            result = self.train_in_groups(plan, groups, stop)
        return 128 + (stop.signal_number or signal.SIGTERM) if result.fit.interrupted else 0

    def train_in_groups(
        self, plan: SupervisedPlan, groups: ProcessGroups, stop: StopRequest, on_validation: OnValidation | None = None
    ) -> SupervisedResult:
        """Train in existing process groups and an existing run directory. Collective over all ranks.

        Raises Stopped where ``on_validation`` returned True, which it must do on all ranks alike.
        """
        start, config, task = plan.start, plan.config, plan.task
        checkpoint = agree_on_checkpoint(start.run.root, plan.checkpoint)
        model = build_model(config, task, groups.world)
        if checkpoint is None and config.start is not None:
            config.start.fill(model, config, task, start.environment)
        ending = FinalEvaluation(task, config.target_weights)
        with watchdog(start.run.root, start.environment, config.parallel):
            fitted = fit(
                model,
                plan.feed,
                self.objective(config, task, groups),
                config.train,
                deepspeed=config.deepspeed,
                seed=config.seed,
                callbacks=[
                    Opening(plan),
                    Described(start, plan.identity),
                    *callbacks_of(config, task, on_validation),
                    ending,
                ],
                trackers=config.trackers,
                run=start.run,
                resume_from=checkpoint,
                groups=groups,
                stop=stop,
                keep_model=False,
            )
            result = SupervisedResult(fitted, ending.val, ending.test, ending.tested_step)
            if start.environment.is_rank_zero:
                if fitted.interrupted:
                    hint = f"go on with: dist-moe train --resume {start.run.root}"
                    start.say(f"stopped after step {fitted.steps}; {hint}")
                else:
                    summarise(plan, result, ending)
        return result

    def check(self, config: SupervisedConfig, task: Task) -> None:
        """Raise UserError for what a run, new or resumed, could not train with."""

    def weights(self, config: SupervisedConfig, task: Task) -> dict[str, str]:
        """Return digests of the weights that a run starts from or follows, by name, as far as they are (still) there.

        Raises UserError for weights that are not intact.
        """
        start = None if config.start is None else config.start.digest(task)
        return {} if start is None else {"start": start}

    def objective(self, config: SupervisedConfig, task: Task, groups: ProcessGroups) -> Objective:
        """Return what the model is trained for. Raises UserError if what it needs is not there."""
        return weighted_objective(config, task, groups)


def weighted_objective(
    config: SupervisedConfig, task: Task, groups: ProcessGroups, *, auxiliary: bool = True
) -> WeightedObjective:
    """Return the objective of the labels alone. ``auxiliary``: with the gates' auxiliary losses."""
    shares = groups.environment.world_size * config.accumulation
    return WeightedObjective(task, config.target_weights, shares, auxiliary=auxiliary)


def newest_checkpoint_of(start: RunStart) -> Path:
    """Return the newest intact checkpoint of a run; adds to its warnings what is wrong with newer ones.

    Raises UserError if there is none.
    """
    checkpoint, faults = newest_good_checkpoint(start.run.root)
    start.warnings.extend(f"warning: {fault}; going on from {checkpoint.name} instead" for fault in faults)
    imported_from = read_trainer_state(checkpoint).imported_from
    if imported_from is not None:
        start.warnings.append(
            f"{checkpoint.name} is imported from {imported_from}: the optimizer begins without moments"
        )
    return checkpoint


def check_task(start: RunStart, task: Task) -> None:
    """Raise UserError for a task that cannot be trained on; adds to the warnings what its labels cannot tell."""
    config: SupervisedConfig = start.config
    check_parts(task)
    if config.train.patience is not None:
        check_selection(task, config.target_weights, f"train.patience={config.train.patience}")
    start.warnings.extend(label_warnings(task, config.target_weights))


def checked_feed(config: SupervisedConfig, task: Task, environment: LaunchEnvironment) -> ShuffledFeed[Any]:
    """Return :func:`feed_of`. Raises UserError for a search or a schedule that does not fit its length, too."""
    feed = feed_of(config, task, environment)
    for search in config.table_searches:
        search.check(config.train, feed.steps_per_epoch)
    check_length_of_schedule(config.deepspeed, config.train.total_steps(feed.steps_per_epoch))
    return feed


def feed_of(config: SupervisedConfig, task: Task, environment: LaunchEnvironment) -> ShuffledFeed[Any]:
    """Return the training examples in the order of the run's seed, this rank's share of every step.

    Raises UserError if there are fewer examples than one batch.
    """
    return ShuffledFeed(
        task.train,
        config.train.batch_size,
        config.seed,
        rank=environment.rank,
        world_size=environment.world_size,
        accumulation=config.accumulation,
        device=environment.device,
    )


def callbacks_of(config: SupervisedConfig, task: Task, on_validation: OnValidation | None) -> list[Callback]:
    """Return what a configuration wants to happen beside training, in order."""
    callbacks: list[Callback] = []
    if config.model.permutation is not None:
        callbacks.append(PermutationCallback(task, config.target_weights))
    weights, seed = config.target_weights, config.seed
    callbacks += [TableSearchCallback(search, task, weights, seed) for search in config.table_searches]
    if config.placement is not None and config.parallel.expert_parallel_size > 1:
        callbacks.append(PlacementCallback(config.placement))
    callbacks += [one.build() for one in config.callbacks]

    def validate(trainer: Trainer, step: int) -> dict[str, Any]:
        metrics = evaluate(task, trainer.model, task.val, config.target_weights, trainer.groups)
        if on_validation is not None and on_validation(step, metrics["loss"]):
            raise Stopped(f"given up after step {step}")
        return metrics

    every, at_end = config.train.validate_every, config.train.patience is not None
    return [*callbacks, Validation(validate, every, at_end=at_end, headlines=task.headlines)]


class Opening(Callback):
    """Prints what is about to be trained, and the run's warnings."""

    def __init__(self, plan: SupervisedPlan) -> None:
        self._plan = plan

    def on_start(self, trainer: Trainer) -> None:
        """Print the lines."""
        plan = self._plan
        for line in (*plan.start.warnings, opening_line(plan.config, plan.task, trainer, plan.start.run.root)):
            trainer.monitor.say(line)
        if trainer.groups.environment.world_size > 1:
            trainer.monitor.say(f"ranks exchange over {trainer.groups.transport}")


class FinalEvaluation(Callback):
    """Evaluates the chosen weights on the validation and test examples, while the engine still stands.

    ``val``, ``test``: their metrics, None before. ``tested_step``: after which the weights were taken. ``costs``,
    ``report``: what the task says of the trained model, see :class:`Task`, and a permutation search of its stage.
    """

    def __init__(self, task: Task, weights: tuple[float, ...]) -> None:
        self._task, self._weights = task, weights
        self.val: dict[str, Any] | None = None
        self.test: dict[str, Any] | None = None
        self.tested_step, self.costs, self.report = 0, dict[str, Any](), ""

    def on_end(self, trainer: Trainer) -> None:
        """Evaluate, and ask the task what else there is to say."""
        ACTIVITY.enter("evaluation")
        trainer.monitor.say("evaluating on the validation and test examples ...")
        task, model, groups = self._task, trainer.model, trainer.groups
        self.val = evaluate(task, model, task.val, self._weights, groups)
        self.test = evaluate(task, model, task.test, self._weights, groups)
        self.tested_step = trainer.step
        trainer.monitor.evaluation("test", self.test, trainer.step, task.headlines)
        self.costs, self.report = task.costs(model, self.test), task.final_report(model)
        for callback in trainer.callbacks:
            if isinstance(callback, PermutationCallback):
                self.costs["permutation"] = callback.found


def summarise(plan: SupervisedPlan, result: SupervisedResult, ending: FinalEvaluation) -> None:
    """Write the run's summary, then print the table of metrics. Raises UserError if it cannot be written."""
    task, run, fitted = plan.task, plan.start.run, result.fit
    assert result.test is not None
    baselines = evaluate_baselines(task, task.test, plan.config.target_weights)
    summary = {
        "val": result.val,
        "test": result.test,
        "baselines": baselines,
        "data": task.manifest,
        "data_changes": plan.identity.plain()["changes"],
        "steps": fitted.steps,
        "first_step": fitted.first_step,
        "training_seconds": fitted.history.seconds,
        "tested_step": result.tested_step,
        "lost_records": fitted.lost_records,
        **ending.costs,
    }
    try:
        write_json(run.summary, summary)
    except OSError as error:
        raise UserError(
            f"{run.summary} could not be written: {error}; the checkpoints are complete: make room, then let "
            f"'dist-moe train --resume {run.root}' write it, or print the metrics by 'dist-moe evaluate'"
        ) from error
    try:
        task.draw(run.root, result.test)
    except OSError as error:
        plan.start.say(f"warning: the pictures of the test could not be written: {error}")
    print(metrics_table(result.test, predictor_rows(baselines)))
    if by_layer := layers_table(result.test):
        print(by_layer)
    if ending.report:
        print(ending.report)
    print(f"everything about this run is in {run.root}; look at it with: tensorboard --logdir {run.root.parent}")

"""Everything about a run that can be checked, fetched and decided before any process group exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_moe.data.batches import ShuffledFeed
from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories, newest_good_checkpoint
from dist_moe.engine.checkpoint.loading import read_trainer_state
from dist_moe.engine.collectives import gather_objects
from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.monitor.monitor import Schedule
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.errors import UserError
from dist_moe.models import BertConfig
from dist_moe.recipes.supervised.config import RunConfig, load_config
from dist_moe.recipes.supervised.start.bert_config import TextStartConfig
from dist_moe.tasks.open import open_task
from dist_moe.tasks.task import Task


@dataclass(frozen=True)
class TrainingPlan:
    """A run whose checks have passed. ``checkpoint``: where to go on from; None for a new run.
    ``warnings``: what its user should know."""

    config: RunConfig
    run: RunDirectory
    environment: LaunchEnvironment
    task: Task
    feed: ShuffledFeed[Any]
    deepspeed: dict[str, object]
    checkpoint: Path | None = None
    warnings: tuple[str, ...] = ()

    @property
    def accumulation(self) -> int:
        return self.config.accumulation

    @property
    def schedule(self) -> Schedule:
        train, steps_per_epoch = self.config.train, self.feed.steps_per_epoch
        return Schedule(train.batch_size, steps_per_epoch, train.total_steps(steps_per_epoch))


def plan_new_run(config_path: Path, overrides: Sequence[str], run_dir: Path) -> TrainingPlan:
    """Raises UserError for a wrong configuration or layout, a used run directory, missing data."""
    environment = LaunchEnvironment.read()
    config = load_config(config_path, overrides).fitted(environment.world_size)
    config.check(environment.world_size)
    run = RunDirectory(run_dir)
    if environment.is_first:
        run.check_unused()
    return _plan(config, run, environment)


def plan_resumed_run(run_dir: Path, overrides: Sequence[str]) -> TrainingPlan:
    """The same for a run that goes on from its newest intact checkpoint."""
    environment = LaunchEnvironment.read()
    run = RunDirectory(run_dir)
    run.check_exists()
    config = load_config(run.config, overrides).fitted(environment.world_size)
    config.check(environment.world_size)
    _check_same_run(load_config(run.config), config)
    return _plan(config, run, environment, *_start_of(run))


def plan_restartable_run(config_path: Path, overrides: Sequence[str], run_dir: Path) -> TrainingPlan:
    """A new run, or the one in ``run_dir`` from its newest intact checkpoint: the same command serves for both.

    A run that has no checkpoint yet begins again. Raises UserError as the two others do, and if
    ``run_dir`` holds another run.
    """
    environment = LaunchEnvironment.read()
    config = load_config(config_path, overrides).fitted(environment.world_size)
    config.check(environment.world_size)
    run = RunDirectory(run_dir)
    if not complete_directories(checkpoints_of(run_dir)):
        return _plan(config, run, environment)
    run.check_exists()
    _check_same_run(load_config(run.config), config)
    return _plan(config, run, environment, *_start_of(run))


def agree_on_start(plan: TrainingPlan) -> TrainingPlan:
    """The first rank's choice of a checkpoint, for all: to another machine a shared directory may look older.

    Collective over all ranks.
    """
    name = gather_objects(plan.checkpoint.name if plan.checkpoint else None)[0]
    return replace(plan, checkpoint=checkpoints_of(plan.run.root) / name if name else None)


def _start_of(run: RunDirectory) -> tuple[Path, tuple[str, ...]]:
    """Checkpoint and warnings."""
    checkpoint, faults = newest_good_checkpoint(run.root)
    warnings = tuple(f"warning: {fault}; going on from {checkpoint.name} instead" for fault in faults)
    imported_from = read_trainer_state(checkpoint).imported_from
    if imported_from is not None:
        warnings += (f"{checkpoint.name} is imported from {imported_from}: the optimizer begins without moments",)
    return checkpoint, warnings


def _check_same_run(recorded: RunConfig, config: RunConfig) -> None:
    """Raise UserError for a change after which the run's record would speak of another run."""
    before, after = _identity(recorded), _identity(config)
    for field in before | after:
        there, here = before.get(field), after.get(field)
        if there != here:
            raise UserError(
                f"{field}={here!r}: the run was trained with {there!r}, and --resume goes on with the "
                f"same run. It may change train (but for batch_size), parallel, placement, deepspeed, swap_search, "
                f"model.activation_checkpointing and where things are (data.root, data.cache, start.encoder, "
                f"start.run, distillation.teacher); for anything else start a new run"
            )


def _identity(config: RunConfig) -> dict[str, Any]:
    content = config.plain()
    data = {f"data.{name}": value for name, value in content["data"].items() if name not in ("root", "cache")}
    model = {f"model.{name}": value for name, value in content["model"].items() if name != "activation_checkpointing"}
    whole = {name: content[name] for name in ("seed", "target_weights")}
    follows = content["distillation"]
    taught = follows and {name: value for name, value in follows.items() if name != "teacher"}
    rest = {"distillation": taught, "train.batch_size": content["train"]["batch_size"]}
    return whole | data | model | _identity_of_start(config) | rest


def _identity_of_start(config: RunConfig) -> dict[str, Any]:
    """How the first weights were made; not where those are that they were made of."""
    start = config.start or (TextStartConfig() if isinstance(config.model, BertConfig) else None)
    if start is None:
        return {}
    fields = start.model_dump(mode="json", exclude={"name", "encoder", "run"})
    return {f"start.{name}": value for name, value in fields.items()} | {"start.run": start.run and "given"}


def _plan(
    config: RunConfig,
    run: RunDirectory,
    environment: LaunchEnvironment,
    checkpoint: Path | None = None,
    warnings: tuple[str, ...] = (),
) -> TrainingPlan:
    task = open_task(config, progress=environment.is_first)
    task.check_run(config)
    if checkpoint is None:
        task.check_new_run(config)
    feed = ShuffledFeed(
        task.train,
        config.train.batch_size,
        config.seed,
        rank=environment.rank,
        world_size=environment.world_size,
        accumulation=config.accumulation,
        device=environment.device,
    )
    _check_swap_search(config, feed.steps_per_epoch)
    deepspeed = complete_deepspeed_section(config.deepspeed, config.train.batch_size, environment.world_size)
    return TrainingPlan(config, run, environment, task, feed, deepspeed, checkpoint, warnings)


def _check_swap_search(config: RunConfig, steps_per_epoch: int) -> None:
    """Raises UserError if training ends before a search is due."""
    if config.swap_search is None:
        return
    first, steps = config.swap_search.first_step(steps_per_epoch), config.train.total_steps(steps_per_epoch)
    if first > steps:
        raise UserError(
            f"swap_search.every_epochs={config.swap_search.every_epochs:g}: the first search would follow step {first} "
            f"(an epoch has {steps_per_epoch}), but training ends after {steps}; give at most "
            f"{steps / steps_per_epoch:.3g}"
        )

"""Stages: the named parts of a recipe, each a run directory of its own under ``stages/`` of the run.

    def run(self, plan, stages):
        stages.run("teacher", lambda stage: train_teacher(plan, stage))
        stages.run("student", lambda stage: train_student(plan, stage))

A stage that has finished is skipped when the run is resumed; one that was interrupted, or died, goes on from its newest
intact checkpoint. Several stages may run at once, each on some of the ranks. Process groups are opened for each stage
anew, over the ranks that take part: to all that happens within, these are all ranks there are.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from dist_moe.config.files import read_json, write_json
from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories, newest_good_checkpoint
from dist_moe.engine.checkpoint.loading import agree_on_checkpoint
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.health.watchdog import watchdog
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.meeting import JobStore
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.engine.launch.signals import StopRequest, stop_requests
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import Feed, FitResult, Objective, fit
from dist_moe.recipes.identity import (
    NOTHING,
    Described,
    Identity,
    check_same,
    identify,
    recorded_identity,
)
from dist_moe.recipes.recipe import Plan, RecipeConfig, RecipeSettings, RunStart
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.size import check_fits
from dist_moe.tasks import Task

SECONDS_BETWEEN_LOOKS = 0.2


class Interrupted(Exception):
    """A stage was asked to stop and has written a checkpoint; ``signal_number``: by which signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@dataclass(frozen=True)
class Stage:
    """A stage under way on this rank.

    ``run``: its directory. ``groups``: open, over the ranks that take part. ``checkpoint``: from where it goes on, None
    if it begins. ``stop``: asks it to end. ``identity``: what the run is, which its checkpoints carry.
    """

    start: RunStart
    run: RunDirectory
    groups: ProcessGroups
    checkpoint: Path | None
    stop: StopRequest
    identity: Identity = NOTHING

    @property
    def environment(self) -> LaunchEnvironment:
        """This rank among those that take part."""
        return self.groups.environment

    def fit(
        self, model: nn.Module, feed: Feed, objective: Objective, settings: TrainConfig, **options: Any
    ) -> FitResult:
        """Call :func:`dist_moe.engine.training.fit` for this stage; ``options`` as there;
        trackers, seed and deepspeed are those of the configuration unless given.

        Raises Interrupted where it was asked to stop.
        """
        config = self.start.config
        given = {name: getattr(config, name) for name in ("trackers", "seed", "deepspeed") if hasattr(config, name)}
        options = given | options
        callbacks = [
            Described(replace(self.start, environment=self.environment), self.identity, of_stage=True),
            *options.pop("callbacks", ()),
        ]
        result = fit(
            model,
            feed,
            objective,
            settings,
            run=self.run,
            resume_from=self.checkpoint,
            groups=self.groups,
            stop=self.stop,
            callbacks=callbacks,
            **options,
        )
        if result.interrupted:
            raise Interrupted(self.stop.signal_number)
        return result


@dataclass(frozen=True)
class RunOfStage:
    """The end of a stage whose directory holds a run of another configuration than the whole.

    ``result``: JSON, kept as the stage's result. ``config``: of that run, by which others read its weights.
    """

    result: Mapping[str, Any]
    config: RecipeConfig


StageFunction = Callable[[Stage], Mapping[str, Any] | RunOfStage | None]
"""The work of a stage, on every rank that takes part. It returns JSON, which is kept as the stage's result."""


class Stages:
    """Runs the stages of ``start``, in the order in which they are asked for, on all ranks alike.

    ``identity``: what the run is beside its configuration, which every stage records.
    """

    def __init__(self, start: RunStart, stop: StopRequest, identity: Identity = NOTHING) -> None:
        self._start, self._stop, self._identity = start, stop, identity
        self._environment = start.environment
        self._store = JobStore(start.environment, start.config.parallel.timeout_s)
        self._count = 0

    def directory(self, name: str) -> RunDirectory:
        """Return the run directory of a stage."""
        return RunDirectory(self._start.run.stages / name)

    def run(self, name: str, function: StageFunction, parallel: ParallelConfig | None = None) -> dict[str, Any]:
        """Run one stage on all ranks, unless it has finished already; returns its result. Collective.

        ``parallel``: its layout, if not the run's. Raises Interrupted where it was asked to stop.
        """
        return self.run_at_once({name: function}, parallel)[name]

    def run_at_once(
        self, functions: Mapping[str, StageFunction], parallel: ParallelConfig | None = None
    ) -> dict[str, dict[str, Any]]:
        """Run several stages, each on an equal share of the ranks; returns their results by name. Collective.

        Where there are more stages than shares, a share runs several, one after the other; see :func:`blocks_of` for
        the shares. Raises Interrupted where one of them was asked to stop.
        """
        self._count += 1
        # Rank 0 says what has finished: to another machine a shared directory may look older.
        unfinished = [name for name in functions if not self.directory(name).result.is_file()]
        todo = self._store.agree(f"unfinished-{self._count}", unfinished)
        layout = parallel or self._start.config.parallel
        blocks, size = blocks_of(self._environment.world_size, len(functions), layout)
        block, rank = divmod(self._environment.rank, size)
        environment = replace(self._environment, rank=rank, world_size=size)
        layout = layout.fitted(size)
        try:
            for name in list(functions)[block::blocks]:
                if name in todo:
                    self._run_here(name, functions[name], environment, layout)
        except Interrupted:
            self._store.tell(f"interrupted-{self._count}")
            raise
        self._wait_for_all()
        return {name: read_json(self.directory(name).result) for name in functions}

    def _run_here(
        self, name: str, function: StageFunction, environment: LaunchEnvironment, parallel: ParallelConfig
    ) -> None:
        directory = self.directory(name)
        if environment.is_rank_zero:
            directory.create()
        kept = complete_directories(checkpoints_of(directory.root))
        checkpoint = newest_good_checkpoint(directory.root, whole=_reads_all(environment))[0] if kept else None
        with (
            process_groups(environment, parallel, self._store.part(f"stage-{self._count}-{name}")) as groups,
            watchdog(directory.root, environment, parallel),
        ):
            if environment.world_size > 1:
                self._start.say(f"stage {name}: ranks exchange over {groups.transport}")
            checkpoint = agree_on_checkpoint(directory.root, checkpoint)
            ended = function(Stage(self._start, directory, groups, checkpoint, self._stop, self._identity))
            if environment.is_rank_zero:
                Described(replace(self._start, environment=environment), self._identity, of_stage=True).write(directory)
                if isinstance(ended, RunOfStage):
                    directory.describe(ended.config.plain(), environment)
                result = ended.result if isinstance(ended, RunOfStage) else ended
                write_json(directory.result, dict(result or {}))

    def _wait_for_all(self) -> None:
        """Wait until every rank has done its share; raises Interrupted if one was asked to stop meanwhile."""
        done = f"done-{self._count}"
        self._store.arrive(done)
        while not self._store.is_told(done):
            if self._store.is_told(f"interrupted-{self._count}") or self._stop.signal_number:
                raise Interrupted(self._stop.signal_number)
            ACTIVITY.beat()
            time.sleep(SECONDS_BETWEEN_LOOKS)
        left = f"left-{self._count}"
        self._store.arrive(left)
        while self._environment.is_rank_zero and not self._store.is_told(left):
            time.sleep(SECONDS_BETWEEN_LOOKS)  # its process may hold the store that the others still look into


def blocks_of(world_size: int, stages: int, parallel: ParallelConfig) -> tuple[int, int]:
    """Return the number of blocks of consecutive ranks on which so many ``stages`` run at once, and their size.

    As many as divide the ranks, and leave each block the ranks over which the experts of a layer are split.
    """
    allowed = [b for b in range(1, stages + 1) if world_size % b == 0]
    whole = [b for b in allowed if world_size // b % parallel.expert_parallel_size == 0]
    blocks = max(whole or allowed, default=1)
    return blocks, world_size // blocks


def _reads_all(environment: LaunchEnvironment) -> bool:
    """Whether this rank reads checkpoints from end to end: for its node, or because it decides for its share."""
    return environment.is_rank_zero or environment.local_rank == 0


@dataclass(frozen=True)
class StagedPlan:
    """A run of stages whose checks have passed. ``task``: that of its data. ``identity``: what it is beside its
    configuration."""

    start: RunStart
    task: Task
    identity: Identity = NOTHING


class StagedRecipe(RecipeSettings):
    """A recipe that is a sequence of stages, with the configuration of supervised training unless it has its own."""

    configuration: ClassVar[type[RecipeConfig]] = SupervisedConfig

    def plan(self, start: RunStart) -> StagedPlan:
        """Open the task; override it to check more. Raises UserError."""
        task = start.config.data.open(progress=start.environment.is_rank_zero)
        if isinstance(start.config, SupervisedConfig):
            check_fits(start.config, task, start.environment)
        identity = identify(start, Identity(data=task.digests(), weights=self.weights()), None)
        for stage in sorted(start.run.stages.glob("*")) if start.resumes else ():
            if complete_directories(checkpoints_of(stage)) and not RunDirectory(stage).result.is_file():
                recorded = recorded_identity(RunDirectory(stage), newest_good_checkpoint(stage)[0])
                check_same(stage, recorded, identity, allowed=start.allow_changed_data)
        return StagedPlan(start, task, identity)

    def weights(self) -> dict[str, str]:
        """Return digests of the weights that the run starts from or follows, by name, as far as they are there.

        Raises UserError for weights that are not intact.
        """
        return {}

    @abstractmethod
    def run(self, plan: Any, stages: Stages) -> None:
        """Run the stages in order. On every rank."""

    def train(self, plan: Plan) -> int:
        """Run the stages; 0, or 128 + signal if they were asked to stop."""
        start, identity = plan.start, getattr(plan, "identity", NOTHING)
        if start.environment.is_rank_zero:
            start.run.create()
        for warning in start.warnings:
            start.say(warning)
        with stop_requests() as stop:
            try:
                self.run(plan, Stages(start, stop, identity))
            except Interrupted as interrupted:
                start.say(f"stopped; go on with: dist-moe train --resume {start.run.root}")
                return 128 + (interrupted.signal_number or 15)
        return 0

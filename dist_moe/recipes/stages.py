"""Stages: the named parts of a recipe, each a run directory of its own under ``stages/`` of the run.

    def run(self, plan, stages):
        stages.run("teacher", lambda stage: train_teacher(plan, stage))
        stages.run("student", lambda stage: train_student(plan, stage))

A stage that has finished is skipped when the run is resumed; one that was interrupted, or died, goes on from its newest
intact checkpoint. Several stages may run at once, each on some of the ranks. Process groups are opened for each stage
anew, over the ranks that take part: to all that happens within, these are all ranks there are.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from dist_moe.config.files import write_json
from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories, newest_good_checkpoint
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.health.watchdog import watchdog
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.meeting import JobStore
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.engine.launch.signals import StopRequest, stop_requests
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import Feed, FitResult, Objective, fit
from dist_moe.recipes.recipe import Plan, RecipeConfig, RecipeSettings, RunStart
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.tasks import Task

RESULT = "result.json"
"""Written last into a stage's directory: its presence means that the stage has finished."""

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
    if it begins. ``stop``: asks it to end.
    """

    start: RunStart
    run: RunDirectory
    groups: ProcessGroups
    checkpoint: Path | None
    stop: StopRequest

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
        result = fit(
            model,
            feed,
            objective,
            settings,
            run=self.run,
            resume_from=self.checkpoint,
            groups=self.groups,
            stop=self.stop,
            **options,
        )
        if result.interrupted:
            raise Interrupted(self.stop.signal_number)
        return result


StageFunction = Callable[[Stage], Mapping[str, Any] | None]
"""The work of a stage, on every rank that takes part. It returns JSON, which is kept as the stage's result."""


class Stages:
    """Runs the stages of ``start``, in the order in which they are asked for, on all ranks alike."""

    def __init__(self, start: RunStart, stop: StopRequest) -> None:
        self._start, self._stop = start, stop
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

        Where there are more stages than shares, a share runs several, one after the other. The shares are blocks of
        consecutive ranks, as many as divide the ranks. Raises Interrupted where one of them was asked to stop.
        """
        self._count += 1
        # Rank 0 says what has finished: to another machine a shared directory may look older.
        unfinished = [name for name in functions if not (self.directory(name).root / RESULT).is_file()]
        todo = self._store.agree(f"unfinished-{self._count}", unfinished)
        blocks = max(b for b in range(1, len(functions) + 1) if self._environment.world_size % b == 0)
        size = self._environment.world_size // blocks
        block, rank = divmod(self._environment.rank, size)
        environment = replace(self._environment, rank=rank, world_size=size)
        layout = (parallel or self._start.config.parallel).fitted(size)
        try:
            for name in list(functions)[block::blocks]:
                if name in todo:
                    self._run_here(name, functions[name], environment, layout)
        except Interrupted:
            self._store.tell(f"interrupted-{self._count}")
            raise
        self._wait_for_all()
        return {name: json.loads((self.directory(name).root / RESULT).read_text()) for name in functions}

    def _run_here(
        self, name: str, function: StageFunction, environment: LaunchEnvironment, parallel: ParallelConfig
    ) -> None:
        directory = self.directory(name)
        if environment.is_rank_zero:
            directory.create()
            directory.describe(self._start.config.plain(), environment)
        kept = complete_directories(checkpoints_of(directory.root))
        checkpoint = newest_good_checkpoint(directory.root)[0] if kept else None
        with (
            process_groups(environment, parallel, self._store.part(f"stage-{self._count}-{name}")) as groups,
            watchdog(directory.root, environment, parallel),
        ):
            if environment.world_size > 1:
                self._start.say(f"stage {name}: ranks exchange over {groups.transport}")
            result = function(Stage(self._start, directory, groups, checkpoint, self._stop))
            if environment.is_rank_zero:
                write_json(directory.root / RESULT, dict(result or {}))

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


@dataclass(frozen=True)
class StagedPlan:
    """A run of stages whose checks have passed. ``task``: that of its data."""

    start: RunStart
    task: Task


class StagedRecipe(RecipeSettings):
    """A recipe that is a sequence of stages, with the configuration of supervised training unless it has its own."""

    configuration: ClassVar[type[RecipeConfig]] = SupervisedConfig

    def plan(self, start: RunStart) -> StagedPlan:
        """Open the task; override it to check more. Raises UserError."""
        return StagedPlan(start, start.config.data.open(progress=start.environment.is_rank_zero))

    @abstractmethod
    def run(self, plan: Any, stages: Stages) -> None:
        """Run the stages in order. On every rank."""

    def train(self, plan: Plan) -> int:
        """Run the stages; 0, or 128 + signal if they were asked to stop."""
        start = plan.start
        if start.environment.is_rank_zero:
            start.run.create()
            start.run.describe(start.config.plain(), start.environment)
        with stop_requests() as stop:
            try:
                self.run(plan, Stages(start, stop))
            except Interrupted as interrupted:
                start.say(f"stopped; go on with: dist-moe train --resume {start.run.root}")
                return 128 + (interrupted.signal_number or 15)
        return 0

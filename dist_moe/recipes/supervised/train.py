"""Supervised training, and the evaluation of a run from its checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.config.files import write_json
from dist_moe.engine.checkpoint.files import checkpoints_of
from dist_moe.engine.checkpoint.format import TrainerState
from dist_moe.engine.checkpoint.loading import load_checkpoint, load_weights
from dist_moe.engine.deepspeed.config import cast_parameters
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.health.activity import ACTIVITY
from dist_moe.engine.health.watchdog import watchdog
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.host_memory import keep_freed_memory
from dist_moe.engine.launch.process_groups import ProcessGroups, process_groups
from dist_moe.engine.launch.stop_request import StopRequest, stop_requests
from dist_moe.engine.loop import LoopHooks, Outcome, TrainingLoop
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.recipes.callbacks.placement import ExpertMover
from dist_moe.recipes.callbacks.swap_search import search_swaps
from dist_moe.recipes.supervised.config import RunConfig
from dist_moe.recipes.supervised.evaluation_options import for_evaluation
from dist_moe.recipes.supervised.objective import build_objective
from dist_moe.recipes.supervised.plan import TrainingPlan, agree_on_start
from dist_moe.recipes.supervised.report import Reporter, figures_table, predictor_rows
from dist_moe.recipes.supervised.runs import find_weights
from dist_moe.tasks.evaluation import evaluate
from dist_moe.tasks.models import build_model
from dist_moe.tasks.open import open_problem
from dist_moe.tasks.task import Problem

OnValidation = Callable[[int, float], bool]
"""Called after each validation with (steps done, validation loss); True gives the run up."""


class Stopped(Exception):
    """Whoever watched the validations has given the run up."""


def train(plan: TrainingPlan, on_validation: OnValidation | None = None) -> int:
    """Run the plan. Collective over all ranks. Returns 0, or 128 + signal if it was asked to stop.

    Raises Stopped where ``on_validation`` returned True, which it must do on all ranks alike.
    """
    keep_freed_memory()
    if plan.environment.is_first:
        plan.run.create()
        if plan.checkpoint is None:
            plan.run.describe(plan.config.plain(), plan.environment)
    # A signal while the groups open ends the process at once: there is nothing to save, and perhaps a dead peer.
    with process_groups(plan.environment, plan.config.parallel) as groups, stop_requests() as stop:
        return train_in_groups(agree_on_start(plan), groups, stop, on_validation)


def train_in_groups(
    plan: TrainingPlan, groups: ProcessGroups, stop: StopRequest, on_validation: OnValidation | None = None
) -> int:
    """The same in process groups that are open already and in a run directory that exists."""
    model = build_model(plan.config, plan.problem, groups.world)
    if plan.checkpoint is None:
        plan.problem.first_weights(model, plan.config.model)
    engine = ExpertParallelEngine(model, plan.deepspeed, groups)
    try:
        with watchdog(plan.run.root, plan.environment, plan.config.parallel):
            return _train(plan, engine, stop, on_validation)
    finally:
        engine.destroy()  # else its hooks keep it, the model and the groups' threads alive


def _train(
    plan: TrainingPlan, engine: ExpertParallelEngine, stop: StopRequest, on_validation: OnValidation | None
) -> int:
    model: MoEModel = engine.module
    groups = engine.process_groups
    resumed = load_checkpoint(engine, plan.checkpoint) if plan.checkpoint else None
    if resumed and plan.environment.is_first:
        plan.run.describe(plan.config.plain(), plan.environment)
    first_step = resumed.step if resumed else 0
    weights = plan.config.task_weights
    with Reporter(plan, engine, first_step) as reporter:
        outcome = _loop(plan, engine, reporter, resumed, on_validation).run(first_step, stop)
        course = {
            "steps": outcome.steps,
            "first_step": first_step,
            "training_seconds": outcome.seconds,
        }
        if outcome.interrupted:
            reporter.say(f"stopped after step {outcome.steps}; go on with: dist-moe train --resume {plan.run.root}")
            return 128 + (stop.signal_number or signal.SIGTERM)
        tested_step = _take_best(engine, outcome, reporter)
        ACTIVITY.enter("evaluation")
        reporter.say("evaluating on the validation and test examples ...")
        val = evaluate(plan.problem, model, plan.problem.val, weights, groups)
        test = evaluate(plan.problem, model, plan.problem.test, weights, groups)
        reporter.evaluation("test", test, tested_step)
        closing_words = plan.problem.closing_words(model)
    if plan.environment.is_first:
        ending = {"tested_step": tested_step, "lost_records": reporter.lost_records}
        ending |= plan.problem.costs(model, test)
        _summarise(plan, {"val": val, "test": test}, course | ending, closing_words)
    return 0


@dataclass(frozen=True)
class TrainedRun:
    """A finished or stopped run, brought back: its model holds the weights of ``checkpoint``, in the precision
    in which the run computed."""

    config: RunConfig
    problem: Problem
    model: MoEModel
    checkpoint: Path
    groups: ProcessGroups


@contextmanager
def trained_run(run_dir: Path, overrides: Sequence[str] = ()) -> Iterator[TrainedRun]:
    """Open a run, a checkpoint or an exported file at any number of ranks; see :func:`find_weights`.

    ``overrides``: of options of its gate, see :func:`for_evaluation`. Collective. Raises UserError if it is not
    intact, or for an override that is not among those.
    """
    environment = LaunchEnvironment.read()
    weights = find_weights(run_dir)
    config = for_evaluation(weights.config, overrides)
    problem = open_problem(config, progress=environment.is_first)
    with process_groups(environment, config.parallel.nearest_for(environment.world_size)) as groups:
        model = build_model(config, problem, groups.world).to(groups.device)
        cast_parameters(model, config.deepspeed, groups.device)  # before the masters come, which are rounded to it
        weights.load(model)
        yield TrainedRun(config, problem, model, weights.path, groups)


def evaluate_run(run_dir: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Test figures of a run, a checkpoint or an exported file, at any number of ranks. Collective.

    Those of the run's summary, to the bit at its layout and to the rounding of its precision at others; with
    ``overrides``, those that its gate gives with other options. Raises UserError as :func:`trained_run` does.
    """
    with trained_run(run_dir, overrides) as run:
        weights = run.config.task_weights
        return {
            "checkpoint": run.checkpoint.name,
            "test": evaluate(run.problem, run.model, run.problem.test, weights, run.groups),
            "baselines": run.problem.baselines(run.problem.test, weights),
        }


def _loop(
    plan: TrainingPlan,
    engine: ExpertParallelEngine,
    reporter: Reporter,
    resumed: TrainerState | None,
    on_validation: OnValidation | None,
) -> TrainingLoop:
    config, groups, problem = plan.config, engine.process_groups, plan.problem
    model: MoEModel = engine.module
    mover = ExpertMover(plan, engine, reporter, resumed.step if resumed else 0)

    def validate(step: int) -> float:
        figures = evaluate(problem, model, problem.val, config.task_weights, groups)
        reporter.evaluation("validation", figures, step)
        if on_validation is not None and on_validation(step, figures["loss"]):
            raise Stopped(f"given up after step {step}")
        return float(figures["loss"])

    def before_step(step: int) -> None:
        model.begin_step(step)
        mover.before_step(step)

    def after_step(step: int) -> None:
        model.end_step(skipped=engine.step_was_skipped)
        search = config.swap_search
        if search is not None and not model.learning and search.due(step, plan.feed.steps_per_epoch):
            ACTIVITY.enter("swap search")
            reporter.swaps(search_swaps(problem, model, search, config.task_weights, groups.environment), step)
        mover.after_step(step)

    shares = plan.environment.world_size * plan.accumulation
    hooks = LoopHooks(
        loss=build_objective(config, problem, engine, shares),
        before_step=before_step,
        after_step=after_step,
        report=mover.report,
        validate=validate,
        say=reporter.say,
    )
    return TrainingLoop(
        engine,
        plan.feed,
        hooks,
        config.train,
        steps_per_epoch=plan.feed.steps_per_epoch,
        checkpoints=checkpoints_of(plan.run.root),
        seed=config.seed,
        course=resumed.history if resumed else None,
    )


def _take_best(engine: ExpertParallelEngine, outcome: Outcome, reporter: Reporter) -> int:
    """Bring back the weights of the best validation loss, if they were kept; their step."""
    if outcome.best is None:
        return outcome.steps
    load_weights(engine, outcome.best)
    step = int(outcome.best.name.rpartition("-")[2])
    reporter.say(f"taking the weights of step {step}, the best by validation loss")
    return step


def _summarise(
    plan: TrainingPlan, figures: dict[str, dict[str, Any]], course: dict[str, Any], closing_words: str
) -> None:
    problem = plan.problem
    baselines = problem.baselines(problem.test, plan.config.task_weights)
    summary = figures | {"baselines": baselines, "data": problem.manifest} | course
    print(figures_table(figures["test"], predictor_rows(baselines)))
    if closing_words:
        print(closing_words)
    try:
        write_json(plan.run.summary, summary)
    except OSError as error:
        raise UserError(
            f"{plan.run.summary} could not be written: {error}; the checkpoints are complete: make room, then let "
            f"'dist-moe train --resume {plan.run.root}' write it, or print the figures by 'dist-moe evaluate'"
        ) from error
    print(f"everything about this run is in {plan.run.root}; look at it with: tensorboard --logdir {plan.run.root}")

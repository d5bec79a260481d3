"""Supervised training of the recommender, and its evaluation from a checkpoint."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import torch

from dist_moe.data.movielens import MovieLens, prepare
from dist_moe.engine.checkpoint import load_checkpoint, load_model
from dist_moe.engine.checkpoint_files import checkpoints_of, newest_checkpoint, write_json
from dist_moe.engine.expert_parallel_engine import ExpertParallelEngine
from dist_moe.engine.launch_environment import LaunchEnvironment
from dist_moe.engine.loop import LoopHooks, TrainingLoop
from dist_moe.engine.process_groups import ProcessGroups, process_groups
from dist_moe.engine.run_directory import RunDirectory
from dist_moe.engine.stop_request import StopRequest, stop_requests
from dist_moe.models import Recommender
from dist_moe.recipes.baselines import baseline_figures
from dist_moe.recipes.config import RunConfig, load_config
from dist_moe.recipes.evaluation import evaluate
from dist_moe.recipes.objective import TwoTaskObjective
from dist_moe.recipes.plan import TrainingPlan
from dist_moe.recipes.report import Reporter, figures_table


def train(plan: TrainingPlan) -> int:
    """Run the plan. Collective over all ranks. Returns 0, or 128 + signal if it was asked to stop."""
    if plan.environment.is_first:
        plan.run.create()
        plan.run.describe(plan.config.plain(), plan.environment)
    with stop_requests() as stop, process_groups(plan.environment, plan.config.parallel) as groups:
        return train_in_groups(plan, groups, stop)


def train_in_groups(plan: TrainingPlan, groups: ProcessGroups, stop: StopRequest) -> int:
    """The same in process groups that are open already and in a run directory that exists."""
    model = build_model(plan.config, plan.data, plan.feed.steps_per_epoch, groups)
    engine = ExpertParallelEngine(model, plan.deepspeed, groups)
    first_step = load_checkpoint(engine, plan.checkpoint).step if plan.checkpoint else 0
    with Reporter(plan, engine, first_step) as reporter:
        started = time.monotonic()
        steps = _loop(plan, engine, reporter).run(first_step, stop)
        course = {"steps": steps, "first_step": first_step, "training_seconds": time.monotonic() - started}
        if steps < plan.schedule.total_steps:
            reporter.say(f"stopped after step {steps}; go on with: dist-moe train --resume {plan.run.root}")
            return 128 + (stop.signal_number or signal.SIGTERM)
        reporter.say("evaluating on the test pairs ...")
        test = evaluate(model, plan.data.test, plan.config.watched_weight, groups)
        reporter.evaluation("test", test, steps)
    if plan.environment.is_first:
        _summarise(plan, test, course)
    return 0


def evaluate_run(run_dir: Path) -> dict[str, Any]:
    """Test figures of a run from its newest checkpoint, at any number of ranks. Collective.

    Raises UserError if the run or its newest checkpoint is not intact.
    """
    environment = LaunchEnvironment.read()
    run = RunDirectory(run_dir)
    run.check_exists()
    config = load_config(run.config)
    checkpoint = newest_checkpoint(run_dir)
    data = prepare(config.data, progress=environment.is_first)
    size = math.gcd(environment.world_size, config.parallel.expert_parallel_size)
    parallel = config.parallel.model_copy(update={"expert_parallel_size": size})
    with process_groups(environment, parallel) as groups:
        steps_per_epoch = len(data.train) // config.train.batch_size
        model = build_model(config, data, steps_per_epoch, groups).to(groups.device)
        load_model(model, checkpoint)
        figures = evaluate(model, data.test, config.watched_weight, groups)
    return {
        "checkpoint": checkpoint.name,
        "test": figures,
        "baselines": baseline_figures(data, data.test, config.watched_weight),
    }


def build_model(config: RunConfig, data: MovieLens, steps_per_epoch: int, groups: ProcessGroups) -> Recommender:
    """This rank's part of the model; dense parameters are alike on all ranks."""
    torch.manual_seed(config.seed)
    return config.model.build(data.num_users, data.num_items, steps_per_epoch, groups.world)


def _loop(plan: TrainingPlan, engine: ExpertParallelEngine, reporter: Reporter) -> TrainingLoop:
    config, groups = plan.config, engine.process_groups
    permutation = engine.module.permutation

    def validate(step: int) -> None:
        figures = evaluate(engine.module, plan.data.val, config.watched_weight, groups)
        reporter.evaluation("validation", figures, step)

    hooks = LoopHooks(
        loss=TwoTaskObjective(config.watched_weight, plan.environment.world_size * plan.accumulation),
        before_step=permutation.begin_step if permutation is not None else lambda: None,
        report=reporter.steps,
        validate=validate,
    )
    return TrainingLoop(
        engine,
        plan.feed,
        hooks,
        config.train,
        steps_per_epoch=plan.feed.steps_per_epoch,
        checkpoints=checkpoints_of(plan.run.root),
        seed=config.seed,
    )


def _summarise(plan: TrainingPlan, test: dict[str, Any], course: dict[str, Any]) -> None:
    baselines = baseline_figures(plan.data, plan.data.test, plan.config.watched_weight)
    summary = {"test": test, "baselines": baselines, "data": plan.data.manifest} | course
    write_json(plan.run.summary, summary)
    print(figures_table(test, baselines))
    print(f"everything about this run is in {plan.run.root}; look at it with: tensorboard --logdir {plan.run.root}")

"""The stages of a forest: each trains one model, or works on all that were trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_moe.data.batches import ShuffledFeed
from dist_moe.engine.checkpoint import newest_checkpoint, read_model
from dist_moe.engine.checkpoint.format import read_trainer_state
from dist_moe.engine.deepspeed.checks import check_deepspeed_section
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.trainable import Trained
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.parallel import wait_for_all
from dist_moe.recipes.branch_train_merge.budget import Budget, settings_until
from dist_moe.recipes.branch_train_merge.forest import EXPERT, Forest
from dist_moe.recipes.branch_train_merge.partition import Partition
from dist_moe.recipes.branch_train_merge.posterior import PriorOptions
from dist_moe.recipes.stages import Stage, StagedPlan
from dist_moe.recipes.supervised.recipe import callbacks_of, weighted_objective
from dist_moe.tasks import build_model
from dist_moe.tasks.language import LanguageModelTask

SEED, TWIN, FOREST, EVALUATION = "seed", "twin", "forest", "evaluation"
"""Names of stages; the first two also of models that are kept beside the experts."""


def stage_of(branch: str) -> str:
    """Return the name of the stage that trains a branch."""
    return f"branch-{branch}"


@dataclass(frozen=True, kw_only=True)
class ForestPlan(StagedPlan):
    """A run whose checks have passed: which branch learns what, and for how long. ``union``: the task of all that
    branches learn, for which models are built. ``prior``: how cached priors are estimated."""

    task: LanguageModelTask
    union: LanguageModelTask
    partition: Partition
    budget: Budget
    prior: PriorOptions


def check_batch(plan: ForestPlan, tasks: Mapping[str, LanguageModelTask], ranks: int) -> None:
    """Raise UserError for a branch with less text than a batch, or a batch that its ``ranks`` cannot share."""
    config, size = plan.start.config, plan.budget.branch_batch
    for branch, task in tasks.items():
        if len(task.train) < size:
            raise UserError(
                f"recipe.branch_batch_size={size} is larger than the {len(task.train)} training sequences of {branch}; "
                "give a smaller one, more text, or other domains (recipe.partition.domains)"
            )
    shares = ranks * config.accumulation
    if size % shares:
        raise UserError(
            f"recipe.branch_batch_size={size} cannot be shared out over the {ranks} rank(s) of a branch, "
            f"{config.accumulation} time(s) per step; give a multiple of {shares}, or train on other ranks"
        )
    check_deepspeed_section(config.deepspeed, size, ranks)


class LaterFeed:
    """A feed that begins at its beginning when ``first_step`` steps have been taken on another one."""

    def __init__(self, feed: ShuffledFeed[Any], first_step: int) -> None:
        self._feed, self._first_step = feed, first_step
        self.steps_per_epoch = feed.steps_per_epoch

    def micro_batches(self, step: int) -> list[Any]:
        """Return this rank's micro-batches of ``step``, counted from 0 over both feeds."""
        return self._feed.micro_batches(step - self._first_step)


def train_seed(plan: ForestPlan, stage: Stage) -> dict[str, Any]:
    """Train on all domains, for the seed's share of the budget."""
    settings = settings_until(plan.start.config.train, plan.budget.seed, plan.budget.twin_batch)
    return fit_model(plan, stage, plan.union, settings)


def train_twin(plan: ForestPlan, seed: Path | None, stage: Stage) -> dict[str, Any]:
    """Go on with the seed on all domains, as if there were no branches."""
    settings = settings_until(plan.start.config.train, plan.budget.total, plan.budget.twin_batch)
    return fit_model(plan, stage, plan.union, settings, first=seed)


def train_branch(plan: ForestPlan, branch: str, seed: Path | None, stage: Stage) -> dict[str, Any]:
    """Go on with the seed on one branch's text: optimizer and schedule continue, the data begin anew."""
    budget = plan.budget
    settings = settings_until(plan.start.config.train, budget.seed + budget.branch, budget.branch_batch)
    task = plan.partition.task_of(plan.task, branch)
    return fit_model(plan, stage, task, settings, first=seed, first_step=budget.seed)


def fit_model(
    plan: ForestPlan,
    stage: Stage,
    task: LanguageModelTask,
    settings: TrainConfig,
    *,
    first: Path | None = None,
    first_step: int = 0,
    begin: Callable[[MoEModel], None] | None = None,
    trained: Trained | None = None,
) -> dict[str, Any]:
    """Fit a model to ``task``; return its steps, and the seconds that it took alone. Collective over the stage's ranks.

    ``first``: a run from whose newest checkpoint a stage that begins goes on, optimizer and schedule included.
    ``first_step``: steps that were taken on other data. ``begin``: gives a model its first weights, where there is no
    checkpoint to go on from. ``trained``: which parameters train, see :func:`dist_moe.engine.training.fit`.
    """
    config, environment = plan.start.config, stage.environment
    model: MoEModel = build_model(config, plan.union, stage.groups.world)
    begun_from = None if first is None else newest_checkpoint(first)
    seconds_before = 0.0 if begun_from is None else read_trainer_state(begun_from).history.seconds
    stage = replace(stage, checkpoint=stage.checkpoint or begun_from)
    if stage.checkpoint is None and begin is not None:
        begin(model)
    feed = ShuffledFeed(
        task.train,
        settings.batch_size,
        config.seed,
        rank=environment.rank,
        world_size=environment.world_size,
        accumulation=config.accumulation,
        device=environment.device,
    )
    validated = task if len(task.val) else plan.union  # a branch may have no sequence to validate on
    fitted = stage.fit(
        model,
        LaterFeed(feed, first_step),
        weighted_objective(config, task, stage.groups),
        settings,
        deepspeed=config.deepspeed,  # a mixture's may differ from that of the stage's run
        callbacks=callbacks_of(config, validated, None),
        trained=trained,
        keep_model=False,
    )
    return {"steps": fitted.steps, "training_seconds": fitted.history.seconds - seconds_before}


def plant_forest(plan: ForestPlan, branches: Sequence[str], stage: Stage) -> dict[str, Any]:
    """Write the weights of every trained model into the forest, and what tells domains that were discovered."""
    run, budget, length = plan.start.run, plan.budget, plan.task.tokens_per_example
    if stage.environment.is_rank_zero:
        forest, configuration = Forest(run.root), plan.start.config.plain()
        shares = {SEED: budget.seed * budget.twin_batch, TWIN: (budget.total - budget.seed) * budget.twin_batch}
        models = {name: (name, name, count) for name, count in shares.items()}
        models |= {name: (stage_of(name), EXPERT, budget.branch * budget.branch_batch) for name in branches}
        for name, (directory, role, sequences) in models.items():
            if (run.stages / directory).is_dir():
                weights = read_model(newest_checkpoint(run.stages / directory))
                begun = SEED if budget.seed and name != SEED else "random weights"
                forest.plant(name, weights, configuration, role=role, tokens=sequences * length, begun_from=begun)
        if plan.task.data.clusterer is not None:
            forest.plant_clusterer(plan.task.data.clusterer)
    wait_for_all()
    return {"tokens": {name: count * length for name, count in budget.sequences.items()}}

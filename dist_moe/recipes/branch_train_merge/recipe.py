"""Branch-Train-Merge (Li et al., 2022): a seed, a branch of it for each domain, trained apart, used together.

seed             all domains, a share of the budget
branch-NAME      from the seed, on one domain; all at once, each on its own ranks, between which nothing is sent
twin             (if asked for) the seed, on all domains, with the rest of the budget: what the forest must beat
forest           the weights of all of them as files, see :mod:`.forest`
...              stages of ways of merging that have to be trained
evaluation       every domain by every expert and every way of using them together
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from dist_moe.config.settings import LARGEST_COUNT
from dist_moe.data.batches import ShuffledFeed
from dist_moe.engine.checkpoint import newest_checkpoint, read_model
from dist_moe.engine.deepspeed.checks import check_deepspeed_section
from dist_moe.engine.deepspeed.schedules import check_length_of_schedule
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.settings import TrainConfig
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.parallel import wait_for_all
from dist_moe.recipes.branch_train_merge.budget import Budget, settings_until
from dist_moe.recipes.branch_train_merge.evaluate import evaluate_forest, table_text, write_report
from dist_moe.recipes.branch_train_merge.forest import EXPERT, Forest
from dist_moe.recipes.branch_train_merge.merge import DEFAULT_MERGES, MergeConfig
from dist_moe.recipes.branch_train_merge.partition import Partition, PartitionConfig, Provenance
from dist_moe.recipes.branch_train_merge.scoring import PriorOptions, Scorer, new_model
from dist_moe.recipes.recipe import RunStart
from dist_moe.recipes.stages import Stage, StagedPlan, StagedRecipe, Stages, blocks_of
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.recipe import callbacks_of, weighted_objective
from dist_moe.tasks import build_model
from dist_moe.tasks.evaluation import check_parts
from dist_moe.tasks.language import LanguageModelTask

SEED, TWIN, FOREST, EVALUATION = "seed", "twin", "forest", "evaluation"
"""Names of stages; the first two also of models that are kept beside the experts."""


def stage_of(branch: str) -> str:
    """Return the name of the stage that trains a branch."""
    return f"branch-{branch}"


@dataclass(frozen=True, kw_only=True)
class ForestPlan(StagedPlan):
    """A run whose checks have passed: which branch learns what, and for how long. ``union``: the task of all that
    branches learn, for which models are built."""

    task: LanguageModelTask
    union: LanguageModelTask
    partition: Partition
    budget: Budget


class LaterFeed:
    """A feed that begins at its beginning when ``first_step`` steps have been taken on another one."""

    def __init__(self, feed: ShuffledFeed[Any], first_step: int) -> None:
        self._feed, self._first_step = feed, first_step
        self.steps_per_epoch = feed.steps_per_epoch

    def micro_batches(self, step: int) -> list[Any]:
        """Return this rank's micro-batches of ``step``, counted from 0 over both feeds."""
        return self._feed.micro_batches(step - self._first_step)


class BranchTrainMergeRecipe(StagedRecipe):
    """Train many experts apart, each on its own domain, and use them together."""

    name: Literal["branch_train_merge"] = Field(
        "branch_train_merge", description="experts trained apart, a domain each, from one seed, used together"
    )
    seed_share: float = Field(
        0.5, ge=0, le=1, description="share of the tokens that the seed sees, on all domains (1: a dense run alone)"
    )
    partition: PartitionConfig = Field(
        default_factory=lambda: Provenance(), description="which text each branch learns"
    )
    branch_batch_size: int | None = Field(
        None,
        ge=1,
        le=LARGEST_COUNT,
        description="sequences per step of a branch, over its ranks (null: train.batch_size / branches, so that a "
        "branch takes as many steps as the dense run would after the seed)",
    )
    twin: bool = Field(False, description="also train the seed on with the rest of the whole budget, to compare with")
    merge: tuple[MergeConfig, ...] = Field(tuple(DEFAULT_MERGES), description="ways of using the experts together")
    prior_sequences: int = Field(
        100, ge=1, le=LARGEST_COUNT, description="validation sequences of a domain that its cached prior is taken from"
    )
    prior_decay: float = Field(0.3, gt=0, le=1, description="weight of each sequence's posterior in the cached prior")

    @field_validator("merge")
    @classmethod
    def _labels_differ(cls, merge: tuple[MergeConfig, ...]) -> tuple[MergeConfig, ...]:
        labels = [one.label for one in merge]
        if len(set(labels)) < len(labels):
            raise ValueError(f"each way of merging once, got {labels}")
        return merge

    @property
    def prior_options(self) -> PriorOptions:
        """How cached priors are estimated."""
        return PriorOptions(self.prior_sequences, self.prior_decay)

    def check_config(self, config: SupervisedConfig) -> None:
        """Raise UserError for what a forest does not have."""
        if config.data.kind != LanguageModelTask.kind:
            raise UserError(
                f"recipe.name={self.name}: experts are mixed by what they say of the text so far, and "
                f"data.name={config.data.name} is no text; use data.name=text or brown"
            )
        for field, value in {"start": config.start, "swap_search": config.swap_search}.items():
            if value is not None:
                raise UserError(f"{field}: not with recipe.name={self.name}; set it to null")
        if config.train.patience is not None:
            raise UserError(
                f"train.patience={config.train.patience}: the branches of recipe.name={self.name} have equal budgets; "
                "set it to null"
            )
        for merge in self.merge:
            merge.check_config(config)

    def result_of(self, root: Path) -> Path:
        """Raise UserError: a forest is several models."""
        raise UserError(
            f"{root} is a forest, not one model: 'dist-moe forest evaluate {root}' evaluates it, and 'dist-moe forest "
            f"list {root}' names the files of its experts"
        )

    def plan(self, start: RunStart) -> ForestPlan:
        """Divide the text and the budget, and check that every stage can be trained. Raises UserError."""
        plan = super().plan(start)
        config: SupervisedConfig = start.config
        if not isinstance(plan.task, LanguageModelTask):
            raise UserError(f"data.name={config.data.name}: recipe.name={self.name} needs text that is cut into tokens")
        check_parts(plan.task)
        partition = self.partition.divide(plan.task)
        union = partition.task_of(plan.task, None)
        budget = Budget.of(
            config.train, len(union.train), len(partition.branches), self.seed_share, self.branch_batch_size
        )
        self._check(config, partition, plan.task, union, budget, start.environment)
        return ForestPlan(
            start=start, task=plan.task, identity=plan.identity, union=union, partition=partition, budget=budget
        )

    def _check(
        self,
        config: SupervisedConfig,
        partition: Partition,
        task: LanguageModelTask,
        union: LanguageModelTask,
        budget: Budget,
        environment: LaunchEnvironment,
    ) -> None:
        """Raise UserError for a branch without enough text, or batches that the ranks cannot share."""
        for taken in {SEED, TWIN} & set(partition.branches):
            raise UserError(f"data: a domain is called {taken}, as a model of the forest is; rename it")
        if len(union.train) < config.train.batch_size:
            raise UserError(
                f"train.batch_size={config.train.batch_size} is larger than the {len(union.train)} training sequences"
            )
        check_length_of_schedule(config.deepspeed, max(budget.total, budget.seed + budget.branch))
        if not budget.branches:
            return
        for branch in partition.branches:
            count = len(partition.task_of(task, branch).train)
            if count < budget.branch_batch:
                raise UserError(
                    f"recipe.branch_batch_size={budget.branch_batch} is larger than the {count} training sequences of "
                    f"{branch}; give a smaller one, more text, or other domains (recipe.partition.domains)"
                )
        _, size = blocks_of(environment.world_size, budget.branches, config.parallel)
        if budget.branch_batch % (size * config.accumulation):
            raise UserError(
                f"recipe.branch_batch_size={budget.branch_batch} cannot be shared out over the {size} rank(s) of a "
                f"branch, {config.accumulation} time(s) per step; give a multiple of {size * config.accumulation}, or "
                "train on other ranks"
            )
        check_deepspeed_section(config.deepspeed, budget.branch_batch, size)

    def run(self, plan: ForestPlan, stages: Stages) -> None:
        """Run the stages in order. On every rank."""
        budget, seed = plan.budget, None
        if budget.seed:
            stages.run(SEED, partial(train_seed, plan))
            seed = stages.directory(SEED).root
        branches = plan.partition.branches if budget.branches else ()
        if branches:
            stages.run_at_once({stage_of(name): partial(train_branch, plan, name, seed) for name in branches})
        if self.twin and budget.seed < budget.total:
            stages.run(TWIN, partial(train_twin, plan, seed))
        stages.run(FOREST, partial(plant_forest, plan, branches))
        for merge in self.merge:
            merge.prepare(plan, stages)
        stages.run(EVALUATION, partial(evaluate_stage, plan, self))


def train_seed(plan: ForestPlan, stage: Stage) -> dict[str, Any]:
    """Train on all domains, for the seed's share of the budget."""
    settings = settings_until(plan.start.config.train, plan.budget.seed, plan.budget.twin_batch)
    return _train(plan, stage, plan.union, settings, first=None, first_step=0)


def train_twin(plan: ForestPlan, seed: Path | None, stage: Stage) -> dict[str, Any]:
    """Go on with the seed on all domains, as if there were no branches."""
    settings = settings_until(plan.start.config.train, plan.budget.total, plan.budget.twin_batch)
    return _train(plan, stage, plan.union, settings, first=seed, first_step=0)


def train_branch(plan: ForestPlan, branch: str, seed: Path | None, stage: Stage) -> dict[str, Any]:
    """Go on with the seed on one branch's text: optimizer and schedule continue, the data begin anew."""
    budget = plan.budget
    settings = settings_until(plan.start.config.train, budget.seed + budget.branch, budget.branch_batch)
    task = plan.partition.task_of(plan.task, branch)
    return _train(plan, stage, task, settings, first=seed, first_step=budget.seed)


def _train(
    plan: ForestPlan,
    stage: Stage,
    task: LanguageModelTask,
    settings: TrainConfig,
    *,
    first: Path | None,
    first_step: int,
) -> dict[str, Any]:
    """Fit a model to ``task``, from the newest checkpoint of the run ``first``; its data begin at ``first_step``."""
    config, environment = plan.start.config, stage.environment
    model: MoEModel = build_model(config, plan.union, stage.groups.world)
    if stage.checkpoint is None and first is not None:
        stage = replace(stage, checkpoint=newest_checkpoint(first))
    feed = ShuffledFeed(
        task.train,
        settings.batch_size,
        config.seed,
        rank=environment.rank,
        world_size=environment.world_size,
        accumulation=config.accumulation,
        device=environment.device,
    )
    validated = len(task.val) > 0  # a branch of a partition may have no sequence to validate on
    fitted = stage.fit(
        model,
        LaterFeed(feed, first_step),
        weighted_objective(config, task, stage.groups),
        settings,
        callbacks=callbacks_of(config, task, None) if validated else [one.build() for one in config.callbacks],
        keep_model=False,
    )
    return {"steps": fitted.steps, "first_step": fitted.first_step, "training_seconds": fitted.history.seconds}


def plant_forest(plan: ForestPlan, branches: Sequence[str], stage: Stage) -> dict[str, Any]:
    """Write the weights of every trained model into the forest."""
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
    wait_for_all()
    return {"tokens": {name: count * length for name, count in budget.sequences.items()}}


def evaluate_stage(plan: ForestPlan, recipe: BranchTrainMergeRecipe, stage: Stage) -> dict[str, Any]:
    """Evaluate the forest on every domain of the data, write the report, and print its table."""
    forest = Forest(plan.start.run.root)
    model = new_model(plan.start.config, plan.union, stage.groups)
    scorer = Scorer(model, plan.task, forest, stage.groups, plan.task.data.domains, prior=recipe.prior_options)
    report = evaluate_forest(scorer, recipe.merge if forest.experts else (), plan.partition.trained_on)
    if stage.environment.is_rank_zero:
        path = write_report(forest, report)
        print(f"{table_text(report)}\neverything about this forest is in {path.parent}")
    return {"bits_per_byte": report["bits_per_byte"]}

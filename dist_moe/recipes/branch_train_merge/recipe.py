"""Branch-Train-Merge (Li et al., 2022): a seed, a branch of it for each domain, trained apart, used together.

seed             all domains, a share of the budget
branch-NAME      from the seed, on one domain; all at once, each on its own ranks, between which nothing is sent
twin             (if asked for) the seed, on all domains, with the rest of the budget: what the forest must beat
forest           the weights of all of them as files, see :mod:`.forest`
...              stages of ways of merging that have to be trained
evaluation       every domain by every expert and every way of using them together
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from dist_moe.config.settings import LARGEST_COUNT
from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories
from dist_moe.engine.deepspeed.schedules import check_length_of_schedule
from dist_moe.errors import UserError
from dist_moe.recipes.branch_train_merge.budget import Budget
from dist_moe.recipes.branch_train_merge.evaluate import evaluate_run, table_text, write_report
from dist_moe.recipes.branch_train_merge.forest import Forest
from dist_moe.recipes.branch_train_merge.merge import DEFAULT_MERGES, MergeConfig
from dist_moe.recipes.branch_train_merge.partition import PartitionConfig, Provenance
from dist_moe.recipes.branch_train_merge.posterior import PriorOptions
from dist_moe.recipes.branch_train_merge.training import (
    EVALUATION,
    FOREST,
    SEED,
    TWIN,
    ForestPlan,
    check_batch,
    plant_forest,
    stage_of,
    train_branch,
    train_seed,
    train_twin,
)
from dist_moe.recipes.recipe import RunStart
from dist_moe.recipes.stages import Stage, StagedRecipe, Stages, blocks_of
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.tasks.evaluation import check_parts
from dist_moe.tasks.language import LanguageModelTask


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

    def check_config(self, config: SupervisedConfig) -> None:
        """Raise UserError for what a forest does not have."""
        if config.data.kind != LanguageModelTask.kind:
            raise UserError(
                f"recipe.name={self.name}: experts are mixed by what they say of the text so far, and "
                f"data.name={config.data.name} is no text; use data.name=text or brown"
            )
        for field in ("start", "swap_search", "assignment_search"):
            if getattr(config, field) is not None:
                raise UserError(f"{field}: not with recipe.name={self.name}; set it to null")
        if config.train.patience is not None:
            raise UserError(
                f"train.patience={config.train.patience}: the branches of recipe.name={self.name} have equal budgets; "
                "set it to null"
            )
        for merge in self.merge:
            merge.check_config(config)

    def result_of(self, root: Path) -> Path:
        """Return ``root`` for a stage that trained one model. Raises UserError for the run: it is several models."""
        if complete_directories(checkpoints_of(root)):
            return root
        raise UserError(
            f"{root} is a forest, not one model: 'dist-moe forest evaluate {root}' evaluates it, and 'dist-moe forest "
            f"list {root}' names the files of its experts"
        )

    def plan(self, start: RunStart) -> ForestPlan:
        """Divide the text and the budget, and check that every stage can be trained. Raises UserError."""
        plan = self.open(start)
        self._check(plan)
        return plan

    def open(self, start: RunStart) -> ForestPlan:
        """Divide the text and the budget, as for a run that is trained already. Raises UserError."""
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
        return ForestPlan(
            start=start,
            task=plan.task,
            identity=plan.identity,
            union=union,
            partition=partition,
            budget=budget,
            prior=PriorOptions(self.prior_sequences, self.prior_decay),
        )

    def _check(self, plan: ForestPlan) -> None:
        """Raise UserError for a branch without enough text, or batches that the ranks cannot share."""
        config, partition, budget = plan.start.config, plan.partition, plan.budget
        for taken in {SEED, TWIN} & set(partition.branches):
            raise UserError(f"data: a domain is called {taken}, as a model of the forest is; rename it")
        sequences = len(plan.union.train)
        if sequences < budget.twin_batch:
            raise UserError(f"train.batch_size={budget.twin_batch} is larger than the {sequences} training sequences")
        check_length_of_schedule(config.deepspeed, max(budget.total, budget.seed + budget.branch))
        if not budget.branches:
            return
        tasks = {branch: partition.task_of(plan.task, branch) for branch in partition.branches}
        check_batch(plan, tasks, blocks_of(plan.start.environment.world_size, budget.branches, config.parallel)[1])
        for merge in self.merge:
            merge.check_plan(plan)

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
        stages.run(EVALUATION, partial(self._evaluate, plan))

    def _evaluate(self, plan: ForestPlan, stage: Stage) -> dict[str, Any]:
        """Evaluate the forest on every domain of the data, write the report, and print its table."""
        report = evaluate_run(plan, stage.groups, self.merge)
        if stage.environment.is_rank_zero:
            forest = Forest(plan.start.run.root)
            write_report(forest, report)
            print(f"{table_text(report)}\neverything about this forest is in {forest.root}")
        return {"bits_per_byte": report["bits_per_byte"]}

"""Work on the forest of a finished run: add, replace and drop experts, evaluate, generate (``dist-moe forest``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_moe.config.settings import Settings
from dist_moe.config.validation import validate_section
from dist_moe.engine.checkpoint import ModelWeights, newest_checkpoint, place_weights, read_model
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ProcessGroups, process_groups
from dist_moe.engine.launch.signals import stop_requests
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.run_lock import held
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.recipes.branch_train_merge.average import averaged
from dist_moe.recipes.branch_train_merge.budget import settings_until
from dist_moe.recipes.branch_train_merge.evaluate import evaluate_run
from dist_moe.recipes.branch_train_merge.forest import EXPERT, Forest
from dist_moe.recipes.branch_train_merge.merge import MergeConfig, MergeSettings
from dist_moe.recipes.branch_train_merge.partition import task_of_domain
from dist_moe.recipes.branch_train_merge.recipe import BranchTrainMergeRecipe
from dist_moe.recipes.branch_train_merge.scoring import Scorer, new_model
from dist_moe.recipes.branch_train_merge.training import SEED, ForestPlan, check_batch, fit_model
from dist_moe.recipes.recipe import RunStart, load_config
from dist_moe.recipes.stages import Interrupted, Stage, Stages
from dist_moe.recipes.supervised.runs import check_same_data, find_weights
from dist_moe.tasks.language import LanguageModelTask
from dist_moe.tasks.language.samples import write_on

BEGINNINGS = ("average", "nearest", SEED)
"""Beginnings of the branch of a further domain: the experts, averaged by how well they predict the domain; the
one that predicts it best; the seed, optimizer and schedule included."""


class _Merge(Settings):
    merge: MergeConfig


def merge_of(text: str) -> MergeSettings:
    """Return the way of merging that a text names, or gives as YAML. Raises UserError if it is none."""
    merge: MergeSettings = validate_section(_Merge, [f"merge={text}"]).merge
    return merge


def open_run(run_dir: Path, *, allow_changed_data: bool = False) -> ForestPlan:
    """Open a run that has a forest, at any number of ranks. Raises UserError if it has none, or for other data."""
    environment = LaunchEnvironment.read()
    Forest.found(run_dir)
    run = RunDirectory(run_dir)
    config = load_config(run.config)
    if not isinstance(config.recipe, BranchTrainMergeRecipe):
        raise UserError(f"{run_dir} is a run of recipe.name={config.recipe.name}, not of branch_train_merge")
    parallel = config.parallel.nearest_for(environment.world_size)
    start = RunStart(
        config.model_copy(update={"parallel": parallel}),
        run,
        environment,
        resumes=True,
        allow_changed_data=allow_changed_data,
    )
    return config.recipe.open(start)


def evaluate_forest_of(
    run_dir: Path,
    merges: Sequence[MergeSettings] | None = None,
    *,
    domains: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
    allow_changed_data: bool = False,
) -> dict[str, Any]:
    """Return the report on a run's forest as it is now. Collective over all ranks. Raises UserError.

    ``merges``: ways of merging; None: those of the run's configuration. ``domains``, ``experts``: None: all.
    """
    plan = open_run(run_dir, allow_changed_data=allow_changed_data)
    recipe, environment = plan.start.config.recipe, plan.start.environment
    with process_groups(environment, plan.start.config.parallel) as groups:
        merges = recipe.merge if merges is None else merges
        return evaluate_run(plan, groups, merges, domains=domains, experts=experts)


def generate(
    run_dir: Path,
    prompt: str,
    merge: MergeSettings,
    *,
    domain: str | None = None,
    tokens: int = 60,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Return how a forest goes on with ``prompt``: text drawn token by token. Collective over all ranks.

    ``domain``: of the data, whose cached prior counts if ``merge`` uses one. Raises UserError.
    """
    plan = open_run(run_dir)
    task, config = plan.task, plan.start.config
    check_domain(plan, domain)
    prompt_S = [task.end_of_text, *task.tokenizer.encode(prompt).ids]
    with process_groups(plan.start.environment, config.parallel) as groups:
        model: Any = merge.model(scorer_of(plan, groups, domain), domain, partial(new_model, plan, groups))
        written_BS = write_on(
            model,
            torch.tensor([prompt_S], device=groups.device),
            tokens,
            seed=seed,
            context=task.tokens_per_example,
            temperature=temperature,
        )
    ids = written_BS[0].tolist()
    until = ids.index(task.end_of_text) if task.end_of_text in ids else len(ids)
    text: str = task.tokenizer.decode(ids[:until])
    return text


def check_domain(plan: ForestPlan, domain: str | None) -> None:
    """Raise UserError for the name of a domain that the data have not."""
    if domain is not None and domain not in plan.task.data.domains:
        raise UserError(f"--domain {domain}: there is no such domain; there are {', '.join(plan.task.data.domains)}")


def scorer_of(plan: ForestPlan, groups: ProcessGroups, domain: str | None) -> Scorer:
    """Return what scores the sequences of one domain, or of none, by a run's forest as it is now."""
    tasks = {} if domain is None else {domain: task_of_domain(plan.task, domain)}
    return Scorer(new_model(plan, groups), plan.union, tasks, Forest(plan.start.run.root), groups, plan.prior)


def drop_expert(run_dir: Path, name: str) -> None:
    """Remove an expert from a run's forest; no other file is touched. Raises UserError if there is no such expert."""
    environment = LaunchEnvironment.read()
    RunDirectory(run_dir).check_exists()
    with held(run_dir, environment, option="RUN"):
        forest = Forest.found(run_dir)
        _check_is_expert(forest, name)
        if environment.is_rank_zero:
            forest.drop(name)


def add_expert(
    run_dir: Path, name: str, begin_from: str | Path, *, replaces: bool = False, allow_changed_data: bool = False
) -> int:
    """Add an expert, or put another in the place of one; no other expert's file is touched. Collective.

    ``name``: a domain of the data, or a branch of the run. ``begin_from``: one of BEGINNINGS: a branch is trained from
    there, for the budget of a branch; or trained weights, which are taken as they are: a run, a checkpoint or an
    exported file of the same model and data.

    Returns 0, or 128 + signal where the training was asked to stop: the same command goes on with it. Raises UserError.
    """
    RunDirectory(run_dir).check_exists()
    with held(run_dir, LaunchEnvironment.read(), option="RUN") as begin:
        plan, forest = open_run(run_dir, allow_changed_data=allow_changed_data), Forest(run_dir)
        begin()
        if replaces:
            _check_is_expert(forest, name)
        elif name in forest.members:
            raise UserError(f"{run_dir} has {name} already; 'dist-moe forest replace' puts another in its place")
        config = plan.start.config
        if isinstance(begin_from, Path):
            weights = _trained_weights(begin_from, plan, allow_changed_data)
            fields: dict[str, Any] = {"begun_from": str(begin_from)}
        else:
            try:
                directory = _train_expert(plan, forest, name, begin_from)
            except Interrupted as interrupted:
                plan.start.say("stopped; the same command goes on with it")
                return 128 + (interrupted.signal_number or 15)
            weights = read_model(newest_checkpoint(directory))
            sequences = plan.budget.branch * plan.budget.branch_batch
            fields = {"begun_from": begin_from, "tokens": sequences * plan.task.tokens_per_example}
        if plan.start.environment.is_rank_zero:
            forest.plant(name, weights, config.plain(), role=EXPERT, **fields)
    return 0


def _check_is_expert(forest: Forest, name: str) -> None:
    if name not in forest.experts:
        raise UserError(f"{forest.run} has no expert {name}; it has {', '.join(forest.experts) or 'none'}")


def _trained_weights(source: Path, plan: ForestPlan, allow_changed_data: bool) -> ModelWeights:
    """Return the weights of ``source``. Raises UserError if they are of another model, or of other data."""
    weights, config = find_weights(source), plan.start.config
    if weights.config.model != config.model:
        raise UserError(f"{source} has another model than the forest; experts of a forest have the same section model")
    check_same_data(source, weights, plan.task, allowed=allow_changed_data)
    return weights.stored


def _train_expert(plan: ForestPlan, forest: Forest, name: str, begin_from: str) -> Path:
    """Train a branch in a stage of its own; return its run directory. Raises Interrupted where it was asked to stop."""
    start, budget = plan.start, plan.budget
    if name in plan.partition.branches:
        task = plan.partition.task_of(plan.task, name)
    elif name in plan.task.data.domains:
        task = task_of_domain(plan.task, name)
    else:
        known = dict.fromkeys((*plan.partition.branches, *plan.task.data.domains))
        raise UserError(f"{name} is no domain of the data and no branch of the run; there are {', '.join(known)}")
    if not budget.branches:
        raise UserError(f"{forest.run} has no branches, as recipe.seed_share is 1, and so no budget for one")
    if begin_from == SEED and not budget.seed:
        raise UserError(f"{forest.run} has no seed to begin from, as recipe.seed_share is 0; begin from the average")
    check_batch(plan, {name: task}, start.environment.world_size)
    stage_name = f"added-{forest.planted:04d}-{name}"
    with stop_requests() as stop:
        Stages(start, stop, plan.identity).run(stage_name, partial(_train, plan, name, task, begin_from))
    return start.run.stages / stage_name


def _train(plan: ForestPlan, name: str, task: LanguageModelTask, begin_from: str, stage: Stage) -> dict[str, Any]:
    """Fit the branch, from what it is to begin from."""
    budget, config, forest = plan.budget, plan.start.config, Forest(plan.start.run.root)
    if begin_from == SEED:
        settings = settings_until(config.train, budget.seed + budget.branch, budget.branch_batch)
        seed = plan.start.run.stages / SEED
        return fit_model(plan, stage, task, settings, first=seed, first_step=budget.seed)

    def begin(model: MoEModel) -> None:
        """Fill it with the average of the experts, by the posterior of their domains on a sample, or the likeliest."""
        scorer = Scorer(model.to(stage.groups.device), plan.union, {name: task}, forest, stage.groups, plan.prior)
        prior_J = scorer.prior(name, "all")
        shares = prior_J.tolist()
        if begin_from == "nearest":
            shares = [float(j == int(prior_J.argmax())) for j in range(len(shares))]
        place_weights(model, averaged([forest.weights(expert) for expert in scorer.experts], shares))

    settings = settings_until(config.train, budget.branch, budget.branch_batch)
    return fit_model(plan, stage, task, settings, begin=begin)

"""The recipe ``merge_compress``: a finished run with fewer or smaller experts, which follow what they were.

Its stages, each a directory under ``stages/`` that holds a supervised run: ``merge``, ``recover``; ``factor``,
``prune`` and ``drop``, which together are ``compress``; ``recover_again``. What a stage begins with is the run that the
one before has left, the first one's the source; any of them may be left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dist_moe.config.plain_yaml import Content
from dist_moe.engine.checkpoint import write_first_checkpoint
from dist_moe.engine.checkpoint.files import checkpoints_of, remove
from dist_moe.errors import UserError
from dist_moe.models import MoEModelConfig
from dist_moe.recipes.merge_compress.compress import (
    Compressed,
    check_beside,
    check_merge,
    compress,
    report_text,
    supervised_config,
)
from dist_moe.recipes.merge_compress.low_rank import check_low_rank, dropped, factored, low_rank_text
from dist_moe.recipes.merge_compress.picture import PICTURE, write_picture
from dist_moe.recipes.merge_compress.prune import LowRankPruningConfig, RowPruning
from dist_moe.recipes.merge_compress.recover import (
    check_recovery,
    fit_student,
    recovery_objective,
    student_of,
    trained_parts,
)
from dist_moe.recipes.merge_compress.settings import CompressConfig, RecoverConfig
from dist_moe.recipes.recipe import RecipeConfig, RunStart
from dist_moe.recipes.stages import RunOfStage, Stage, StagedPlan, StagedRecipe, Stages
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.evaluate import opened_run
from dist_moe.recipes.supervised.recipe import check_task, checked_feed
from dist_moe.recipes.supervised.runs import (
    Weights,
    check_same_data,
    digest_of_weights,
    find_weights,
    rehearsed_model,
    weights_named_by,
)

Work = Callable[[StagedPlan, Weights, SupervisedConfig, Stage], RunOfStage]
"""The work of a stage: (plan, weights that it begins with, configuration of supervised training of their model, stage)
-> the run that it leaves."""

_FROM_SOURCE = ("imports", "data", "model", "target_weights", "seed", "trackers", "train", "deepspeed")
"""Sections that are those of the source where they are left out."""


class MergeCompressConfig(SupervisedConfig):
    """Recovery of a compressed run: supervised training that begins with its weights.

    Where ``model`` has no name, all that the file does not say is as the source has it: the data, the model, and how
    it is trained; ``parallel`` and what else may move experts are not taken over.
    """

    start: None = Field(None, description="nothing: a student begins with the source's weights")

    @classmethod
    def filled(cls, content: Content) -> Content:
        """Return what a file says, laid over what is taken from the source."""
        recipe, model = content.get("recipe"), content.get("model")
        source = recipe.get("source") if isinstance(recipe, dict) else None
        is_whole = isinstance(model, str) or (isinstance(model, dict) and "name" in model)
        if isinstance(source, str | Path) and not is_whole:
            theirs = _weights_of(Path(source)).config.plain()
            content = _laid_over({name: theirs[name] for name in _FROM_SOURCE if name in theirs}, content)
        return super().filled(content) | {"start": content.get("start")}


class MergeCompressRecipe(StagedRecipe):
    """Merge the experts of a finished run, or prune them; then recover by distillation from what it was; compress."""

    configuration: ClassVar[type[RecipeConfig]] = MergeCompressConfig
    places: ClassVar[tuple[str, ...]] = ("source",)

    name: Literal["merge_compress"] = Field("merge_compress", description="fewer experts, which recover")
    source: Path = Field(description="finished run (its best checkpoint), or a checkpoint in one")
    merge: CompressConfig | None = Field(None, description="how experts become fewer (null: they do not)")
    recover: RecoverConfig | None = Field(
        default_factory=lambda: RecoverConfig(), description="how the result is trained (null: it is not)"
    )
    compress: LowRankPruningConfig | None = Field(
        None,
        description="how experts become a product of low rank plus a few rows, while they train as recover says (null: "
        "they do not)",
    )
    recover_again: bool = Field(False, description="train once more, as recover says, when experts are compressed")

    @model_validator(mode="after")
    def _has_stages(self) -> Self:
        if not self.stages():
            raise ValueError("merge, recover and compress are null: there is nothing to do")
        if self.recover_again and (self.recover is None or self.compress is None):
            raise ValueError("recover_again=true needs recover and compress; set it to false, or give both")
        return self

    @property
    def teachers(self) -> tuple[Path, ...]:
        """The source, where something is trained."""
        return () if self.recover is None and self.compress is None else (self.source,)

    def stages(self) -> dict[str, Work]:
        """Return the stages by name, in order."""
        every: dict[str, Work | None] = {
            "merge": None if self.merge is None else partial(self._merge, self.merge),
            "recover": None if self.recover is None else partial(self._recover, self.recover),
        }
        if self.compress is not None:
            recover = self.recover or RecoverConfig()
            every["factor"] = partial(self._factor, self.compress.rank)
            every["prune"] = partial(self._recover, recover, pruning=self.compress)
            every["drop"] = self._drop
            every["recover_again"] = partial(self._recover, recover) if self.recover_again else None
        return {name: work for name, work in every.items() if work is not None}

    def result_of(self, root: Path) -> Path:
        """Return the directory of the last stage."""
        return root / "stages" / list(self.stages())[-1]

    def weights(self) -> dict[str, str]:
        """Return the digest of the source."""
        digest = digest_of_weights(self.source)
        return {} if digest is None else {"source": digest}

    def plan(self, start: RunStart) -> StagedPlan:
        """Check that the source is there, has this model and these data, and that all stages can be run."""
        config: MergeCompressConfig = start.config
        check_beside(self.source, start.run.root)
        weights = _weights_of(self.source)
        _check_same_model(self.source, weights.config.model, config.model)
        plan = super().plan(start)
        check_same_data(self.source, weights, plan.task, allowed=start.allow_changed_data)
        model = rehearsed_model(self.source, plan.task)
        if self.merge is not None:
            check_merge(config, model, self.merge)
        recover = self.recover or (RecoverConfig() if self.compress is not None else None)
        if recover is not None:
            check_task(start, plan.task)
            check_recovery(recover, config, plan.task, model)
            feed = checked_feed(config, plan.task, start.environment)
            if self.compress is not None:
                check_low_rank(
                    self.compress, recover, config, plan.task, config.train.total_steps(feed.steps_per_epoch)
                )
        return plan

    def run(self, plan: StagedPlan, stages: Stages) -> None:
        """Run the stages, each on what the one before has left."""
        before = self.source
        for name, work in self.stages().items():
            weights = find_weights(before)
            config = supervised_config(plan.start.config, weights.config.model.model_dump(mode="json"))
            size, asked = config.parallel.expert_parallel_size, plan.start.config.parallel.expert_parallel_size
            if size < asked:
                plan.start.say(f"stage {name}: experts over {size} rank(s): {asked} would not have equally many")
            stages.run(name, partial(work, plan, weights, config), config.parallel)
            before = stages.directory(name).root

    def _merge(
        self, merge: CompressConfig, plan: StagedPlan, weights: Weights, config: SupervisedConfig, stage: Stage
    ) -> RunOfStage:
        compressed = compress(opened_run(weights, config, plan.task, stage.groups, []), merge)
        if stage.environment.is_rank_zero:
            write_picture(compressed.report, stage.run.root / PICTURE)
        return self._left(compressed, report_text, plan, stage)

    def _factor(
        self, rank: int, plan: StagedPlan, weights: Weights, config: SupervisedConfig, stage: Stage
    ) -> RunOfStage:
        compressed = factored(weights.stored, config, plan.task, rank)
        return self._left(compressed, low_rank_text, plan, stage)

    def _drop(self, plan: StagedPlan, weights: Weights, config: SupervisedConfig, stage: Stage) -> RunOfStage:
        compressed = dropped(weights.stored, config, plan.task)
        return self._left(compressed, low_rank_text, plan, stage)

    def _left(
        self, compressed: Compressed, in_words: Callable[[dict[str, Any]], str], plan: StagedPlan, stage: Stage
    ) -> RunOfStage:
        """Write a run that has yet to train, and say what its report says."""
        if stage.environment.is_rank_zero:
            if stage.checkpoint is not None:  # of an attempt that died before its report was written
                remove(stage.checkpoint)
            identity = stage.identity.plain()
            checkpoints = checkpoints_of(stage.run.root)
            write_first_checkpoint(compressed.weights, checkpoints, f"{self.source.name}, compressed", identity)
        plan.start.say(in_words(compressed.report))
        return RunOfStage(compressed.report, compressed.config)

    def _recover(
        self,
        recover: RecoverConfig,
        plan: StagedPlan,
        weights: Weights,
        config: SupervisedConfig,
        stage: Stage,
        pruning: LowRankPruningConfig | None = None,
    ) -> RunOfStage:
        student = student_of(stage, config, plan.task, weights.stored)
        trained = trained_parts(recover.trained, student)
        objective = recovery_objective(recover, self.source, config, plan.task, stage.groups)
        callbacks = [] if pruning is None else [RowPruning(pruning)]
        fitted = fit_student(stage, config, plan.task, student, objective, trained=trained, callbacks=callbacks)
        return RunOfStage(fitted, config)


def _weights_of(source: Path) -> Weights:
    """Return the source's weights. Raises UserError, naming the field, if they are not there or not intact."""
    weights = weights_named_by("recipe.source", source)
    if not isinstance(weights.config, SupervisedConfig):
        name = weights.config.recipe.name
        raise UserError(f"recipe.source={source} is a run of recipe.name={name}, which has no single model to compress")
    return weights


def _check_same_model(source: Path, theirs: MoEModelConfig, ours: MoEModelConfig) -> None:
    there, here = (model.model_dump(mode="json") for model in (theirs, ours))
    for name in there | here:
        if name != "activation_checkpointing" and there.get(name) != here.get(name):
            raise UserError(
                f"model.{name}={here.get(name)!r}: recipe.source={source} has {there.get(name)!r}; leave the section "
                "model out, which is the source's then"
            )


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return two nested mappings as one, of which ``above`` counts; a section of another name or type stays whole."""
    merged = below | above
    for key in below.keys() & above.keys():
        one, other = below[key], above[key]
        if isinstance(one, dict) and isinstance(other, dict):
            switched = any(tag in other and other[tag] != one.get(tag) for tag in ("name", "type"))
            merged[key] = other if switched else _laid_over(one, other)
    return merged

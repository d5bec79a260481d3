"""Branch-Train-MiX: the experts of a forest as one mixture of experts (Sukhbaatar et al., Branch-Train-MiX, 2024).

The feed-forward networks of the dense experts become the experts of MoE layers, expert j of the forest expert j of each
layer; all other parameters are averaged. The gates are new. The mixture is then trained on all domains for a while: its
gates must learn to route, and the rest that it is a mixture. The result is a run directory of its own, which every
command takes: RUN/forest/btx-GATE.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from dist_moe.config.settings import LARGEST_COUNT, LARGEST_DEPTH
from dist_moe.engine.checkpoint import (
    ROUTERS,
    ModelWeights,
    newest_checkpoint,
    place_weights,
    read_model,
    write_first_checkpoint,
)
from dist_moe.engine.checkpoint.files import checkpoints_of
from dist_moe.engine.checkpoint.format import EXPERTS
from dist_moe.engine.checkpoint.safetensors_writer import TensorSpec
from dist_moe.engine.deepspeed.config import cast_parameters
from dist_moe.engine.deepspeed.schedules import check_length_of_schedule
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.errors import UserError
from dist_moe.experts import FeedForwardConfig
from dist_moe.gates import GateConfig, TopKConfig
from dist_moe.models import MoEModel, TransformerConfig
from dist_moe.models.conversion import DecoderConversionConfig
from dist_moe.models.conversion.decoder import conversion_errors
from dist_moe.parallel import wait_for_all
from dist_moe.recipes.branch_train_merge.average import averaged
from dist_moe.recipes.branch_train_merge.budget import settings_until
from dist_moe.recipes.branch_train_merge.forest import FOLDER, Forest
from dist_moe.recipes.branch_train_merge.merge import MERGES, Exported, MergeSettings, Scores, changed_fields, label_of
from dist_moe.recipes.branch_train_merge.scoring import Scorer
from dist_moe.recipes.branch_train_merge.training import ForestPlan, fit_model
from dist_moe.recipes.recipe import validate_recipe
from dist_moe.recipes.stages import Stage, Stages
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.runs import Weights, find_weights
from dist_moe.recipes.supervised.size import check_fits, planned_model
from dist_moe.tasks import Task, build_model

_DENSE = re.compile(r"(layers\.(\d+)\.)dense\.(up|down|gate)\.weight")
"""Names of the parameters of a decoder's dense feed-forward networks; their weights are (out, in)."""


def mixture_of(models: Sequence[ModelWeights], config: TransformerConfig) -> ModelWeights:
    """Return weights of ``config``'s model but for its gates: an expert for each dense decoder, the rest averaged.

    No more than a tensor of each model is in memory at a time. Raises UserError for models of different shapes.
    """
    mean = averaged(models, [1.0] * len(models))
    kinds, specs, dense_name_of = dict(mean.kinds), dict(mean.specs), dict[str, str]()
    for name in mean:
        match = _DENSE.fullmatch(name)
        if match is not None and config.has_experts(int(match[2])):
            made = f"{match[1]}moe.experts.{match[3]}"
            out_dim, in_dim = mean.specs[name].shape
            specs[made], kinds[made] = TensorSpec(specs.pop(name).dtype, (len(models), in_dim, out_dim)), EXPERTS
            dense_name_of[made] = name
            del kinds[name]

    def read(name: str, expert: int | None) -> Tensor:
        if name not in dense_name_of:
            return mean.read(name, expert)
        assert expert is not None, "experts are read one by one"
        return models[expert].read(dense_name_of[name], None).T.contiguous()

    return replace(mean, kinds=kinds, specs=specs, read=read)


@MERGES.register
class BTX(MergeSettings):
    """One mixture of the experts' feed-forward networks and the average of the rest, trained on all domains."""

    name: Literal["btx"] = Field(
        "btx", description="one mixture of experts of the experts' feed-forward networks, trained on all domains"
    )
    gate: GateConfig = Field(default_factory=lambda: TopKConfig(), description="the gate of its MoE layers")
    moe_every: int = Field(
        1, ge=1, le=LARGEST_DEPTH, description="every so many layers, the last becomes a mixture; others are averaged"
    )
    share: float = Field(
        0.1, gt=0, le=1, description="tokens that it is trained on, as a share of those of the whole forest's budget"
    )
    scheduler: dict[str, Any] | None = Field(
        None, description="deepspeed.scheduler of its training; null: the forest's, from its beginning on"
    )
    learns: Literal["all", "gates"] = Field(
        "all", description="what is trained: all parameters, as in the paper, or the gates alone"
    )
    expert_parallel_size: int = Field(
        1, ge=1, le=LARGEST_COUNT, description="ranks over which the experts are split, as that of parallel"
    )

    @property
    def label(self) -> str:
        """A short name for tables: the gate, and what else differs from the defaults, but for schedule and layout."""
        unnamed = ("gate", "scheduler", "expert_parallel_size")
        changed = {name: value for name, value in changed_fields(self).items() if name not in unnamed}
        return label_of(f"btx {self.gate.name}", changed_fields(self.gate) | changed)

    @property
    def directory(self) -> str:
        """The name of its run directory in the forest, and of its stage."""
        return re.sub(r"[^\w.]+", "-", self.label)

    def config_of(self, plan: ForestPlan) -> SupervisedConfig:
        """Return the configuration of the mixture: that of a supervised run."""
        config: SupervisedConfig = plan.start.config
        assert isinstance(config.model, TransformerConfig), "check_config has seen it"
        changes = {
            "num_experts": len(plan.partition.branches),
            "moe_every": self.moe_every,
            "gate": self.gate,
            "experts": FeedForwardConfig(hidden=config.model.dense_hidden),
        }
        steps, batch = max(1, round(self.share * plan.budget.total)), plan.budget.twin_batch
        schedule = {} if self.scheduler is None else {"scheduler": self.scheduler}
        return config.model_copy(
            update={
                "recipe": validate_recipe("supervised"),
                "model": config.model.model_copy(update=changes),
                "train": settings_until(config.train, steps, batch),
                "deepspeed": config.deepspeed | schedule,
                "parallel": config.parallel.model_copy(update={"expert_parallel_size": self.expert_parallel_size}),
            }
        )

    def check_config(self, config: Any) -> None:
        """Raise UserError for a model that has experts already."""
        if not isinstance(config.model, TransformerConfig) or config.model.moe_every:
            raise UserError(
                f"recipe.merge: btx makes experts of the feed-forward networks of dense decoders, and model.name="
                f"{config.model.name} has experts already; set model.moe_every=0, or take average or ensemble"
            )

    def check_plan(self, plan: ForestPlan) -> None:
        """Raise UserError for a mixture that cannot be built or trained as it is asked for."""
        config, environment = self.config_of(plan), plan.start.environment
        assert isinstance(config.model, TransformerConfig), "check_config has seen it"
        try:
            for fault in conversion_errors(plan.start.config.model, config.model, DecoderConversionConfig()):
                raise UserError(fault)
            config.check(environment.world_size)
            check_fits(config, plan.union, environment)
            check_length_of_schedule(config.deepspeed, config.train.max_steps or 1)
            parameters = (name for name, _ in planned_model(config, plan.union).named_parameters())
            if self.learns == "gates" and not any(ROUTERS[0] in name for name in parameters):
                raise UserError(f"learns=gates: model.gate.name={self.gate.name} has nothing to learn; use learns=all")
        except UserError as error:
            raise UserError(f"recipe.merge, {self.label}: {error}") from error

    def prepare(self, plan: ForestPlan, stages: Stages) -> None:
        """Make the mixture, train it, and write its run directory."""
        if plan.budget.branches:
            config = self.config_of(plan)
            stages.run(self.directory, partial(self._train, plan, config), config.parallel)

    def _train(self, plan: ForestPlan, config: SupervisedConfig, stage: Stage) -> dict[str, Any]:
        forest = Forest(plan.start.run.root)
        assert isinstance(config.model, TransformerConfig), "check_config has seen it"
        weights = mixture_of([forest.weights(name) for name in plan.partition.branches], config.model)
        fitted = fit_model(
            replace(plan, start=replace(plan.start, config=config)),
            stage,
            plan.union,
            config.train,
            begin=lambda model: place_weights(model, weights, ROUTERS),
            trained=[f"*{ROUTERS[0]}*"] if self.learns == "gates" else None,
        )
        wait_for_all()  # until rank 0 has written the last checkpoint
        if stage.environment.is_rank_zero:
            run = RunDirectory(forest.root / self.directory)
            shutil.rmtree(run.root, ignore_errors=True)  # of an attempt that died before the stage had ended
            source, origin = newest_checkpoint(stage.run.root), f"stages/{self.directory}"
            write_first_checkpoint(read_model(source), checkpoints_of(run.root), origin, plan.identity.plain())
            plan.identity.write(run)
            run.describe(config.plain(), plan.start.environment)  # last: its presence makes it a run
        tokens = fitted["steps"] * config.train.batch_size * plan.task.tokens_per_example
        return fitted | {"tokens": tokens, "experts": list(plan.partition.branches)}

    def score(self, scorer: Scorer, domain: str) -> Scores:
        """Score the sequences of a domain by the mixture."""
        run = scorer.forest.run / FOLDER / self.directory
        model = scorer.another(run, lambda: opened(run, scorer.task, scorer.groups))
        return Scores.of_one(scorer.score(model, domain))

    def model(self, scorer: Scorer, domain: str | None, new_model: Callable[[], MoEModel]) -> nn.Module:
        """Return the mixture."""
        return opened(scorer.forest.run / FOLDER / self.directory, scorer.task, scorer.groups)

    def exported(self, plan: ForestPlan, scorer: Scorer, domain: str | None) -> Exported:
        """Return the mixture."""
        weights = trained_mixture(scorer.forest.run / FOLDER / self.directory)
        return Exported({self.name: weights.stored}, weights.config)


def trained_mixture(run: Path) -> Weights:
    """Return the weights of the run of a mixture. Raises UserError if there is none."""
    if not RunDirectory(run).config.is_file():
        raise UserError(
            f"{run} is not there: the run has trained no such mixture; name one of its recipe.merge, or train a forest "
            "with this one"
        )
    return find_weights(run)


def opened(run: Path, task: Task, groups: ProcessGroups) -> MoEModel:
    """Return the model of a run with this rank's experts, in its precision. Raises UserError if there is none."""
    weights = trained_mixture(run)
    model: MoEModel = build_model(weights.config, task, groups.world).to(groups.device)
    cast_parameters(model, weights.config.deepspeed, groups.device)
    weights.load(model)
    return model

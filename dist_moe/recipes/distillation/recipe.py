"""Distillation as recipes: supervised training in which the student also follows a teacher.

Two of them, by how it follows: ``moebert`` (hidden states and predictions) and ``dhkd`` (a second head, whose gradient
can be aligned with that of the labels).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dist_moe.engine.deepspeed.config import zero_stage
from dist_moe.engine.deepspeed.gradient_alignment import check_alignment
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.engine.training import Objective
from dist_moe.errors import UserError
from dist_moe.models import BertClassifierConfig, BertConfig
from dist_moe.recipes.distillation.dhkd import DHKDConfig
from dist_moe.recipes.distillation.moebert import MoEBERTConfig
from dist_moe.recipes.distillation.objective import DistillationObjective, Terms
from dist_moe.recipes.distillation.teacher import Teacher
from dist_moe.recipes.identity import check_stem
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.recipe import SupervisedRecipe, weighted_objective
from dist_moe.recipes.supervised.runs import digest_of_weights, rehearsed_model, trained_model, weights_named_by
from dist_moe.recipes.supervised.start.bert import check_same_split
from dist_moe.tasks import Task
from dist_moe.tasks.labelled_text import TextClassificationTask

TEACHER = "finished run on the same task, with the same encoder"


class DistillationRecipe(SupervisedRecipe):
    """Supervised training of a BERT that follows a teacher beside the labels.

    What the student differs from its teacher is recorded, weighted, as ``teacher_NAME`` of each of the method's terms.
    """

    places: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: Path = Field(description=TEACHER)

    @property
    def teachers(self) -> tuple[Path, ...]:
        """The teacher."""
        return (self.teacher,)

    def check(self, config: SupervisedConfig, task: Task) -> None:
        """Raise UserError for a teacher that is not there, of another task or split, or that does not fit."""
        weights, digests = weights_named_by("recipe.teacher", self.teacher), task.digests()
        theirs = weights.config
        check_same_split("recipe.teacher", self.teacher, weights, config.data, digests)
        check_stem("recipe.teacher", self.teacher, weights.identity, digests, ("tokenizer",))
        size = config.parallel.expert_parallel_size
        for count in (
            theirs.model.expert_counts(config.data.target_names).values() if theirs.model.num_moe_layers else ()
        ):
            if count % size:
                raise UserError(
                    f"parallel.expert_parallel_size={size} does not divide the {count} experts of "
                    f"recipe.teacher={self.teacher}"
                )
        rehearsed_model(self.teacher, task)

    def check_config(self, config: SupervisedConfig) -> None:
        """Raise UserError for a model that is no BERT."""
        if not isinstance(config.model, BertConfig):
            raise UserError(
                f"recipe.name={self.name}: for model.name=bert_classifier or bert_answerer, not {config.model.name}; "
                f"use recipe.name=supervised"
            )

    def weights(self, config: SupervisedConfig, task: Task) -> dict[str, str]:
        """Return digests of the weights that the run starts from, and of its teacher's."""
        teacher = digest_of_weights(self.teacher)
        return super().weights(config, task) | ({} if teacher is None else {"teacher": teacher})

    def opened_teacher(self, task: Task, groups: ProcessGroups) -> Teacher:
        """Return the teacher with this rank's experts. Raises UserError if its run is not intact."""
        return Teacher(trained_model(self.teacher, task, groups.world).to(groups.device))


class MoEBERTRecipe(DistillationRecipe, MoEBERTConfig):
    """MoEBERT's and COMET-BERT's distillation: hidden states and predictions follow those of a teacher."""

    name: Literal["moebert"] = Field(  # type: ignore[assignment]
        "moebert", description="hidden states and predictions follow the teacher's"
    )

    def objective(self, config: SupervisedConfig, task: Task, groups: ProcessGroups) -> Objective:
        """Return the labels' loss and that of hidden states and predictions."""
        plain = weighted_objective(config, task, groups)
        teacher = self.opened_teacher(task, groups)
        return DistillationObjective(plain, teacher, _recorded(self.terms), ask={"hidden_states": True})


class DHKDRecipe(DistillationRecipe, DHKDConfig):
    """Dual-head distillation of a classifier, whose ``model.auxiliary_head`` follows the teacher's logits."""

    name: Literal["dhkd"] = Field(  # type: ignore[assignment]
        "dhkd", description="a second head follows the teacher's logits, class by class"
    )

    def check_config(self, config: SupervisedConfig) -> None:
        """Raise UserError for a model without auxiliary head, or a ZeRO stage that cannot align gradients."""
        super().check_config(config)
        if not isinstance(config.model, BertClassifierConfig) or config.model.auxiliary_head is None:
            raise UserError(
                "recipe.name=dhkd: a second head learns the teacher's logits, and there is none; set "
                "model.auxiliary_head=mlp (or linear) of a bert_classifier"
            )
        if self.align_gradients:
            check_alignment(zero_stage(config.deepspeed))

    def check(self, config: SupervisedConfig, task: Task) -> None:
        """Raise UserError for a task without classes, and for a teacher that does not fit."""
        assert isinstance(task, TextClassificationTask), "the configuration's checks know what fits"
        if task.is_regression:
            head = getattr(config.model, "auxiliary_head", None)
            raise UserError(
                f"model.auxiliary_head={head} follows the logits of classes, and "
                f"data.name={config.data.name} has a number to predict; use recipe.name=moebert"
            )
        super().check(config, task)

    def objective(self, config: SupervisedConfig, task: Task, groups: ProcessGroups) -> Objective:
        """Return the labels' loss and that of the auxiliary head."""
        plain = weighted_objective(config, task, groups)
        teacher = self.opened_teacher(task, groups)
        return DistillationObjective(plain, teacher, _recorded(self.terms), align=self.align_gradients)


def _recorded(terms: Terms) -> Terms:
    def named(student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
        return {f"teacher_{name}": term for name, term in terms(student, teacher, batch).items()}

    return named

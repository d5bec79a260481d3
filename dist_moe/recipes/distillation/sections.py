"""Whom a run follows, and how: the configuration's section ``distillation``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dist_moe.recipes.distillation.dhkd import DHKDConfig
from dist_moe.recipes.distillation.moebert import MoEBERTConfig

TEACHER = "finished run on the same task, with the same encoder"


class MoEBERTSection(MoEBERTConfig):
    """MoEBERT's and COMET-BERT's distillation: hidden states and predictions follow those of a teacher."""

    name: Literal["moebert"] = Field("moebert", description="hidden states and predictions follow the teacher's")
    teacher: Path = Field(description=TEACHER)


class DHKDSection(DHKDConfig):
    """Dual-head distillation of a classifier, whose ``model.auxiliary_head`` follows the teacher's logits."""

    name: Literal["dhkd"] = Field("dhkd", description="a second head follows the teacher's logits, class by class")
    teacher: Path = Field(description=TEACHER)


DistillationSection = Annotated[MoEBERTSection | DHKDSection, Field(discriminator="name")]

"""Settings of ``dist-moe compress`` and of the recipe ``merge_compress``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from dist_moe.config.settings import LARGEST_COUNT, Settings
from dist_moe.recipes.distillation.predictions import FollowConfig
from dist_moe.recipes.merge_compress.group import Linkage
from dist_moe.recipes.merge_compress.methods import METHODS, Method

Grouping = Literal["global", "uniform"]
Trained = Literal["all_but_router", "experts", "router", "all"]
Ids = tuple[Annotated[int, Field(ge=0)], ...]


class CompressConfig(Settings):
    """How a run's experts become fewer."""

    experts: int | None = Field(
        None,
        ge=2,
        le=LARGEST_COUNT,
        description="experts that a layer keeps, on average over the layers (null: one for each of groups)",
    )
    method: str = Field("m_smoe", description="; ".join(f"{name}: {method.text}" for name, method in METHODS.items()))
    grouping: Grouping | None = Field(
        None,
        description="global: a layer whose experts are used evenly keeps more of them than others; uniform: every "
        "layer as many (null: global for m_smoe, uniform and prune_usage where the model allows it, else uniform)",
    )
    groups: tuple[tuple[Ids, ...], ...] | None = Field(
        None,
        description="groups to merge, for each MoE layer: [[[0, 1], [2, 3]], ...]; in means weighted by usage with "
        "m_smoe, in plain ones with uniform (null: the method finds them)",
    )
    similarity: Literal["router", "router_rows", "outputs", "weights"] = Field(
        "router",
        description="of experts: cosines of router logits over tokens, of the router's rows, of results, or of "
        "(aligned) weights",
    )
    align: Literal["leader", "first", "none"] = Field(
        "leader",
        description="the expert to whose hidden units those of others are matched before they are averaged: the leader "
        "of its group, expert 0, or none",
    )
    align_by: Literal["weights", "activations"] = Field(
        "weights",
        description="how hidden units are matched: by the products of their weights, or by the correlations of their "
        "activations over tokens",
    )
    linkage: Linkage = Field("average", description="how hc_smoe measures the distance of clusters")
    excluded_layers: tuple[int, ...] = Field(
        (), description="MoE layers, counted from 0, that keep all of their experts"
    )
    part: Literal["train", "val"] = Field("train", description="examples on which experts are compared")
    examples: int = Field(256, ge=1, description="number of these examples, evenly spread")
    seed: int = Field(0, ge=0, description="seed of random groups")

    @field_validator("method")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"there is no such method; allowed: {', '.join(METHODS)}")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.grouping == "global" and not self.by.ranks_usage:
            raise ValueError(
                f"grouping=global does not go with method={self.method}, which ranks in layers; use grouping=uniform"
            )
        if (self.experts is None) == (self.groups is None):
            raise ValueError("give one of experts=N (how many a layer keeps) and groups=[[[0, 1], ...], ...]")
        if self.groups is not None and (not self.by.joins or self.grouping or self.excluded_layers):
            raise ValueError(
                f"groups: they are given, and merged by method=m_smoe or uniform, not {self.method}; grouping and "
                "excluded_layers have nothing to choose"
            )
        return self

    def settled(self, *, can_differ: bool) -> CompressConfig:
        """Return this with a grouping. ``can_differ``: whether layers of the model can have unequally many experts."""
        grouping: Grouping = "global" if can_differ and self.by.ranks_usage and self.groups is None else "uniform"
        return self.model_copy(update={"grouping": self.grouping or grouping})

    def group_errors(self, num_experts: Sequence[int]) -> str | None:
        """Return what is wrong with given groups, for layers of so many experts; None if nothing is."""
        given = self.groups or ()
        if len(given) != len(num_experts):
            return f"groups: they are of {len(given)} layers, the model has {len(num_experts)} MoE layers"
        for layer, (groups, count) in enumerate(zip(given, num_experts, strict=True)):
            if sorted(expert for group in groups for expert in group) != list(range(count)) or not all(groups):
                return (
                    f"groups[{layer}]={[list(group) for group in groups]}: each of experts 0 to {count - 1} must be in "
                    "one group, once, and no group may be empty"
                )
        if max(len(groups) for groups in given) < 2:
            return "groups: some layer must keep at least 2 experts"
        return None

    @property
    def by(self) -> Method:
        """The method."""
        return METHODS[self.method]

    @property
    def compares(self) -> bool:
        """Whether experts join the leader to which they are most similar."""
        return self.by.joins and self.groups is None

    @property
    def needs_outputs(self) -> bool:
        """Whether the experts' results on all tokens are looked at."""
        return self.by.needs_outputs or (self.compares and self.similarity == "outputs")

    @property
    def aligns_by_activations(self) -> bool:
        """Whether hidden units are matched by their activations."""
        return self.align_by == "activations" and self.align != "none" and not self.by.prunes


class RecoverConfig(FollowConfig):
    """How a compressed model is trained to be as good as the uncompressed one, which it follows."""

    trained: Trained = Field(
        "all_but_router",
        description="what is trained, the rest is held still: all_but_router (the gates stay, M-SMoE), experts, router "
        "(the gates alone: Router KD), or all",
    )
    task_weight: float | None = Field(
        None,
        ge=0,
        description="weight of the task's own loss, and of the gates' auxiliary ones where gates are trained (null: 1, "
        "but 0 for trained=router)",
    )

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Self:
        if not self.loss_weight and not self.weight and not self.hidden_weight:
            raise ValueError("task_weight, weight and hidden_weight are all 0: there is nothing to learn from")
        return self

    @property
    def loss_weight(self) -> float:
        """Weight of the task's own loss."""
        default = 0.0 if self.trained == "router" else 1.0
        return default if self.task_weight is None else self.task_weight

    @property
    def trains_router(self) -> bool:
        """Whether gates are trained."""
        return self.trained in ("router", "all")

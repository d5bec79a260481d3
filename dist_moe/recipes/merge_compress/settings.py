"""Settings of ``dist-moe compress``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dist_moe.config.settings import LARGEST_COUNT, Settings
from dist_moe.recipes.merge_compress.group import Linkage

Method = Literal["m_smoe", "hc_smoe", "uniform", "random", "prune_usage", "reap"]
Grouping = Literal["global", "uniform"]

METHODS = {
    "m_smoe": "the most used experts lead, the others join the most similar one; means weighted by usage",
    "hc_smoe": "hierarchical clusters of the experts' mean results; means weighted by usage",
    "uniform": "the groups of m_smoe; plain means",
    "random": "random groups; means weighted by usage",
    "prune_usage": "the most used experts are kept, the others are removed",
    "reap": "experts with the largest results, as weighted by the gate, are kept, the others are removed",
}
_BY_USAGE = ("m_smoe", "uniform", "prune_usage")


class CompressConfig(Settings):
    """How a run's experts become fewer."""

    experts: int = Field(ge=2, le=LARGEST_COUNT, description="experts that a layer keeps, on average over the layers")
    method: Method = Field("m_smoe", description="; ".join(f"{name}: {text}" for name, text in METHODS.items()))
    grouping: Grouping | None = Field(
        None,
        description="global: a layer whose experts are used evenly keeps more of them than others; uniform: every "
        "layer as many (null: global for m_smoe, uniform and prune_usage where the model allows it, else uniform)",
    )
    similarity: Literal["router", "outputs", "weights"] = Field(
        "router",
        description="of experts: cosines of router logits over tokens, of results, or of (aligned) weights",
    )
    align: Literal["leader", "first", "none"] = Field(
        "leader",
        description="the expert to whose hidden units those of others are matched before they are averaged: the leader "
        "of its group, expert 0, or none",
    )
    linkage: Linkage = Field("average", description="how hc_smoe measures the distance of clusters")
    excluded_layers: tuple[int, ...] = Field(
        (), description="MoE layers, counted from 0, that keep all of their experts"
    )
    part: Literal["train", "val"] = Field("train", description="examples on which experts are compared")
    examples: int = Field(256, ge=1, description="number of these examples, evenly spread")
    seed: int = Field(0, ge=0, description="seed of random groups")

    @model_validator(mode="after")
    def _only_usage_is_ranked_over_layers(self) -> Self:
        if self.grouping == "global" and self.method not in _BY_USAGE:
            raise ValueError(
                f"grouping=global does not go with method={self.method}, which ranks within layers; use uniform"
            )
        return self

    def settled(self, *, can_differ: bool) -> CompressConfig:
        """Return this with a grouping. ``can_differ``: whether layers of the model can have unequally many experts."""
        grouping: Grouping = "global" if can_differ and self.method in _BY_USAGE else "uniform"
        return self.model_copy(update={"grouping": self.grouping or grouping})

    @property
    def prunes(self) -> bool:
        """Whether experts are removed, not merged."""
        return self.method in ("prune_usage", "reap")

    @property
    def joins(self) -> bool:
        """Whether experts join the leader that is most similar."""
        return self.method in ("m_smoe", "uniform")

    @property
    def needs_outputs(self) -> bool:
        """Whether the experts' results on all tokens are looked at."""
        return self.method in ("hc_smoe", "reap") or (self.similarity == "outputs" and self.joins)

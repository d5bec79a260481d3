"""Configuration of models whose every m-th layer is a mixture of experts, each mixture perhaps of another size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from dist_moe.config.settings import LARGEST_COUNT
from dist_moe.models.moe_model import MoEModelConfig


class LayeredConfig(MoEModelConfig):
    """The fields of transformers, decoders and encoders."""

    one_layer: ClassVar[bool] = False

    experts_by_layer: tuple[Annotated[int, Field(ge=1, le=LARGEST_COUNT)], ...] | None = Field(
        None,
        description="experts of each mixture, at most num_experts, as merging leaves them (null: num_experts in each)",
    )
    moe_every: int = Field(
        1, ge=0, description="every so many layers, the last of them is a mixture of experts (0: none, a dense model)"
    )

    def has_experts(self, layer: int) -> bool:
        """Return whether layer ``layer`` (from 0) is a mixture."""
        return bool(self.moe_every) and (layer + 1) % self.moe_every == 0

    def experts_of(self, layer: int) -> int:
        """Return the number of experts of layer ``layer`` (from 0), a mixture."""
        counts = self.experts_by_layer
        return self.num_experts if counts is None else counts[layer // self.moe_every]

    def expert_counts(self, targets: Sequence[str]) -> dict[str, int]:
        """Return the numbers of experts of the mixtures, by what to call them."""
        if self.experts_by_layer is None:
            return super().expert_counts(targets)
        return {f"model.experts_by_layer[{i}]={count}": count for i, count in enumerate(self.experts_by_layer)}

    def validation_errors(self) -> Iterator[str]:
        """Yield what does not fit together, as "field=value: reason"."""
        yield from super().validation_errors()
        counts = self.experts_by_layer
        if counts is None:
            return
        if max(counts, default=0) > self.num_experts:
            yield f"experts_by_layer={list(counts)}: give numbers of at most num_experts={self.num_experts}"
        if self.permutation is not None:
            yield "experts_by_layer: only as many slots as experts can be permuted; set it or permutation to null"

    def layer_errors(self, layers: int) -> Iterator[str]:
        """Yield what does not fit a model of so many layers, as "field=value: reason"."""
        counts, mixtures = self.experts_by_layer, layers // self.moe_every if self.moe_every else 0
        if self.moe_every > layers:
            yield f"moe_every={self.moe_every} exceeds layers={layers}; allowed: 0 (dense) to {layers}"
        elif counts is not None and len(counts) != mixtures:
            yield f"experts_by_layer={list(counts)}: give {mixtures} numbers, one for each mixture"

"""Null slots: beside its experts, a gate may choose slots that do nothing, so that tokens vary in cost.

Zeng, Miao, Gao, Zhang, Deng: AdaMoE: Token-Adaptive Routing with Null Experts (Findings of EMNLP
2024). A router over n experts and m nulls keeps its k best; what falls on nulls is dropped:

    w_i = p_i / sum of p_j over the kept experts j        for a kept expert i
    no weight at all                                      for a token that kept nulls only

The load-balance loss runs over all n + m slots with the nulls as one bucket. Balanced routing uses
k n / (n + m) experts per token on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_moe.config.settings import LARGEST_COUNT
from dist_moe.gates.balance import load_balance
from dist_moe.gates.base import GATES, Gate, GateContext, GateSettings, Mixture
from dist_moe.gates.top_k import TopK


@GATES.register
class AdaMoEConfig(GateSettings):
    """The AdaMoE gate: Top-k over experts and null slots; the more nulls, the fewer experts per token."""

    evaluation_fields: ClassVar[tuple[str, ...]] = ("k",)

    name: Literal["ada_moe"] = "ada_moe"
    k: int = Field(4, ge=1, description="slots per token, experts and nulls together")
    null_slots: int = Field(16, ge=0, le=LARGEST_COUNT, description="slots that do nothing, beside the experts")
    balance_weight: float = Field(
        1e-4, ge=0, description="weight of the load-balance loss over experts and nulls, which is 1 when uniform"
    )

    def build(self, dim: int, num_experts: int, context: GateContext) -> NullSlots:
        """Return a Top-k gate over experts and nulls."""
        return NullSlots(TopK(dim, num_experts + self.null_slots, self.k), self.null_slots, self.balance_weight)

    def validation_errors(self, num_experts: int) -> Iterator[str]:
        """Yield whether k exceeds the slots, nulls included."""
        slots = num_experts + self.null_slots
        if self.k > slots:
            yield f"k={self.k} exceeds num_experts + null_slots={slots}; allowed: 1..{slots}"


class NullSlots(Gate):
    """Any ``gate`` over n + m slots, of which the last m are nulls: a gate over n experts.

    A token that loses no weight to nulls keeps its weights to the bit; one that does has the others
    divided by their sum; one with nulls only has no assignment. ``aux["null_balance"]``: the bucketed
    load-balance loss, with a weight, while training; its probabilities are a :class:`TopK` gate's
    own, or the mixture of any other gate over the n + m slots. Works on the dense mixture: a lazy
    ``gate`` saves nothing here.
    """

    def __init__(self, gate: Gate, null_slots: int, balance_weight: float = 0.0) -> None:
        if not 0 <= null_slots <= gate.num_experts - 2:
            raise ValueError(
                f"null_slots must leave at least 2 of the gate's {gate.num_experts} slots as experts, got {null_slots}"
            )
        super().__init__(gate.dim, gate.num_experts - null_slots)
        self.gate = gate
        self.null_slots = null_slots
        self.balance_weight = balance_weight
        self.num_branches = gate.num_branches
        self.can_exclude = gate.can_exclude

    def allow(self, allowed_E: Tensor) -> None:
        """Exclude experts, never the nulls; see :meth:`Gate.allow`."""
        super().allow(allowed_E)
        self.gate.allow(torch.cat([allowed_E, allowed_E.new_ones(self.null_slots)]))

    @property
    def largest_entropy(self) -> float:
        """The inner gate's, over experts and nulls."""
        return self.gate.largest_entropy

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Mixture:
        """Return the inner mixture without what nulls took, the other weights divided by their sum."""
        gate = self._informed()
        if isinstance(gate, TopK):
            logit_TS = gate.logits(x_TD)
            inner, probability_TS = gate.mixture_of_logits(logit_TS), gate.probabilities(logit_TS)
        else:
            inner = gate.mixture(x_TD, ids_T)
            probability_TS = inner.weight_TKE.sum(dim=1)
        aux = inner.aux
        if self.balance_weight and self.training:
            selected_TS = (inner.weight_TKE.detach() != 0).any(dim=1)
            loss = load_balance(self, selected_TS, probability_TS, self.null_slots)
            aux = aux | {"null_balance": self.balance_weight * loss}
        return Mixture(without_null(inner.weight_TKE, self.null_slots), aux)

    def logits(self, x_TD: Tensor) -> Tensor | None:
        """Return the inner gate's logits of the experts' slots."""
        logit_TS = self.gate.logits(x_TD)
        return None if logit_TS is None else logit_TS[:, : self.num_experts]

    @property
    def rows_ED(self) -> Tensor | None:
        """The inner gate's rows of the experts' slots."""
        row_SD = self.gate.rows_ED
        return None if row_SD is None else row_SD[: self.num_experts]

    def begin_step(self, step: int) -> None:
        """Prepare the inner gate."""
        self._informed().begin_step(step)

    def end_step(self) -> None:
        """Conclude the step of the inner gate."""
        self._informed().end_step()

    def _informed(self) -> Gate:
        """The inner gate, told what the owner of this one has set since."""
        self.gate.splits_branches = self.splits_branches
        self.gate.sum_over_ranks = self.sum_over_ranks
        return self.gate


def without_null(weight_TKS: Tensor, null_slots: int) -> Tensor:
    """Return the (T, K, n) weights on experts of (T, K, n + m), divided by their sum where nulls took some."""
    num_experts = weight_TKS.shape[-1] - null_slots
    weight_TKE, null_TKM = weight_TKS[..., :num_experts], weight_TKS[..., num_experts:]
    left_T11 = weight_TKE.sum(dim=(1, 2), keepdim=True)
    shared_T11 = (null_TKM != 0).any(dim=2, keepdim=True).any(dim=1, keepdim=True) & (left_T11 != 0)
    return torch.where(shared_T11, weight_TKE / torch.where(shared_T11, left_T11, 1), weight_TKE)

"""ReLU routing: a token's experts are those whose logit is above 0, however many they are.

Wang, Chen, Zhu: ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing (ICLR 2025). With logits l = W x, the
weights are max(l, 0), which do not sum to 1. Nothing is discontinuous: an expert comes and goes with weight 0. How many
there are per token is held near k by an L1 loss whose weight lambda follows the gate's sparsity (eq. 7 and 8):

    L = lambda sum_i f_i mean(w_i),     f_i = n / (k T) (number of the T tokens with w_i > 0);  f_i = 1 unbalanced
    lambda <- lambda 1.2^s              after each step, s = sign(mean number of experts per token - k)

so f punishes busy experts more, as a load-balance loss does. In the paper one lambda serves all layers, and layers
share the experts out among each other; here a gate knows no other, and each layer is held at k. Lambda stays between
its first value and 1e4, so that where a gate cannot follow, as one that is frozen, it comes back and does not overflow.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.gates.base import GATES, Gate, GateContext, GateSettings, Mixture, affine, check_k

GROWTH = 1.2
LARGEST_L1_WEIGHT = 1e4


@GATES.register
class ReLUConfig(GateSettings):
    """The ReLU gate: experts with a logit above 0, held near k per token on average by an adaptive L1 loss."""

    name: Literal["relu"] = "relu"
    k: int = Field(2, ge=1, description="experts per token, on average over tokens, that training leads to")
    balance: bool = Field(True, description="punish an expert's weights by its load; false: all weights alike")
    l1_weight: float = Field(1e-8, gt=0, le=1, description="weight of the L1 loss at first, and its least; it adapts")

    def build(self, dim: int, num_experts: int, context: GateContext) -> ReLU:
        """Return the gate with these options."""
        return ReLU(dim, num_experts, **self.model_dump(exclude={"name"}))


class ReLU(Gate):
    """``weight`` (n, dim), glorot-uniform.

    ``l1_steps``: 0-dim int64 buffer, the net number of times that the loss's weight has grown. ``aux["l1"]``: the loss
    with its weight, only while training. Options are described in :class:`ReLUConfig`.
    """

    can_exclude = True
    l1_steps: Tensor
    excess: Tensor

    def __init__(
        self, dim: int, num_experts: int, k: int = 2, *, balance: bool = True, l1_weight: float = 1e-8
    ) -> None:
        super().__init__(dim, num_experts)
        check_k(k, num_experts)
        self.k = k
        self.balance = balance
        self.first_l1_weight = l1_weight
        self.most_l1_steps = math.ceil(math.log(LARGEST_L1_WEIGHT / l1_weight, GROWTH))
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_experts, dim)))
        # Whole numbers: in a bf16 model a weight of its own could no longer be multiplied by 1.2 with any precision.
        self.register_buffer("l1_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("excess", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def l1_weight(self) -> Tensor:
        """The 0-dim fp64 weight lambda of the L1 loss."""
        return (self.first_l1_weight * GROWTH ** self.l1_steps.double()).clamp(max=LARGEST_L1_WEIGHT)

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Mixture:
        """Return the logits above 0, in one branch."""
        weight_TE = self.logits(x_TD).relu()
        return Mixture(weight_TE.unsqueeze(1), self._aux(weight_TE))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the (T, n) logits, -inf for excluded slots."""
        return self.exclude(affine(x_TD, self.weight, self.weight.new_zeros(self.num_experts)))

    @property
    def rows_ED(self) -> Tensor | None:
        """The router's (n, dim) rows."""
        return self.weight

    def end_step(self) -> None:
        """Move the weight of the loss by the number of experts of all ranks' tokens since the last call."""
        self.l1_steps.add_(torch.sign(self.sum_over_ranks(self.excess))).clamp_(0, self.most_l1_steps)
        self.excess.zero_()

    def _aux(self, weight_TE: Tensor) -> dict[str, Tensor]:
        """While training: count the experts that are active beyond k, and give the loss."""
        if not self.training:
            return {}
        active_TE = weight_TE.detach() != 0
        self.excess += active_TE.sum() - self.k * len(active_TE)
        sums_2E = torch.stack([active_TE.to(weight_TE.dtype).sum(dim=0), weight_TE.sum(dim=0)])
        totals_2E, num_tokens = self.total(sums_2E, len(weight_TE))
        share_E, mean_E = totals_2E / num_tokens.clamp(min=1)
        load_E = share_E * (self.num_allowed / self.k) if self.balance else torch.ones_like(share_E)
        return {"l1": self.l1_weight.to(weight_TE.dtype) * (load_E.detach() * mean_E).sum()}

"""Top-k: a linear router, the k largest logits, a softmax over the kept (Shazeer et al., 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.gates.base import Gate
from dist_moe.routing import Route
from dist_moe.settings import Settings


class TopKConfig(Settings):
    """The Top-k gate: the k experts with the largest router logits, for every token alike."""

    name: Literal["top_k"] = "top_k"
    k: int = Field(2, ge=1, description="experts per token")

    def build(self, dim: int, num_experts: int) -> TopK:
        return TopK(dim, num_experts, self.k)


class TopK(Gate):
    """``weight`` (n, dim), glorot-uniform, and ``bias`` (n,), zero, as in the COMET comparison.

    The kept logits are chosen by index, never by value: a kept logit of exactly 0 counts.
    """

    def __init__(self, dim: int, num_experts: int, k: int = 2) -> None:
        super().__init__(dim, num_experts)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must lie in 1..num_experts={num_experts}, got {k}")
        self.k = k
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_experts, dim)))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Route:
        logit_TE = nn.functional.linear(x_TD, self.weight.to(x_TD.dtype), self.bias.to(x_TD.dtype))
        kept_TK, slot_TK = logit_TE.topk(self.k, dim=-1)
        weight_TE = torch.zeros_like(logit_TE).scatter(1, slot_TK, kept_TK.softmax(dim=-1))
        return Route.from_dense(weight_TE)

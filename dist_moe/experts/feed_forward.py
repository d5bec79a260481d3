"""The transformer's expert: two dense layers around an activation, with or without a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe import kernels
from dist_moe.config.settings import LARGEST_SIZE
from dist_moe.experts.bank import ExpertBank, ExpertSettings, InitStds, drawn


class FeedForwardConfig(ExpertSettings):
    """A feed-forward network, as wide in its result as in its rows; the defaults are a small SwiGLU."""

    name: Literal["feed_forward"] = Field("feed_forward", description="which experts these are")
    hidden: int = Field(256, ge=1, le=LARGEST_SIZE, description="hidden width of each expert")
    activation: Literal["relu", "gelu", "silu"] = Field("silu", description="the activation")
    gated: bool = Field(
        True, description="multiply the activation with a second product of the row (GLU; with silu: SwiGLU)"
    )
    bias: bool = Field(False, description="add biases to both products")

    def build(
        self, dim: int, num_experts: int, expert_ids: Sequence[int], init_stds: InitStds = None
    ) -> FeedForwardBank:
        """Return the experts ``expert_ids``, which take and give rows of width ``dim``."""
        return FeedForwardBank(
            dim,
            self.hidden,
            num_experts,
            expert_ids,
            activation=self.activation,
            gated=self.gated,
            bias=self.bias,
            init_stds=init_stds,
        )


class FeedForwardBank(ExpertBank):
    """y = act(x U_e + b_e) V_e + c_e, or gated y = (act(x W_e) * (x U_e)) V_e (Shazeer, GLU variants, 2020).

    Parameters: ``up`` (E_local, dim, hidden), ``down`` (E_local, hidden, out_dim); ``gate``
    (E_local, dim, hidden) if ``gated``; ``up_bias``, ``down_bias`` (E_local, width) if ``bias``.
    ``activation``: "relu", "gelu" or "silu" (gated with "silu": SwiGLU). ``out_dim``: None is ``dim``.
    ``init_stds``: weights are normal with these deviations, of ``up`` and ``gate`` and of ``down``; None: they are
    glorot-uniform. Biases are zero. All are drawn per expert from its global id.
    Raises ValueError for an activation that is unknown.
    """

    hidden_axes = MappingProxyType({"up": 2, "gate": 2, "up_bias": 1, "down": 1})
    matrices = ("up", "gate", "down")

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        expert_ids: Sequence[int],
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
        out_dim: int | None = None,
        init_stds: InitStds = None,
    ) -> None:
        super().__init__(dim, out_dim or dim, num_experts, expert_ids)
        if activation not in kernels.ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(kernels.ACTIVATIONS)}, got {activation!r}")
        self.hidden = hidden
        self.activation = activation
        self.gated = gated
        generators = self.generators()
        in_std, out_std = init_stds or (None, None)
        self.up = drawn((dim, hidden), generators, in_std)
        self.gate = drawn((dim, hidden), generators, in_std) if gated else None
        self.down = drawn((hidden, self.out_dim), generators, out_std)
        self.up_bias, self.down_bias = (
            nn.Parameter(torch.zeros(self.num_local_experts, width)) if bias else None
            for width in (hidden, self.out_dim)
        )

    def forward(self, x_ND: Tensor, rows_per_expert: kernels.RowCounts) -> Tensor:
        """Return the networks' results, by the kernel for rows sorted by expert, which knows whole matrices only."""
        if self.factored:
            return self._network(x_ND, lambda x, name, bias: self.grouped(x, name, bias, rows_per_expert))
        weights = kernels.FeedForwardWeights(self.up, self.down, self.gate, self.up_bias, self.down_bias)
        return kernels.feed_forward(x_ND, weights, self.activation, rows_per_expert)

    def all_experts(self, x_TD: Tensor) -> Tensor:
        """Return all networks' results by batched products."""
        return self._network(x_TD.expand(self.num_local_experts, *x_TD.shape), self.batched)

    def _network(self, x_ND: Tensor, linear: Callable[[Tensor, str, Tensor | None], Tensor]) -> Tensor:
        act = kernels.ACTIVATIONS[self.activation].function
        hidden_NF = linear(x_ND, "up", self.up_bias)
        hidden_NF = act(linear(x_ND, "gate", None)) * hidden_NF if self.gated else act(hidden_NF)
        return linear(hidden_NF, "down", self.down_bias)

    def hidden_units(self, expert: Mapping[str, Tensor], x_TD: Tensor) -> Tensor:
        """Return the (T, hidden) activations of the hidden units of an expert with these parameters, by name."""
        act, hidden_TF = kernels.ACTIVATIONS[self.activation].function, x_TD @ expert["up"]
        hidden_TF = hidden_TF + expert["up_bias"] if "up_bias" in expert else hidden_TF
        return act(hidden_TF) if "gate" not in expert else act(x_TD @ expert["gate"]) * hidden_TF

    @property
    def kept_per_row(self) -> int:
        """The number that goes into the activation, and the one multiplied with its result, per hidden unit.

        Of factored matrices both results, too, and what is between the factors.
        """
        kept = self.hidden * (2 if self.gated else 1)
        return 2 * kept + sum(self.low_rank(name).into.shape[2] for name in self.factored) if self.factored else kept

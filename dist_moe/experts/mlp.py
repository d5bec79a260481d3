"""The multi-task recommender's expert: an MLP, with batch normalisation and a feature gate of its own where asked for.

HoME (Kuaishou, arXiv 2408.05430, 2024) has E(x) = Swish(BN(MLP(x * FG(x)))). Its feature gates are twice sigmoids of
low-rank maps, FG(x) = sum_l softmax(x W)_l * 2 sigmoid(x B_l A_l), so that experts which share an input do not fight
over the gradient to the same embeddings. 2 sigmoid(0) = 1: where B A = 0 a gate is neutral.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe import kernels
from dist_moe.config.settings import LARGEST_COUNT, LARGEST_SIZE, Settings, Size
from dist_moe.experts.bank import ExpertBank, ExpertSettings, InitStds, drawn
from dist_moe.experts.batch_norm import ExpertBatchNorm

Activation = Literal["relu", "gelu", "silu"]


class FeatureGateConfig(Settings):
    """Gates on the features that an expert sees, of low rank."""

    number: int = Field(2, ge=1, le=LARGEST_COUNT, description="low-rank maps of each expert, among which it chooses")
    rank: int | None = Field(
        None, ge=1, le=LARGEST_SIZE, description="rank of each map (null: width of the row / number, at least 1)"
    )
    mix: Literal["after", "before"] = Field(
        "after", description="mix the maps after or before the sigmoid; descriptions of HoME disagree"
    )


class MlpConfig(ExpertSettings):
    """A multi-layer perceptron."""

    name: Literal["mlp"] = Field("mlp", description="which experts these are")
    units: tuple[Size, ...] = Field((64,), min_length=1, description="units of each layer; the last: its result")
    activation: Activation = Field("relu", description="the activation after every layer")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the experts' results")
    batch_norm: bool = Field(
        False, description="normalise the last layer over all of an expert's rows, before its activation"
    )
    feature_gate: FeatureGateConfig | None = Field(
        None, description="gates of each expert on the features that it sees (null: none)"
    )

    @property
    def batch_dependent(self) -> bool:
        """Whether batch normalisation makes a row's result depend on others."""
        return self.batch_norm

    def build(self, dim: int, num_experts: int, expert_ids: Sequence[int], init_stds: InitStds = None) -> MlpBank:
        """Return the experts ``expert_ids``; their first weights are glorot-uniform, whatever ``init_stds``."""
        return MlpBank(dim, self, num_experts, expert_ids)

    def validation_errors(self, dim: int, out_dim: int | None = None) -> Iterator[str]:
        """Yield the width of the result where it is not the one that is needed."""
        if out_dim not in (None, self.units[-1]):
            yield f"experts.units={list(self.units)}: the model needs results of width {out_dim}; end with {out_dim}"


class _Linear(Protocol):
    """A product of every expert's rows with its matrix, and its bias added."""

    def __call__(self, x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor | None = None, /) -> Tensor: ...


class MlpBank(ExpertBank):
    """y = dropout(act(norm(h W_e + b_e))), h = act(... x ...) of the layers before; see :class:`MlpConfig`.

    Parameters: ``weight0``, ``weight1``, ... (E_local, in, out), glorot-uniform, and ``bias0``, ... (E_local, out),
    zero; none in front of batch normalisation, which takes it away: its gradient would be rounding alone, of which Adam
    makes steps. With batch normalisation ``norm_weight``, ``norm_bias`` (E_local, out), one and zero. With L feature
    gates of rank r: ``choice`` (E_local, dim, L), ``into`` (E_local, dim, L * r), glorot-uniform, and ``back``
    (E_local, L * r, dim), zero: gates begin neutral, and learn, as the gradient of ``back`` is not zero. All are drawn
    per expert from its global id.
    """

    def __init__(self, dim: int, config: MlpConfig, num_experts: int, expert_ids: Sequence[int]) -> None:
        super().__init__(dim, config.units[-1], num_experts, expert_ids)
        self.config = config
        self.batch_dependent = config.batch_norm
        generators, local = self.generators(), self.num_local_experts
        for i, (width, units) in enumerate(pairwise((dim, *config.units))):
            self.register_parameter(f"weight{i}", drawn((width, units), generators))
            has_bias = i < len(config.units) - 1 or not config.batch_norm
            self.register_parameter(f"bias{i}", nn.Parameter(torch.zeros(local, units)) if has_bias else None)
        if config.batch_norm:
            self.norm = ExpertBatchNorm(self.out_dim, num_experts)
            self.norm_weight = nn.Parameter(torch.ones(local, self.out_dim))
            self.norm_bias = nn.Parameter(torch.zeros(local, self.out_dim))
        if (gate := config.feature_gate) is not None:
            rank = gate.number * (gate.rank or max(dim // gate.number, 1))
            self.choice = drawn((dim, gate.number), generators)
            self.into = drawn((dim, rank), generators)
            self.back = nn.Parameter(torch.zeros(local, rank, dim))

    def forward(self, x_ND: Tensor, rows_per_expert: kernels.RowCounts) -> Tensor:
        """Return the experts' results on their rows."""

        def linear(x_ND: Tensor, weight_EDF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
            return kernels.grouped_linear(x_ND, weight_EDF, bias_EF, rows_per_expert)

        counts_E = torch.as_tensor(rows_per_expert, device=x_ND.device)
        result_NF = self._network(x_ND, linear, lambda: kernels.group_of_each_row(counts_E, len(x_ND)))
        return kernels.dropout(result_NF, self.config.dropout, self.training)

    def all_experts(self, x_TD: Tensor) -> Tensor:
        """Return all experts' results by batched products."""

        def linear(x_ETD: Tensor, weight_EDF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
            return x_ETD @ weight_EDF if bias_EF is None else torch.baddbmm(bias_EF.unsqueeze(1), x_ETD, weight_EDF)

        experts = torch.arange(self.num_local_experts, device=x_TD.device)
        x_ETD = x_TD.expand(self.num_local_experts, *x_TD.shape)
        result_ETF = self._network(x_ETD, linear, lambda: experts.repeat_interleave(len(x_TD)))
        return kernels.dropout(result_ETF, self.config.dropout, self.training, under_vmap=True)

    def _network(self, x_ND: Tensor, linear: _Linear, expert_of_row: Callable[[], Tensor]) -> Tensor:
        """Return the results on rows (N, D), or (E, T, D) for every expert, before dropout."""
        if self.config.feature_gate is not None:
            x_ND = x_ND * self._feature_gate(x_ND, linear, self.config.feature_gate)
        activation, last = kernels.ACTIVATIONS[self.config.activation].function, len(self.config.units) - 1
        for i in range(last + 1):
            x_ND = linear(x_ND, getattr(self, f"weight{i}"), getattr(self, f"bias{i}"))
            if i == last and self.config.batch_norm:
                norm = self.norm_weight, self.norm_bias
                x_ND = self.norm(x_ND.flatten(0, -2), expert_of_row(), self.expert_ids, *norm).view(x_ND.shape)
            x_ND = activation(x_ND)
        return x_ND

    def _feature_gate(self, x_ND: Tensor, linear: _Linear, gate: FeatureGateConfig) -> Tensor:
        share_NL = linear(x_ND, self.choice).softmax(dim=-1)
        low_NLR = linear(x_ND, self.into).unflatten(-1, (gate.number, -1))
        if gate.mix == "before":
            return 2 * linear((share_NL.unsqueeze(-1) * low_NLR).flatten(-2), self.back).sigmoid()
        maps = zip(share_NL.split(1, dim=-1), low_NLR.unbind(-2), self.back.chunk(gate.number, dim=1), strict=True)
        return 2 * sum(share_N1 * linear(low_NR, back).sigmoid() for share_N1, low_NR, back in maps)

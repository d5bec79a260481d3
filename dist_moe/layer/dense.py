"""The layer as one dense computation: every expert on every token, free of data-dependent shapes.

Costs n / (experts per token) times the work of the ragged layer, but can be vectorised over many
models at once (``torch.vmap``). For one rank that holds all experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_moe.gates import Gate
from dist_moe.gates.base import gate_dtype
from dist_moe.layer.moe import MoE, MoEOutput
from dist_moe.routing import Pairs, mix


class DenseReplay:
    """A :class:`~dist_moe.layer.moe.Replay` that mixes with ``matrices_GKSE``, one (K, S, E) slot -> expert
    matrix per gate. Keeps the mixtures of the last call, (G, T, E), in ``weight_GTE``."""

    def __init__(self, matrices_GKSE: Sequence[Tensor]) -> None:
        self._matrices_GKSE = matrices_GKSE
        self.weight_GTE: Tensor | None = None

    def __call__(self, layer: MoE, x_TD: Tensor, ids_T: Tensor | None) -> MoEOutput:
        weights, aux = [], dict[str, Tensor]()
        for gate, matrix_KSE in zip(layer.gates, self._matrices_GKSE, strict=True):
            assert isinstance(gate, Gate)
            mixture = gate.mixture(x_TD.to(gate_dtype(x_TD)), ids_T)
            branches_TKS = mixture.weight_TKE
            if len(matrix_KSE) == 1:
                branches_TKS = branches_TKS.sum(dim=1, keepdim=True)
            weights.append(mix(branches_TKS, matrix_KSE))
            for name, loss in mixture.aux.items():
                aux[name] = aux[name] + loss if name in aux else loss
        self.weight_GTE = torch.stack(weights)
        results_ETF = layer.by_expert(layer.experts.all_experts(x_TD))
        outputs_GTF = torch.einsum("gte,etf->gtf", self.weight_GTE.to(results_ETF.dtype), results_ETF)
        pairs = Pairs.none(len(layer.gates), layer.experts.num_experts, x_TD.device)
        return MoEOutput(tuple(outputs_GTF.unbind()), aux, (), pairs, rows_computed=0)

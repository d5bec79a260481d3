"""An ensemble as one module, for what calls a language model: generation, and whoever loads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dist_moe.models import ModelOutput, MoEModel
from dist_moe.recipes.branch_train_merge.posterior import log_predictions

LogWeights = Callable[[Tensor, Tensor], Tensor]
"""((J, B, S) log-probabilities of targets, (B, S) tokens before them) -> (J, B, S) log-weights before each target."""


class EnsembleModel(nn.Module):
    """Language models whose probabilities are mixed; its predictions are the log-probabilities of the mixture.

    ``log_weights``: how much each expert counts before each target, from what came before it.
    """

    def __init__(self, experts: Sequence[MoEModel], log_weights: LogWeights) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self._log_weights = log_weights

    def begin_evaluation(self) -> None:
        """Tell the experts that what comes is no training."""
        for expert in self.experts:
            assert isinstance(expert, MoEModel)
            expert.begin_evaluation()

    def forward(self, token_BS: Tensor) -> ModelOutput:
        """Return (B, S, V) log-probabilities of the next token, fp64, as the prediction."""
        logp_JBSV = torch.stack([expert(token_BS).predictions[0].double().log_softmax(-1) for expert in self.experts])
        return ModelOutput((log_predictions(logp_JBSV, token_BS, self._log_weights),), ())

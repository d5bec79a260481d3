"""DHKD's two heads over one feature: one for the labels, one for the teacher's logits.

Yang et al.: Dual-Head Knowledge Distillation (KDD 2025); its losses are in
:mod:`dist_moe.recipes.distillation.dhkd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dist_moe.layer import BatchNormOverRanks
from dist_moe.models.moe_model import ModelOutput

AuxiliaryHead = Literal["linear", "mlp"]
HIDDEN_UNITS = 200
DROPOUT = 0.1


@dataclass(frozen=True)
class DualHeadOutput(ModelOutput):
    """``auxiliary_BC``: logits of the auxiliary head; None in evaluation, and once the head is discarded."""

    auxiliary_BC: Tensor | None = None


class DualHead(nn.Module):
    """``head(x_BD)`` -> (B, C) logits of ``main``, a linear layer, and those of ``auxiliary`` while training.

    ``auxiliary``: linear, or (mlp) linear to 200, dropout 0.1, batch normalisation over all ranks, ReLU, linear; None
    for the plain head. The auxiliary head starts and drops out by random numbers that it puts back: the rest of the
    model is that of the plain student, to the bit.
    """

    def __init__(self, dim: int, num_classes: int, auxiliary: AuxiliaryHead | None = "mlp") -> None:
        super().__init__()
        self.main = nn.Linear(dim, num_classes)
        with torch.random.fork_rng(devices=[]):
            self.auxiliary = _auxiliary(auxiliary, dim, num_classes) if auxiliary else None

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        logit_BC = self.main(x_BD)
        if self.auxiliary is None or not self.training:
            return logit_BC, None
        with torch.random.fork_rng(devices=[x_BD.device] if x_BD.is_cuda else []):
            return logit_BC, self.auxiliary(x_BD)

    def discard_auxiliary(self) -> None:
        """From now on the plain head."""
        self.auxiliary = None


def _auxiliary(kind: AuxiliaryHead, dim: int, num_classes: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(dim, num_classes)
    return nn.Sequential(
        nn.Linear(dim, HIDDEN_UNITS),
        nn.Dropout(DROPOUT),
        BatchNormOverRanks(HIDDEN_UNITS),
        nn.ReLU(),
        nn.Linear(HIDDEN_UNITS, num_classes),
    )

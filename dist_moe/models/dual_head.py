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
    """``auxiliary_BC``: logits of the auxiliary head; None in evaluation, and without that head."""

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
        self.auxiliary = auxiliary_head(auxiliary, dim, num_classes)

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, dim) -> both heads' (B, C) logits; None for those of the auxiliary one in evaluation, or without it."""
        return self.main(x_BD), auxiliary_logits(self.auxiliary, x_BD)


def auxiliary_head(kind: AuxiliaryHead | None, dim: int, num_classes: int) -> nn.Module | None:
    """Return a head (B, dim) -> (B, ``num_classes``), drawn by random numbers that are put back; None for None."""
    if kind is None:
        return None
    with torch.random.fork_rng(devices=[]):
        return _head(kind, dim, num_classes)


def auxiliary_logits(head: nn.Module | None, x_BD: Tensor) -> Tensor | None:
    """Return (B, C) logits while ``head`` trains, else None; the random numbers of its dropout are put back."""
    if head is None or not head.training:
        return None
    with torch.random.fork_rng(devices=[x_BD.device] if x_BD.is_cuda else []):
        logit_BC: Tensor = head(x_BD)
        return logit_BC


def _head(kind: AuxiliaryHead, dim: int, num_classes: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(dim, num_classes)
    return nn.Sequential(
        nn.Linear(dim, HIDDEN_UNITS),
        nn.Dropout(DROPOUT),
        BatchNormOverRanks(HIDDEN_UNITS),
        nn.ReLU(),
        nn.Linear(HIDDEN_UNITS, num_classes),
    )
